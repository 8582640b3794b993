"""A profile of real steps, and the table made of what ranks leave."""

import json
from pathlib import Path
from typing import Any

import pytest

from internlm_lib.devices import select_device
from internlm_lib.engines.base import StepResult
from internlm_lib.errors import InputError, KitError
from internlm_lib.training.profile import (
    ACTIVE_STEPS,
    ALL_STEPS,
    check_steps,
    profiled,
    ranked,
    slowest_operators,
)


class Multiplying:
    """An engine whose step is one product of matrices."""

    mark = "its own"

    def train_step(self, batches: Any, num_micro_batches: int, lr: float) -> StepResult:
        import torch

        torch.mm(torch.ones(64, 64), torch.ones(64, 64))
        return StepResult(float(num_micro_batches), lr)


def test_a_rank_leaves_a_trace_and_its_operators_of_the_recorded_steps(tmp_path: Path) -> None:
    engine: Any = profiled(Multiplying(), tmp_path, select_device("cpu"))  # type: ignore[arg-type]
    for step in range(ALL_STEPS + 2):
        assert not (tmp_path / "rank0.trace.json").exists() or step >= ALL_STEPS - 1
        assert engine.train_step(iter(()), 2, 0.5) == StepResult(2.0, 0.5)
    assert engine.mark == "its own"
    rows = {row["operator"]: row for row in slowest_operators(tmp_path)}
    assert rows["aten::mm"]["calls"] == ACTIVE_STEPS
    assert rows["aten::mm"]["self_ms"] > 0
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    events = json.loads((tmp_path / "rank0.trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == ACTIVE_STEPS


def test_operators_of_ranks_are_added_up_and_the_slowest_come_first() -> None:
    one = {"operator": "mm", "calls": 2, "self_ms": 3.0}
    other = {"operator": "add", "calls": 9, "self_ms": 2.0}
    assert ranked([one, other, one], top=1) == [
        {"operator": "mm", "calls": 4, "self_ms": 6.0, "share": 0.75}
    ]


def test_no_profile_and_too_few_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="no rank left a profile"):
        slowest_operators(tmp_path)
    check_steps(ALL_STEPS)
    with pytest.raises(InputError, match=rf"training\.train_iters = {ALL_STEPS - 1}"):
        check_steps(ALL_STEPS - 1)
