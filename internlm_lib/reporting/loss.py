"""The statistics that hold two trainings' losses against each other, and their verdict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from internlm_lib.reporting import interval
from internlm_lib.reporting.differences import CONFIDENCE, Differences, differences
from internlm_lib.reporting.identity import Fact, compare_identity, decisive, unknown
from internlm_lib.reporting.pairing import Pairing, pair
from internlm_lib.reporting.training import LoggedTraining

Verdict = Literal["pass", "fail", "inconclusive", "not-comparable"]

_DRIFT_CONFIDENCE = 0.975
"""A drift is extrapolated, so it must be surer than what is only reported."""
_STAYS_OUT = 20
_SUSPECT_CORRELATION = 0.3
_MIN_STEPS_FOR_CORRELATION = 50


@dataclass(frozen=True)
class LossComparison:
    """Differences of the candidate from the reference, and what follows from them."""

    pairing: Pairing
    facts: list[Fact]
    loss: Differences
    grad_norm: Differences
    broken: str
    """A loss that no relative error can be taken of: which, where, how many; empty if none."""
    tolerance: float
    """Up to it the mean relative error, and the whole interval of the bias, must lie."""
    noise_floor: float | None
    """Mean relative error between repeats on one device, if there are any."""
    forced: bool
    """Compare although the trainings are not the same experiment."""

    @property
    def steps(self) -> NDArray[np.int64]:
        return self.loss.steps

    @cached_property
    def judgement(self) -> tuple[Verdict, list[str]]:
        """The verdict and its reasons, the decisive ones first."""
        if (why := decisive(self.facts)) and not self.forced:
            return "not-comparable", why
        verdict, reasons = _judge(self)
        return verdict, [*reasons, *why, *self._remarks()]

    @property
    def verdict(self) -> Verdict:
        return self.judgement[0]

    @property
    def reasons(self) -> list[str]:
        return self.judgement[1]

    @property
    def noise_ratio(self) -> float | None:
        """Mean relative error by that between repeats on one device; near 1: no difference."""
        if not self.noise_floor or not len(self.steps):
            return None
        return float(self.loss.relative.mean()) / self.noise_floor

    @cached_property
    def band_left_step(self) -> int | None:
        """First step from which on the smoothed error stays outside the tolerance, to the end and
        for 1/20 of the steps at least: the last ones may be outside by chance."""
        inside = np.flatnonzero(np.abs(self.loss.smoothed) <= self.tolerance)
        first = int(inside[-1]) + 1 if len(inside) else 0
        outside = len(self.steps) - first
        return int(self.steps[first]) if outside > len(self.steps) / _STAYS_OUT else None

    @cached_property
    def correlation(self) -> float | None:
        """Of both losses' changes from step to step: the same batches move both alike."""
        if len(self.steps) < _MIN_STEPS_FOR_CORRELATION:
            return None
        ours, theirs = np.diff(self.loss.reference), np.diff(self.loss.candidate)
        if not ours.std() or not theirs.std():
            return None
        return float(np.corrcoef(ours, theirs)[0, 1])

    def statistics(self) -> dict[str, Any]:
        """All numbers of the comparison as JSON; None where there are too few steps."""
        return {
            "steps": len(self.steps),
            **self.loss.statistics(),
            "band_left_step": self.band_left_step,
            "steps_outside": int((self.loss.relative > self.tolerance).sum()),
            "noise_floor": self.noise_floor,
            "noise_ratio": self.noise_ratio,
            "correlation": self.correlation,
        }

    def _remarks(self) -> list[str]:
        """What does not decide, and what a reader must know."""
        remarks = list(self.pairing.notes)
        if trusted := unknown(self.facts):
            remarks.append(f"taken on trust, as not both sides recorded it: {', '.join(trusted)}")
        bias = self.loss.bias
        if bias.freedom and bias.excludes_zero(CONFIDENCE) and not self.broken:
            side = "above" if bias.value > 0 else "below"
            remarks.append(
                f"the candidate lies {side} the reference by {abs(bias.value):.2g} on average, "
                f"and that is no chance (95 % interval {_range(bias.interval(CONFIDENCE))})"
            )
        outside = int((self.loss.relative > self.tolerance).sum())
        if outside and self.band_left_step is None:
            remarks.append(
                f"{outside} of {len(self.steps)} steps leave the tolerance and come back; the "
                f"largest error is {self.loss.relative.max():.2g} at step "
                f"{self.steps[self.loss.relative.argmax()]}"
            )
        return remarks


def compare_losses(
    reference: LoggedTraining,
    candidate: LoggedTraining,
    tolerance: float,
    *,
    repeats: Sequence[LoggedTraining] = (),
    force: bool = False,
) -> LossComparison:
    """Hold a candidate's losses against a reference's.

    Args:
        repeats: trainings of the same experiment on one device, two or more: the noise floor.
        force: give a verdict on the losses although the experiments differ.
    Raises:
        NotComparableError: the trainings have no step in common.
    """
    pairing = pair(reference, candidate)
    return LossComparison(
        pairing=pairing,
        facts=compare_identity(reference, candidate),
        loss=differences(pairing, "loss"),
        grad_norm=differences(pairing, "grad_norm"),
        broken=_broken(pairing),
        tolerance=tolerance,
        noise_floor=noise_floor(repeats),
        forced=force,
    )


def noise_floor(repeats: Sequence[LoggedTraining]) -> float | None:
    """Mean over all pairs of repeats of their mean relative error; None below two repeats."""
    pairs = [differences(pair(one, other), "loss") for one, other in combinations(repeats, 2)]
    return float(np.mean([found.relative.mean() for found in pairs])) if pairs else None


def _judge(comparison: LossComparison) -> tuple[Verdict, list[str]]:
    """The verdict on losses that may be compared, and what decided it."""
    if comparison.broken:
        return "fail", [comparison.broken]
    loss, tolerance = comparison.loss, comparison.tolerance
    if not len(loss.steps):
        return "inconclusive", ["no step has a loss in both trainings"]
    mean, bias = float(loss.relative.mean()), loss.bias
    low, high = bias.interval(CONFIDENCE)
    if mean > tolerance and _order_differs(comparison):
        return "not-comparable", [
            f"the losses do not move together from step to step (correlation "
            f"{comparison.correlation:.2f}): the order of the data differs, and their mean "
            f"relative error of {mean:.2g} says nothing"
        ]
    failures = []
    if mean > tolerance:
        failures.append(f"the mean relative error {mean:.3g} is above the tolerance {tolerance:g}")
    if low > tolerance or high < -tolerance:
        failures.append(
            f"the bias is outside the tolerance: {bias.value:.3g}, 95 % interval "
            f"{_range((low, high))}"
        )
    if (left := comparison.band_left_step) is not None and not failures:
        failures.append(f"from step {left} on the error stays outside the tolerance {tolerance:g}")
    if failures:
        return "fail", failures
    return _equivalence(comparison, low, high)


def _equivalence(comparison: LossComparison, low: float, high: float) -> tuple[Verdict, list[str]]:
    """Whether the data suffice to say that a comparison without a failure is a pass."""
    loss, tolerance = comparison.loss, comparison.tolerance
    if not loss.bias.freedom:
        return "inconclusive", [
            f"too few steps for an interval of the bias: {len(loss.steps)}, and "
            f"{interval.MIN_POINTS} are needed"
        ]
    if low < -tolerance or high > tolerance:
        return "inconclusive", [
            f"the bias is not known well enough: its 95 % interval {_range((low, high))} reaches "
            f"beyond the tolerance {tolerance:g}; compare more steps"
        ]
    if (ahead := _steps_to_tolerance(loss, tolerance)) is not None:
        return "inconclusive", [
            f"the error drifts over the last {loss.late_steps} steps ({loss.late.value:.2g} per "
            f"step), and would leave the tolerance after {ahead:,.0f} more; train longer"
        ]
    return "pass", [
        f"mean relative error {loss.relative.mean():.3g} within {tolerance:g}; bias "
        f"{loss.bias.value:.2g}, 95 % interval {_range((low, high))}; a bias of "
        f"{loss.bias.detectable(CONFIDENCE):.2g} would have been seen"
    ]


def _steps_to_tolerance(loss: Differences, tolerance: float) -> float | None:
    """Steps after which a drift that is no chance leaves the tolerance, if as many as the training
    had already are enough."""
    drift = loss.late
    if not drift.freedom or not drift.excludes_zero(_DRIFT_CONFIDENCE):
        return None
    level = float(loss.signed[-loss.late_steps :].mean()) + drift.value * loss.late_steps / 2
    ahead = (math.copysign(tolerance, drift.value) - level) / drift.value
    return ahead if ahead <= len(loss.steps) else None


def _order_differs(comparison: LossComparison) -> bool:
    """Whether the losses move on their own, and around each other: other batches, not a bias."""
    correlation = comparison.correlation
    low, high = comparison.loss.bias.interval(CONFIDENCE)
    around = low <= 0 <= high or max(abs(low), abs(high)) <= comparison.tolerance
    return correlation is not None and correlation < _SUSPECT_CORRELATION and around


def _broken(pairing: Pairing) -> str:
    """Sentences about losses that are NaN, infinite or zero and were not skipped, if any."""
    skipped = [values > 0 for values in pairing.values("skipped")]
    parts = []
    names = ("reference", "candidate")
    for name, values, excused in zip(names, pairing.values("loss"), skipped, strict=True):
        bad = np.flatnonzero((~np.isfinite(values) | (values == 0)) & ~excused)
        if len(bad):
            parts.append(
                f"the {name}'s loss is {values[bad[0]]:g} at step {pairing.steps[bad[0]]} "
                f"({len(bad)} of {len(values)} steps are NaN, infinite, zero or missing)"
            )
    return "; ".join(parts)


def _range(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.2g} to {pair[1]:.2g}"
