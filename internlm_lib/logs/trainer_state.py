"""`trainer_state.json` of Hugging Face's Trainer: the numbers it logged, as one JSON file.

Format: `TrainerState` of transformers (`trainer_callback.py`). Unlike the text logs it is read
whole: its size is that of its entries.
"""

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internlm_lib.errors import InputError
from internlm_lib.logs.header import Header
from internlm_lib.logs.lines import LogLines
from internlm_lib.logs.reader import Event, Lines, Parsed

_SNIFFED = 1 << 16
"""Bytes within which the file names its `log_history`: its keys are sorted."""

_NUMBERS = {"learning_rate": "lr", "grad_norm": "grad_norm"}


def is_trainer_state(path: Path) -> bool:
    """Whether a file looks like one, by its first bytes."""
    with path.open("rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as stream:
            start = stream.read(_SNIFFED)
    except (EOFError, OSError):
        return False
    return start.lstrip().startswith(b"{") and b'"log_history"' in start


class _Entries:
    """The entries of `log_history`, each as a line of JSON."""

    torn = False
    damage: str | None = None

    def __init__(self, state: dict[str, Any]) -> None:
        self._entries = state["log_history"]

    def __iter__(self) -> Iterator[str]:
        return (json.dumps(entry) for entry in self._entries)


class TrainerStateReader:
    program = "Hugging Face Trainer"
    facts = "trainer_state.json"
    averages = True

    def __init__(self) -> None:
        self.header = Header()
        self.begins = False
        self.total_steps: int | None = None

    def lines(self, path: Path) -> Lines:
        """Raises InputError if the file is damaged or is no trainer state."""
        try:
            state = json.loads("\n".join(LogLines(path)).encode("latin-1"))
            entries = state["log_history"]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: not a whole trainer_state.json ({error}); take that of the last complete "
                "checkpoint folder (checkpoint-<step>/trainer_state.json)"
            ) from error
        if not isinstance(entries, list):
            raise InputError(f"{path}: log_history is no list; this is no trainer_state.json")
        for name, key in (("max_steps", "train_iters"), ("logging_steps", "log_interval")):
            if _is_count(state.get(name)):
                self.header.add(key, str(int(state[name])))
        return _Entries(state)

    def is_whole(self, line: str) -> bool:
        return True

    def parse(self, line: str) -> Parsed:
        entry = json.loads(line)
        if not isinstance(entry, dict) or not _is_count(entry.get("step")):
            return None
        step = int(entry["step"])
        if "train_runtime" in entry:
            return {"event": "end", "time": None, "status": "done"}
        if "eval_loss" in entry:
            loss = _as_float(entry["eval_loss"])
            return None if loss is None else _event("validation", step, loss=loss)
        if "loss" not in entry and "learning_rate" not in entry:
            return "other metrics" if any(key.startswith("eval_") for key in entry) else None
        loss = _as_float(entry.get("loss"))
        numbers = {field: _as_float(entry.get(name)) for name, field in _NUMBERS.items()}
        known: dict[str, Any] = {key: value for key, value in numbers.items() if value is not None}
        if _is_count(entry.get("num_input_tokens_seen")):
            known["consumed_tokens"] = int(entry["num_input_tokens_seen"])
        return _event("step", step, loss=math.nan if loss is None else loss, **known)


def _event(kind: str, step: int, **fields: Any) -> Event:
    return {"event": kind, "time": None, "step": step, **fields}


def _is_count(value: Any) -> bool:
    """Whether a value is a whole number from 1 on, also where JSON holds it as a float."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 1 <= value < 10**15 and value == int(value)


def _as_float(value: Any) -> float | None:
    """A JSON number, NaN and infinities included; None if it is none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
