"""One quantity of two trainings, step by step: its errors and their statistics."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internlm_lib.reporting import interval
from internlm_lib.reporting.decimation import rolling_mean, smoothing_width
from internlm_lib.reporting.interval import Estimate
from internlm_lib.reporting.pairing import Pairing
from internlm_lib.reporting.training import Floats

CONFIDENCE = 0.95
LATE_FRACTION = 0.2
"""Share of the steps, the last ones, whose trend is looked at."""


@dataclass(frozen=True)
class Differences:
    """One quantity of two trainings, step by step; steps without a sound value are left out."""

    steps: NDArray[np.int64]
    reference: Floats
    candidate: Floats

    @cached_property
    def signed(self) -> Floats:
        """(c - r) / r per step [n]."""
        return (self.candidate - self.reference) / self.reference

    @cached_property
    def relative(self) -> Floats:
        """|c - r| / r per step [n]."""
        return np.abs(self.signed)

    @cached_property
    def absolute(self) -> Floats:
        """|c - r| per step [n], in the quantity's own unit."""
        return np.abs(self.candidate - self.reference)

    @cached_property
    def smoothed(self) -> Floats:
        """The signed error, averaged over neighbours in a window of 1/100 of the steps [n]."""
        return rolling_mean(self.signed, smoothing_width(len(self.steps)))

    @cached_property
    def bias(self) -> Estimate:
        """Mean signed error."""
        return interval.mean(self.signed)

    @cached_property
    def late(self) -> Estimate:
        """Trend of the signed error per step, over the last `LATE_FRACTION` of the steps."""
        return interval.slope(self.signed[-self.late_steps :])

    @property
    def late_steps(self) -> int:
        return max(1, round(LATE_FRACTION * len(self.steps)))

    def statistics(self) -> dict[str, Any]:
        """The numbers of this quantity as JSON; None where there are too few steps."""
        if not len(self.steps):
            return dict.fromkeys(_STATISTICS)
        worst, farthest = int(self.relative.argmax()), int(self.absolute.argmax())
        return {
            "mean_relative_error": float(self.relative.mean()),
            "max_relative_error": float(self.relative[worst]),
            "max_relative_error_step": int(self.steps[worst]),
            "max_absolute_error": float(self.absolute[farthest]),
            "max_absolute_error_step": int(self.steps[farthest]),
            "signed_mean": self.bias.value,
            "signed_mean_ci95": _pair(self.bias.interval(CONFIDENCE)),
            "detectable_bias": _number(self.bias.detectable(CONFIDENCE)),
            "late_slope": _number(self.late.value),
            "late_slope_ci95": _pair(self.late.interval(CONFIDENCE)),
            "late_steps": self.late_steps,
        }


_STATISTICS = (
    "mean_relative_error", "max_relative_error", "max_relative_error_step", "max_absolute_error",
    "max_absolute_error_step", "signed_mean", "signed_mean_ci95", "detectable_bias", "late_slope",
    "late_slope_ci95", "late_steps",
)  # fmt: skip


def differences(pairing: Pairing, column: str) -> Differences:
    ours, theirs = pairing.values(column)
    sound = np.isfinite(ours) & np.isfinite(theirs) & (ours != 0)
    return Differences(pairing.steps[sound], ours[sound], theirs[sound])


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _pair(values: tuple[float, float]) -> list[float] | None:
    return list(values) if all(math.isfinite(value) for value in values) else None
