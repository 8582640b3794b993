"""`trainer_state.json` of Hugging Face's Trainer."""

import gzip
import json
import math

import pytest

from internlm_lib.errors import InputError

HISTORY = [
    {"epoch": 0.1, "grad_norm": 1.5, "learning_rate": 1e-5, "loss": 3.5, "step": 10},
    {"epoch": 0.2, "grad_norm": math.nan, "learning_rate": 2e-5, "loss": math.nan, "step": 20,
     "num_input_tokens_seen": 4096},
    {"epoch": 0.2, "eval_loss": 3.25, "eval_runtime": 1.0, "step": 20},
    {"epoch": 0.2, "eval_accuracy": 0.5, "step": 20},
    {"epoch": 0.3, "learning_rate": 3e-5, "loss": 3.0, "step": 30},
    {"epoch": 0.3, "train_loss": 3.2, "train_runtime": 60.0, "total_flos": 1e15, "step": 30},
]  # fmt: skip


def state(**changed):
    values = {"best_metric": None, "epoch": 0.3, "global_step": 30, "log_history": HISTORY,
              "logging_steps": 10, "max_steps": 30, **changed}  # fmt: skip
    return json.dumps(values, indent=2, sort_keys=True).encode()


def test_entries_become_events(read):
    log = read(state())
    (start,) = log.start
    assert (start["engine"], start["format"]) == ("Hugging Face Trainer", "huggingface")
    assert (start["train_iters"], start["first_step"]) == (30, 1)
    assert [(s["step"], s.get("log_interval")) for s in log.step] == [(10, 10), (20, 10), (30, 10)]
    assert (log.step[0]["lr"], log.step[0]["grad_norm"]) == (1e-5, 1.5)
    assert math.isnan(log.step[1]["loss"]) and log.step[1]["consumed_tokens"] == 4096
    assert [(e["step"], e["loss"]) for e in log.validation] == [(20, 3.25)]
    assert log.end[0]["status"] == "done"
    assert log.summary["ignored"] == {"other metrics": 1}
    assert log.summary["lines"] == 6 and log.summary["missing_losses"] == 1


def test_gzip(read):
    assert len(read(gzip.compress(state())).step) == 3


@pytest.mark.parametrize("cut", [400, 700])
def test_half_a_file_is_refused(read, cut):
    with pytest.raises(InputError, match="not a whole trainer_state.json"):
        read(state()[:cut])


@pytest.mark.parametrize("history", [{}, "x", [], [1, None, {"step": "a"}]])
def test_no_history_is_refused(read, history):
    with pytest.raises(InputError):
        read(state(log_history=history))
