"""Logs of InternEvo (formerly InternLM's own training code), 2023-07 on.

Format: `record_current_batch_training_metrics` and `evaluate_on_val_dls`. After any of three
prefixes come `key=value` pairs, between commas in 2023-07, later between spaces. Keys may hold
spaces and parentheses, a value may be a Python dict. The log counts steps from 0 and its
validations from 1; a journal counts all from 1.
"""

import math
import re
from pathlib import Path
from typing import Any

from internlm_lib.logs.header import Header
from internlm_lib.logs.lines import LogLines
from internlm_lib.logs.reader import FACT, Event, Lines, Parsed
from internlm_lib.logs.values import as_text, count, number, unix_seconds

_PAIR = re.compile(r"([A-Za-z_][^=\s,]{0,60}(?: \([^=)]{0,40}\))?)=(\{[^}]*\}|[^\s,{}]+)")
_GROUP = re.compile(r"'([\w-]{1,60})': *([^\s,}]+)")
_SIZES = re.compile(
    r"data parallel size: (\d{1,9}), pipeline parallel size: (\d{1,9}), "
    r"tensor parallel size: (\d{1,9})"
)
_BATCH_COUNT = re.compile(r"batch count: ?(\d{1,15})\b")
_WHOLE_GROUPS = {"default", "fp32"}
"""Parameter groups that share no parameter, and whose norms are those of the whole model. Experts'
are means over ranks, so that no norm of all parameters follows from them."""

_KNOWN = (
    ("%|", "progress bar"),
    ("heckpoint", "checkpoint on its way"),
    ("WARN", "warning"),
    ("arning", "warning"),
    (" in set_device ", "start-up message"),
    (" in set_seed ", "start-up message"),
    ("Number of elements on ranks", "start-up message"),
)


class InternEvoReader:
    program = "InternEvo log"
    facts = "the log's launch line"
    averages = False

    def __init__(self) -> None:
        self.header = Header()
        self.begins = False
        self.total_steps: int | None = None
        self._last: tuple[int, int] | None = None

    def lines(self, path: Path) -> Lines:
        return LogLines(path)

    def is_whole(self, line: str) -> bool:
        return line.endswith(" ")

    def parse(self, line: str) -> Parsed:
        if (at := line.find("tflops=")) >= 0 and (step := self._read_step(line, at)):
            return step
        if (at := line.find("Validation on ")) >= 0 and (event := _read_validation(line, at)):
            return event
        if sizes := _SIZES.search(line):
            self.header = self.header.renewed(engine="internevo", time=unix_seconds(line))
            self.begins = True
            kinds = ("data_parallel", "pipeline_model_parallel", "tensor_model_parallel")
            for kind, size in zip(kinds, sizes.groups(), strict=True):
                self.header.add(f"{kind}_size", size)
            return FACT
        if "New Run" in line:
            self.begins = True
            return FACT
        if saved := _BATCH_COUNT.search(line):
            return {"event": "checkpoint", "time": unix_seconds(line), "step": int(saved.group(1))}
        if not line or line.isspace():
            return "blank"
        return next((kind for needle, kind in _KNOWN if needle in line), None)

    def _read_step(self, line: str, at: int) -> Event | None:
        pairs = dict(_PAIR.findall(line, at))
        step = count(pairs.get("step", ""))
        if step is None or step < 0 or "loss" not in pairs:
            return None
        loss = number(pairs["loss"])
        event: Event = {
            "event": "step",
            "time": unix_seconds(line[:at]),
            "step": step + 1,
            "loss": math.nan if loss is None else loss,
            **_gradient(pairs.get("grad_norm", "")),
            "skipped": count(pairs.get("inf_nan_skip_batches", "")),
            **{field: number(pairs.get(name, "")) for name, field in _NUMBERS.items()},
        }
        event |= self._tokens(step + 1, count(pairs.get("num_consumed_tokens", "")))
        return {name: value for name, value in event.items() if value is not None or name == "time"}

    def _tokens(self, step: int, consumed: int | None) -> dict[str, Any]:
        """Tokens so far, and those of this step where the step before it is known."""
        before = self._last if step > 1 else (0, 0)
        self._last = (step, consumed) if consumed is not None else None
        if consumed is None or before is None or before[0] != step - 1 or consumed <= before[1]:
            return {"consumed_tokens": consumed}
        return {"consumed_tokens": consumed, "tokens": consumed - before[1]}


_NUMBERS = {
    "lr": "lr",
    "loss_scale": "loss_scale",
    "tgs (tokens/gpu/second)": "tokens_per_second_per_device",
    "tflops": "logged_tflops_per_device",
    "fwd_bwd_time": "forward_backward_seconds",
}


def _gradient(text: str) -> dict[str, Any]:
    """`grad_norm`, or `grad_norms` of groups, and of all where that follows from them."""
    if not text.startswith("{"):
        return {"grad_norm": number(text)}
    norms = {name: number(value) for name, value in _GROUP.findall(text)}
    if not norms or None in norms.values():
        return {}
    whole = {name.partition("_")[2] for name in norms} <= _WHOLE_GROUPS
    total = math.hypot(*(norm for norm in norms.values() if norm is not None))
    return {"grad_norm": total if whole else None, "grad_norms": norms}


def _read_validation(line: str, at: int) -> Event | None:
    """`Validation on NAME: step=… val/NAME_loss=… val/NAME_acc=… val/NAME_plex=…`."""
    name, _, rest = line[at + len("Validation on ") :].partition(":")
    pairs = dict(_PAIR.findall(rest))
    loss = number(pairs.get("val/" + name + "_loss", ""))
    if loss is None:
        return None
    step = count(pairs.get("step", ""))
    data = as_text(name)
    return {
        "event": "validation",
        "time": unix_seconds(line[:at]),
        "step": step,
        "loss": loss,
        "data": data,
    }
