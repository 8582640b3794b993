"""A training as its journal tells it: what it was, and its steps as columns of numbers."""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internlm_lib.errors import InputError
from internlm_lib.journal import read_journal

Floats = NDArray[np.float64]

COLUMNS = (
    "loss", "grad_norm", "lr", "skipped", "consumed_tokens", "tokens_per_second_per_device",
    "model_tflops_per_device", "memory_bytes", "step_seconds", "data_seconds",
    "forward_backward_seconds", "communication_seconds", "optimizer_seconds",
)  # fmt: skip
"""Fields of `step` events that are read."""

SPOILED = "includes"
"""Field of a `step` event: what else its seconds contain, e.g. ["validation"] in a log whose lines
time intervals. The kit's own steps contain nothing else."""


@dataclass(frozen=True)
class LoggedTraining:
    """What a training's journal says: its newest `start` event and the steps in force."""

    name: str
    """For legends and tables, e.g. `candidate: megatron TP2 PP1 DP1 SP, cpu`."""
    start: dict[str, Any]
    steps: NDArray[np.int64]
    """Step numbers [n], rising."""
    columns: Mapping[str, Floats]
    """Of `COLUMNS` those that some step recorded: values [n], NaN where a step did not."""
    spoiled: NDArray[np.bool_]
    """Steps [n] whose seconds contain more than the step."""
    origin: str = ""
    """Where it was read from, for reports."""
    reading: Mapping[str, Any] = field(default_factory=dict)
    """What the reader of an imported log counted; empty for the kit's own trainings."""

    def __len__(self) -> int:
        return len(self.steps)

    def column(self, name: str) -> Floats:
        """One of `COLUMNS` [n]; NaN throughout if no step recorded it."""
        found = self.columns.get(name)
        return np.full(len(self), np.nan) if found is None else found

    @property
    def losses(self) -> Floats:
        """Loss per step [n], nats per token; NaN where a step recorded none."""
        return self.column("loss")


def read_training(journal: Path, name: str) -> LoggedTraining:
    """Read a training's journal; `name` says which one it is, e.g. "candidate".

    Raises InputError if it holds no start or no step.
    """
    origin = f"run {journal.parents[2].name}/{journal.parent.name}"
    training = from_events((event for event, _ in read_journal(journal)), name, origin)
    if training is None:
        raise InputError(
            f"{journal}: the {name} training recorded no step; run notebooks/03_train.ipynb again "
            f"and see {journal.parent / 'logs'} if it fails"
        )
    return training


def from_events(
    events: Iterable[Mapping[str, Any]], name: str, origin: str
) -> LoggedTraining | None:
    """A training from the events of a journal, however many; None without a start or a step.

    A training that was started again (a later `start` event with `first_step`) replaces what an
    earlier attempt wrote from that step on.
    """
    table, start, reading = _Table(), None, {}
    for event in events:
        kind = event["event"]
        if kind == "step":
            table.append(event)
        elif kind == "start":
            start = dict(event)
            table.forget(start["first_step"])
        elif kind == "import":
            reading = dict(event)
    if start is None or not len(table):
        return None
    label = f"{name}: {start['layout']}, {start['device']}"
    return LoggedTraining(label, start, *table.finish(), origin=origin, reading=reading)


class _Table:
    """Steps as they come in, 8 bytes a number."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._spoiled = array("b")
        self._columns = {name: array("d") for name in COLUMNS}

    def __len__(self) -> int:
        return len(self._steps)

    def append(self, event: Mapping[str, Any]) -> None:
        self._steps.append(event["step"])
        self._spoiled.append(bool(event.get(SPOILED)))
        for name, column in self._columns.items():
            value = event.get(name)
            column.append(float("nan") if value is None else value)

    def forget(self, first_step: int) -> None:
        """Drop the steps from one on; they are at the end unless steps came out of order."""
        keep = len(self._steps)
        while keep and self._steps[keep - 1] >= first_step:
            keep -= 1
        del self._steps[keep:], self._spoiled[keep:]
        for column in self._columns.values():
            del column[keep:]

    def finish(self) -> tuple[NDArray[np.int64], dict[str, Floats], NDArray[np.bool_]]:
        """In step order, one row per step: the last that was written."""
        steps = np.array(self._steps, dtype=np.int64)
        _, last = np.unique(steps[::-1], return_index=True)
        rows = len(steps) - 1 - last
        columns = {name: np.array(values)[rows] for name, values in self._columns.items()}
        found = {name: values for name, values in columns.items() if not np.isnan(values).all()}
        return steps[rows], found, np.array(self._spoiled, dtype=np.bool_)[rows]
