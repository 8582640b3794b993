"""Throughput of trainings, and of a candidate against its reference."""

import math
from typing import Any

import numpy as np

from internlm_lib.model.arithmetic import MODEL_FLOPS_CONVENTION
from internlm_lib.reporting.loss import LoggedTraining

WARM_UP_FRACTION = 0.1
"""Share of the first steps that is left out: they pay for compilation, caches and allocation."""

CONVENTION = (
    f"Medians over the steps after the first {WARM_UP_FRACTION:.0%}; model TFLOPs count "
    f"{MODEL_FLOPS_CONVENTION} (no recomputation); all per device, one process being one device."
)


def throughput(training: LoggedTraining, role: str) -> dict[str, Any]:
    """One table row; medians over the steps after warm-up, None for what was not recorded.

    Columns: `tokens_per_second_per_device` with its 5th and 95th percentile, `step_seconds`,
    `model_tflops_per_device`, `peak_memory_bytes` (over all steps).
    """
    steps = training.steps[math.floor(WARM_UP_FRACTION * len(training.steps)) :]
    speeds = _values(steps, "tokens_per_second_per_device")
    memory = _values(training.steps, "memory_bytes")
    return {
        "role": role,
        "layout": training.start["layout"],
        "device": training.start["device_name"],
        "devices": training.start["world_size"],
        "steps": len(steps),
        "tokens_per_second_per_device": _quantile(speeds, 0.5),
        "tokens_per_second_p5": _quantile(speeds, 0.05),
        "tokens_per_second_p95": _quantile(speeds, 0.95),
        "step_seconds": _quantile(_values(steps, "step_seconds"), 0.5),
        "model_tflops_per_device": _quantile(_values(steps, "model_tflops_per_device"), 0.5),
        "peak_memory_bytes": int(max(memory)) if memory else None,
    }


TIME_PARTS = {
    "data_seconds": "data",
    "forward_backward_seconds": "forward and backward",
    "communication_seconds": "communication",
    "optimizer_seconds": "optimizer",
}
"""Field of a `step` event → what it is called; the fields do not overlap."""


def step_times(training: LoggedTraining, role: str) -> dict[str, Any]:
    """One table row: where a step's time went on rank 0, medians over the steps after warm-up.

    Columns: `role`, `layout`, `step_seconds`, those of `TIME_PARTS` (None where not recorded, as
    communication is on an accelerator) and `other_seconds`, the rest of the step.
    """
    steps = training.steps[math.floor(WARM_UP_FRACTION * len(training.steps)) :]
    whole = _quantile(_values(steps, "step_seconds"), 0.5)
    parts = {name: _quantile(_values(steps, name), 0.5) for name in TIME_PARTS}
    known = sum(value for value in parts.values() if value is not None)
    return {
        "role": role,
        "layout": training.start["layout"],
        "step_seconds": whole,
        **parts,
        # Medians of parts need not add up to the median of the whole.
        "other_seconds": max(0.0, whole - known) if whole is not None else None,
    }


def throughput_ratio(reference: dict[str, Any], candidate: dict[str, Any]) -> float | None:
    """Candidate ÷ reference in tokens per second and device; above 1 the candidate is faster."""
    key = "tokens_per_second_per_device"
    if not reference[key] or candidate[key] is None:
        return None
    return candidate[key] / reference[key]


def _values(steps: list[dict[str, Any]], key: str) -> list[float]:
    return [step[key] for step in steps if step.get(key) is not None]


def _quantile(values: list[float], fraction: float) -> float | None:
    return float(np.quantile(values, fraction)) if values else None
