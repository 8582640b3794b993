"""Where a training stands, read from its journal while it is written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internlm_lib.errors import InputError
from internlm_lib.journal import read_journal


class TrainingProgress:
    """Follows one training's journal from its present end, reading each line once."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._offset = journal.stat().st_size if journal.exists() else 0
        self._start: dict[str, Any] | None = None
        self._step: dict[str, Any] | None = None

    @property
    def started(self) -> float | None:
        """Time of the newest `start` event that `text` has come upon."""
        return self._start["time"] if self._start else None

    def text(self) -> str:
        """The latest step, e.g. `step 57/200, loss 2.31, 9,870 tokens/s, 0:48 left`; or ""."""
        try:
            for event, offset in read_journal(self._journal, self._offset):
                self._offset = offset
                if event["event"] == "start":
                    self._start, self._step = event, None
                elif event["event"] == "step":
                    self._step = event
        except InputError:  # a damaged journal is the stage's to report, not the display's
            return ""
        return step_text(self._start, self._step) if self._start and self._step else ""


def step_text(start: Mapping[str, Any], step: Mapping[str, Any]) -> str:
    """One training step in words, from the journal's `start` and `step` events."""
    number, total = step["step"], start["train_iters"]
    rate = step["tokens_per_second_per_device"] * start["world_size"]
    left = (total - number) * (step["time"] - start["time"]) / (number - start["first_step"] + 1)
    return (
        f"step {number}/{total}, loss {step['loss']:.3f}, {rate:,.0f} tokens/s, {clock(left)} left"
    )


def clock(seconds: float) -> str:
    """`1:23`, or `1:02:03` from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
