"""`internlm train --profile`: what a rank does in a few steps, operator by operator.

This module imports torch only inside functions: the stage reads the tables it leaves behind.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm_lib.errors import InputError, KitError
from internlm_lib.files import read_json, write_json

if TYPE_CHECKING:
    from internlm_lib.devices import Device
    from internlm_lib.engines.base import Engine, StepResult

WAIT_STEPS, WARMUP_STEPS, ACTIVE_STEPS = 2, 1, 3
"""Steps left alone, traced but thrown away (a profiler's first step is slow), and recorded."""
ALL_STEPS = WAIT_STEPS + WARMUP_STEPS + ACTIVE_STEPS


@dataclass
class ProfiledEngine:
    """An engine whose training steps a profiler is told of, until it has seen enough."""

    engine: "Engine"
    profiler: Any
    steps: int = 0

    def train_step(self, *arguments: Any, **options: Any) -> "StepResult":
        result = self.engine.train_step(*arguments, **options)
        self.steps += 1
        if self.steps <= ALL_STEPS:
            self.profiler.step()
        if self.steps == ALL_STEPS:
            self.profiler.stop()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def check_steps(train_iters: int) -> None:
    """Raises InputError if a training is too short to be profiled."""
    if train_iters < ALL_STEPS:
        raise InputError(
            f"--profile records steps {WAIT_STEPS + WARMUP_STEPS + 1} to {ALL_STEPS}, but "
            f"training.train_iters = {train_iters}; train {ALL_STEPS} or more, or leave it out"
        )


def profiled(engine: "Engine", folder: Path, device: "Device") -> "Engine":
    """The engine, profiled from its next step on; a rank's files are there after `ALL_STEPS`.

    Writes `rank<N>.trace.json`, which https://ui.perfetto.dev opens, and `rank<N>.operators.json`,
    which `slowest_operators` reads, into `folder`. What an earlier profile left is removed.
    """
    rank = int(os.environ.get("RANK", 0))
    trace, operators = (folder / f"rank{rank}.{kind}.json" for kind in ("trace", "operators"))
    folder.mkdir(parents=True, exist_ok=True)
    for old in (trace, operators):
        old.unlink(missing_ok=True)

    def keep(profiler: Any) -> None:
        profiler.export_chrome_trace(str(trace))
        write_json(operators, _operators(profiler.key_averages(), device.name))

    profiler = _profiler(device.name, keep)
    profiler.start()
    return ProfiledEngine(engine, profiler)


def _profiler(device: str, keep: Any) -> Any:
    """torch's profiler, or on an NPU torch_npu's, which has the same interface."""
    if device == "npu":
        import torch_npu

        library = torch_npu.profiler
        activities = [library.ProfilerActivity.CPU, library.ProfilerActivity.NPU]
    else:
        import torch

        library = torch.profiler
        activities = [library.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(library.ProfilerActivity.CUDA)
    schedule = library.schedule(wait=WAIT_STEPS, warmup=WARMUP_STEPS, active=ACTIVE_STEPS, repeat=1)
    return library.profile(activities=activities, schedule=schedule, on_trace_ready=keep)


def _operators(averages: Any, device: str) -> list[dict[str, Any]]:
    """Of every operator its calls and the milliseconds in itself, not in operators it calls."""
    key = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    rows = [
        {"operator": row.key, "calls": row.count, "self_ms": getattr(row, key) / 1000}
        for row in averages
    ]
    return [row for row in rows if not row["operator"].startswith("ProfilerStep")]


def slowest_operators(folder: Path, top: int = 20) -> list[dict[str, Any]]:
    """Table rows of the operators that took longest over all ranks and recorded steps.

    Columns: `operator`, `calls`, `self_ms` (milliseconds in itself, not in operators it calls),
    `share` (of the self time of all operators).

    Raises KitError if no rank left its operators there.
    """
    files = sorted(folder.glob("rank*.operators.json"))
    if not files:
        raise KitError(
            f"{folder}: no rank left a profile; the ranks' logs beside it say why, and "
            "`internlm train PARAMS --profile` makes one"
        )
    return ranked([row for path in files for row in read_json(path)], top)


def ranked(operators: Sequence[Mapping[str, Any]], top: int) -> list[dict[str, Any]]:
    """Operators of several ranks added up by name, the slowest first."""
    sums: dict[str, dict[str, Any]] = {}
    for row in operators:
        name = row["operator"]
        entry = sums.setdefault(name, {"operator": name, "calls": 0, "self_ms": 0.0})
        entry["calls"] += row["calls"]
        entry["self_ms"] += row["self_ms"]
    whole = sum(entry["self_ms"] for entry in sums.values())
    rows = sorted(sums.values(), key=lambda entry: -entry["self_ms"])[:top]
    return [
        {
            **row,
            "self_ms": round(row["self_ms"], 3),
            "share": row["self_ms"] / whole if whole else 0,
        }
        for row in rows
    ]
