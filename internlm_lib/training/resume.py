"""Where a training begins: at its initial weights, or at the state it left behind.

Import only after `Device.adapt_megatron()`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
    if path is None:
        return Start(None, Position(consumed_samples=_samples_to_leave_out(files.journal, None)))
    position, state = read_position(path)
    for name, value in hashes.items():
        if state[name] != value:
            raise InputError(
                f"{path} was written by a training whose {name} is {state[name][:12]}…, this one's "
                f"is {value[:12]}…: a checkpoint continues the same experiment only. Delete "
                f"{files.checkpoints} to begin anew, or take its weights by model.weights"
            )
    left_out = _samples_to_leave_out(files.journal, path)
    consumed = max(position.consumed_samples, left_out)
    taken = [step["step"] for step in training_steps(files.journal)]
    return Start(
        path,
        replace(position, consumed_samples=consumed),
        state["recent_losses"],
        steps_repeated=max(0, max(taken, default=0) - position.step),
    )


def _samples_to_leave_out(journal: Path, checkpoint: Path | None) -> int:
    """How far the data was used up when a step of this training was rolled back; 0 if none was.

    What lies between the checkpoint and that step is not trained on again. A journal also has
    earlier trainings: one begins with a start from no checkpoint that is no restart.
    """
    used, restarted = 0, False
    for event, _ in read_journal(journal):
        if event["event"] == "start" and event["resumed_from"] is None and not restarted:
            used = 0
        elif event["event"] == "bad_step" and event["policy"] == "rollback":
            used = max(used, event["consumed_samples"])
        restarted = event["event"] == "restart"
    return used if checkpoint or restarted else 0
