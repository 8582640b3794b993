"""Which samples a training that is started again leaves out, by its journal."""

from pathlib import Path
from typing import Any

import pytest

from internlm_lib.journal import Journal

FRESH = ("start", {"resumed_from": None})
RESUMED = ("start", {"resumed_from": "step-0000004"})
RESTART = ("restart", {"restarts": 1})
CHECKPOINT = Path("step-0000004")


def rolled_back(consumed: int) -> tuple[str, dict[str, Any]]:
    return ("bad_step", {"policy": "rollback", "consumed_samples": consumed})


def left_out(consumed: int) -> tuple[str, dict[str, Any]]:
    return ("bad_step", {"policy": "skip_batch", "consumed_samples": consumed})


@pytest.mark.parametrize(
    ("events", "checkpoint", "samples"),
    [
        ([], None, 0),
        ([FRESH], CHECKPOINT, 0),
        ([FRESH, rolled_back(40), RESTART], CHECKPOINT, 40),
        ([FRESH, rolled_back(40), RESTART], None, 40),
        ([FRESH, rolled_back(40), RESTART, RESUMED, rolled_back(56), RESTART], CHECKPOINT, 56),
        ([FRESH, rolled_back(40), RESTART, FRESH, RESTART], CHECKPOINT, 40),
        # By hand, with a checkpoint still there: it goes on as if it had been restarted.
        ([FRESH, rolled_back(40)], CHECKPOINT, 40),
        # An earlier training, or one that begins anew.
        ([FRESH, rolled_back(40)], None, 0),
        ([FRESH, rolled_back(40), FRESH], CHECKPOINT, 0),
        # A batch that was left out is counted by the checkpoints themselves.
        ([FRESH, left_out(24)], CHECKPOINT, 0),
    ],
)
def test_samples_up_to_a_rolled_back_step_are_left_out(
    events: list[Any], checkpoint: Path | None, samples: int, tmp_path: Path
) -> None:
    from internlm_lib.devices import select_device

    select_device("cpu").adapt_megatron()
    from internlm_lib.training.resume import _samples_to_leave_out

    journal = Journal(tmp_path / "journal.jsonl")
    for kind, fields in events:
        journal.write(kind, **fields)
    assert _samples_to_leave_out(journal.path, checkpoint) == samples
