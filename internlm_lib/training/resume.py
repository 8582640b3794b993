"""Where a training begins: at its initial weights, or at the state it left behind.

Import only after `Device.adapt_megatron()`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from internlm_lib.errors import InputError
from internlm_lib.journal import read_journal, training_steps
from internlm_lib.run_folder import TrainingFolder
from internlm_lib.training.checkpoint import (
    Position,
    newest_whole,
    read_position,
    remove_unfinished,
)


@dataclass(frozen=True)
class Start:
    checkpoint: Path | None
    """None: from the initial weights."""
    position: Position
    recent_losses: Sequence[float] = ()
    steps_repeated: int = 0
    """Steps that an earlier attempt took after its last checkpoint."""


def find_start(
    files: TrainingFolder, hashes: Mapping[str, str], record: Callable[..., None]
) -> Start:
    """The newest whole checkpoint of this very training, or its beginning. Collective.

    Raises InputError if the checkpoints belong to another experiment, data or weights.
    """
    remove_unfinished(files.checkpoints)
    path = newest_whole(files.checkpoints, record)
    skipped = _samples_to_leave_out(files.journal)
    if path is None:
        return Start(None, Position(consumed_samples=skipped))
    position, state = read_position(path)
    for name, value in hashes.items():
        if state[name] != value:
            raise InputError(
                f"{path} was written by a training whose {name} is {state[name][:12]}…, this one's "
                f"is {value[:12]}…: a checkpoint continues the same experiment only. Delete "
                f"{files.checkpoints} to begin anew, or take its weights by model.weights"
            )
    consumed = max(position.consumed_samples, skipped)
    taken = [step["step"] for step in training_steps(files.journal)]
    return Start(
        path,
        replace(position, consumed_samples=consumed),
        state["recent_losses"],
        steps_repeated=max(0, max(taken, default=0) - position.step),
    )


def _samples_to_leave_out(journal: Path) -> int:
    """How far the data was used up when a step was last rolled back; 0 if none was.

    What lies between the checkpoint and that step is not trained on again.
    """
    bad: list[dict[str, Any]] = [
        event for event, _ in read_journal(journal) if event["event"] == "bad_step"
    ]
    rolled_back = [event["consumed_samples"] for event in bad if event["policy"] == "rollback"]
    return max(rolled_back, default=0)
