"""Throughput of trainings, and of a candidate against its reference."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internlm_lib.experiment.schema import ModelSection
from internlm_lib.model.arithmetic import MODEL_FLOPS_CONVENTION, tflops_per_device
from internlm_lib.published import mfu, peak_candidates, peak_of
from internlm_lib.reporting.published import FORMULAS, MODEL_FORMULAS
from internlm_lib.reporting.training import Floats, LoggedTraining

WARM_UP_FRACTION = 0.1
"""Share of the first steps that is left out: they pay for compilation, caches and allocation."""

CONFIDENCE = 0.95
_BATCHES = 20
_MIN_BATCHES = 4

SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_size")
"""Of a model, what its FLOPs follow from."""


def convention_text(convention: str = MODEL_FLOPS_CONVENTION) -> str:
    """What the figures of a performance table are, in one sentence."""
    return (
        f"Medians over the steps after the first {WARM_UP_FRACTION:.0%}, without those whose time "
        f"contains evaluation or saving; TFLOPs count {convention}; per device, one process being "
        "one device."
    )


CONVENTION = convention_text()


def measured(training: LoggedTraining) -> NDArray[np.bool_]:
    """Steps [n] that count for speed: after warm-up, timed, and containing nothing but the step."""
    late = np.arange(len(training)) >= math.floor(WARM_UP_FRACTION * len(training))
    timed = np.isfinite(rates(training)) | np.isfinite(training.column("step_seconds"))
    found: NDArray[np.bool_] = late & timed & ~training.spoiled
    return found


def rates(training: LoggedTraining) -> Floats:
    """Tokens per second and device of each step [n]; NaN where not known.

    As recorded, else tokens per step by seconds per step and devices.
    """
    logged, devices = training.column("tokens_per_second_per_device"), training.start["world_size"]
    return np.where(np.isfinite(logged), logged, job_rates(training) / (devices or np.nan))


def job_rates(training: LoggedTraining) -> Floats:
    """Tokens per second of all devices together, of each step [n]; NaN where not known."""
    tokens = training.start["tokens_per_step"]
    found: Floats = (tokens or np.nan) / training.column("step_seconds")
    return found


def performance(
    training: LoggedTraining, role: str, convention: str = MODEL_FLOPS_CONVENTION
) -> dict[str, Any]:
    """One table row; medians over the steps of `measured`, None for what is not known.

    Args:
        convention: of `published.FORMULAS`. One that counts recomputation gives `hfu` instead of
            `mfu`, the hardware's FLOPs instead of the model's.
    Raises:
        InputError: more FLOPs than the device's peak: a wrong device, count or convention.
    """
    start, counted = training.start, measured(training)
    speed = _quantiles(rates(training)[counted])
    seconds = _quantiles(training.column("step_seconds")[counted])
    tokens, sequence = start["tokens_per_step"], start.get("seq_length")
    samples = _over(_over(tokens, sequence), seconds["median"])
    memory = training.column("memory_bytes")
    return {
        "role": role,
        "layout": start["layout"],
        "device": start.get("device_name"),
        "devices": start["world_size"],
        "steps": int(counted.sum()),
        "left_out_as_warm_up": math.floor(WARM_UP_FRACTION * len(training)),
        "left_out_as_spoiled": int(training.spoiled.sum()),
        "samples_per_second": samples,
        "samples_per_second_per_device": _over(samples, start["world_size"]),
        "tokens_per_second_per_device": speed["median"],
        "tokens_per_second_p5": speed["p5"],
        "tokens_per_second_p95": speed["p95"],
        "step_seconds": seconds["median"],
        "step_seconds_p5": seconds["p5"],
        "step_seconds_p95": seconds["p95"],
        "tflops_per_device": _tflops(training, speed["median"], convention),
        "flop_convention": convention,
        **_utilisation(training, speed["median"], convention),
        "peak_memory_bytes": int(np.nanmax(memory)) if np.isfinite(memory).any() else None,
    }


def speed_ratio(reference: LoggedTraining, candidate: LoggedTraining) -> dict[str, Any]:
    """Candidate ÷ reference in tokens per second; above 1 the candidate is faster.

    Returns:
        `ratio` of the medians, and `ratio_ci95`: Welch's interval of the logarithms of the medians
        of twenty stretches of each training, so that a slow hour counts as one and not as many
        steps. None where a speed, or enough steps, are missing. `ratio_of` says of what: where a
        log does not tell the number of devices, of the whole job's tokens per second.
    """
    for name, rate in (("tokens/s/device", rates), ("tokens/s of the whole job", job_rates)):
        ours, theirs = (_finite(rate(t)[measured(t)]) for t in (reference, candidate))
        if len(ours) and len(theirs):
            return {
                "ratio": float(np.median(theirs) / np.median(ours)),
                "ratio_ci95": _welch(_stretches(theirs), _stretches(ours)),
                "ratio_of": name,
            }
    return NO_RATIO


NO_RATIO = {"ratio": None, "ratio_ci95": None, "ratio_of": None}


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
    counted = measured(training)
    whole = _quantiles(training.column("step_seconds")[counted])["median"]
    parts = {n: _quantiles(training.column(n)[counted])["median"] for n in TIME_PARTS}
    known = sum(value for value in parts.values() if value is not None)
    return {
        "role": role,
        "layout": training.start["layout"],
        "step_seconds": whole,
        **parts,
        # Medians of parts need not add up to the median of the whole.
        "other_seconds": max(0.0, whole - known) if whole is not None else None,
    }


def conventions(training: LoggedTraining) -> list[dict[str, Any]]:
    """The same speed under every convention of FLOPs, one table row each; empty without a model."""
    speed = _quantiles(rates(training)[measured(training)])["median"]
    rows = ((name, _tflops(training, speed, name)) for name in FORMULAS)
    return [{"convention": n, "tflops_per_device": v} for n, v in rows if v is not None]


def _tflops(training: LoggedTraining, speed: float | None, convention: str) -> float | None:
    """By the model's shape if the training tells it; else as it was recorded."""
    flops = _flops_per_token(training, convention)
    if speed is not None and flops is not None:
        return tflops_per_device(speed, flops)
    if convention != MODEL_FLOPS_CONVENTION:
        return None
    return _quantiles(training.column("model_tflops_per_device")[measured(training)])["median"]


def _utilisation(
    training: LoggedTraining, speed: float | None, convention: str
) -> dict[str, float | str | None]:
    """The share of the device's peak, and which peak that is."""
    device, precision = training.start.get("device_name"), training.start.get("precision")
    peak = peak_of(device or "", precision or "")
    flops = _flops_per_token(training, convention)
    share = None
    if peak is not None and speed is not None and flops is not None:
        share = mfu(speed, flops, peak)
    return {
        "mfu" if convention in MODEL_FORMULAS else "hfu": share,
        "peak_tflops": peak.tflops if peak else None,
        "peak_source": peak.source if peak else _no_peak(device or "", precision or ""),
    }


def _no_peak(device: str, precision: str) -> str:
    candidates = peak_candidates(device, precision)
    if not candidates:
        return "no peak is known of this device in this precision"
    names = ", ".join(f"{peak.device} {peak.tflops:g}" for peak in candidates)
    return f"the name fits several devices: {names} TFLOPs"


def _flops_per_token(training: LoggedTraining, convention: str) -> float | None:
    shape, sequence = training.start.get("model") or {}, training.start.get("seq_length")
    if sequence is None or any(shape.get(name) is None for name in SHAPE):
        return None
    return FORMULAS[convention](ModelSection.model_construct(**shape), sequence)


def _stretches(values: Floats) -> Floats:
    """Logarithms of the medians of contiguous parts of a series."""
    count = min(_BATCHES, len(values) // 2)
    parts = np.array_split(values, count) if count else []
    return np.log([np.median(part) for part in parts])


def _welch(candidate: Floats, reference: Floats) -> list[float] | None:
    from scipy import stats

    if min(len(candidate), len(reference)) < _MIN_BATCHES:
        return None
    test = stats.ttest_ind(candidate, reference, equal_var=False)
    low, high = test.confidence_interval(CONFIDENCE)
    return [math.exp(low), math.exp(high)] if math.isfinite(low) else None


def _quantiles(values: Floats) -> dict[str, float | None]:
    values = _finite(values)
    if not len(values):
        return {"median": None, "p5": None, "p95": None}
    return {
        name: float(np.quantile(values, fraction))
        for name, fraction in (("median", 0.5), ("p5", 0.05), ("p95", 0.95))
    }


def _finite(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _over(value: float | None, count: float | None) -> float | None:
    return value / count if value is not None and count else None
