"""InternEvo, in its three prefixes."""

import math

import pytest

from internlm_lib.logs.facts import Facts

LAUNCH = (
    "2024-03-27 17:00:00,000\tINFO launch.py:409 in launch -- Distributed environment is "
    "initialized, data parallel size: 4, pipeline parallel size: 1, tensor parallel size: 2\n"
)
PREFIXES = {
    "standard": "2024-03-27 17:03:42,500\tINFO training_internlm.py:599 in "
    "record_current_batch_training_metrics -- ",
    "uniscale": "2024-03-27T17:03:42.500+00:00 INFO [training_internlm.py, line 600, in "
    "record_current_batch_training_metrics] - pid=78690 : ",
}
TIME = 1711559022.5


def metrics(step, loss="11.5", grad_norm="{'0_default': 3.0, '1_fp32': 4.0}", separator=" "):
    fields = (
        "tflops=180.25", f"step={step}", f"loss={loss}", "tgs (tokens/gpu/second)=4096.0",
        "tgs/last_tgs_1=1.0", "tgs/tgs_avg=2.0", "lr=4e-07", "loss_scale=65536.0",
        f"grad_norm={grad_norm}", "micro_num=4", f"num_consumed_tokens={(step + 1) * 65536}",
        "inf_nan_skip_batches=0", "adam_beta2=0.95", "fwd_bwd_time=1.75", "acc=0.0",
        "acc/en=0.0", "loss_from_metric=7.0", "loss/en=6.0", "loss/code=nan",
    )  # fmt: skip
    return separator.join(fields) + (" \n" if separator == " " else "\n")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_line_gives_all_its_numbers(read, prefix):
    log = read(LAUNCH + PREFIXES[prefix] + metrics(0))
    assert log.step == [{
        "event": "step", "time": TIME, "step": 1, "loss": 11.5, "grad_norm": 5.0,
        "grad_norms": {"0_default": 3.0, "1_fp32": 4.0}, "skipped": 0, "lr": 4e-07,
        "loss_scale": 65536.0, "tokens_per_second_per_device": 4096.0,
        "logged_tflops_per_device": 180.25, "forward_backward_seconds": 1.75,
        "consumed_tokens": 65536, "tokens": 65536, "step_seconds": 65536 / 4096.0 / 8,
    }]  # fmt: skip
    (start,) = log.start
    assert (start["engine"], start["layout"]) == ("InternEvo log", "internevo TP2 PP1 DP4")
    assert (start["world_size"], start["tokens_per_step"]) == (8, 65536)


def test_the_commas_of_2023(read):
    log = read(PREFIXES["standard"] + metrics(0, grad_norm="63.67", separator=","))
    assert (log.step[0]["loss"], log.step[0]["grad_norm"]) == (11.5, 63.67)
    assert log.step[0]["tokens_per_second_per_device"] == 4096.0


def test_norms_of_experts_give_no_norm_of_all(read):
    groups = "{'0_default': 3.0, '1_fp32': 4.0, '2_moe_ep_size_4': 0.5}"
    (step,) = read(PREFIXES["standard"] + metrics(0, grad_norm=groups)).step
    assert "grad_norm" not in step and step["grad_norms"]["2_moe_ep_size_4"] == 0.5


def test_steps_count_from_one_and_a_skipped_one_leaves_a_gap(read):
    log = read("".join(PREFIXES["standard"] + metrics(n) for n in (0, 1, 3)))
    assert [step["step"] for step in log.step] == [1, 2, 4]
    assert not any("log_interval" in step for step in log.step)
    assert [step.get("tokens") for step in log.step] == [65536, 65536, None]


def test_infinite_norms_and_losses(read):
    line = metrics(0, loss="nan", grad_norm="{'0_default': inf}")
    (step,) = read(PREFIXES["standard"] + line).step
    assert math.isnan(step["loss"]) and step["grad_norm"] == math.inf


@pytest.mark.parametrize(
    "message",
    ["Validation on en: step=2 val/en_loss=9.25 val/en_acc=0.1 val/en_plex=10404.5",
     "Validation on en:val/en_loss=9.25,val/en_acc=0.1,val/en_plex=10404.5,step=2"],
)  # fmt: skip
def test_validations_count_from_one_already(read, message):
    prefix = PREFIXES["standard"]
    log = read("".join(prefix + metrics(n) for n in (0, 1)) + prefix + message + "\n")
    (validation,) = log.validation
    assert (validation["step"], validation["loss"], validation["data"]) == (2, 9.25, "en")


def test_a_saved_checkpoint(read):
    saved = "x INFO checkpoint.py:1 in save -- Saving checkpoint to `c/2` at batch count:2 from 0\n"
    log = read(PREFIXES["standard"] + metrics(1) + saved + PREFIXES["standard"] + metrics(2))
    assert [event["step"] for event in log.checkpoint] == [2]
    assert log.step[1]["includes"] == ["checkpoint"]


def test_a_new_launch_is_a_restart(read):
    lines = [PREFIXES["standard"] + metrics(n) for n in (0, 1, 2)]
    log = read(LAUNCH + "".join(lines) + LAUNCH + "".join(lines[1:]))
    assert [start["first_step"] for start in log.start] == [1, 2]
    assert len(log.step) == 5


def test_given_devices_give_the_steps_time(read):
    (step,) = read(PREFIXES["standard"] + metrics(0), facts=Facts(devices=16)).step
    assert step["step_seconds"] == 65536 / 4096.0 / 16
