"""The statistics that hold two trainings' losses against each other, and their verdict."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from internlm_lib.errors import InputError, NotComparableError
from internlm_lib.journal import events, training_steps

Floats = NDArray[np.float64]
Verdict = Literal["pass", "fail", "not compared"]

IDENTITY_TAGS = ("config_sha256", "data_sha256", "weights_sha256")
"""Hashes of a training's `start` event that must agree where both trainings have them."""

_LATE_FRACTION = 0.1


@dataclass(frozen=True)
class LoggedTraining:
    """What a training's journal says: its newest `start` event and the steps in force."""

    name: str
    """For legends and tables, e.g. `candidate: megatron TP2 PP1 DP1 SP, cpu`."""
    start: dict[str, Any]
    steps: list[dict[str, Any]]

    @property
    def numbers(self) -> NDArray[np.int64]:
        """Step numbers [n]."""
        return np.array([step["step"] for step in self.steps], dtype=np.int64)

    @property
    def losses(self) -> Floats:
        """Loss per step [n], nats per token; NaN where a step recorded none."""
        values = [step["loss"] for step in self.steps]
        return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


@dataclass(frozen=True)
class LossComparison:
    """Differences of the candidate from the reference, step by step and in sum."""

    steps: NDArray[np.int64]
    reference: Floats
    candidate: Floats
    tolerance: float
    """Mean relative error up to which the verdict is "pass"."""
    broken: str
    """Why no statistics exist: a loss that is NaN, infinite or zero; empty if all are sound."""

    @property
    def absolute_errors(self) -> Floats:
        """|c - r| per step [n], nats per token."""
        return np.abs(self.candidate - self.reference)

    @property
    def signed_errors(self) -> Floats:
        """(c - r) / r per step [n]."""
        return (self.candidate - self.reference) / self.reference

    @property
    def relative_errors(self) -> Floats:
        """|c - r| / r per step [n]."""
        return np.abs(self.signed_errors)

    @property
    def verdict(self) -> Verdict:
        sound = not self.broken and self.statistics()["mean_relative_error"] <= self.tolerance
        return "pass" if sound else "fail"

    def statistics(self) -> dict[str, float]:
        """All numbers of the comparison; NaN throughout if a loss is broken.

        The first three are the predecessor's. The signed mean shows a bias, and the mean over the
        last tenth of the steps a late drift, both of which a mean of absolute values can hide.
        """
        late = max(1, round(_LATE_FRACTION * len(self.steps)))
        relative = self.relative_errors
        values = {
            "mean_relative_error": relative.mean(),
            "max_relative_error": relative.max(),
            "max_absolute_error": self.absolute_errors.max(),
            "mean_signed_error": self.signed_errors.mean(),
            "late_mean_relative_error": relative[-late:].mean(),
        }
        return {name: np.nan if self.broken else float(value) for name, value in values.items()}


def read_training(journal: Path, name: str) -> LoggedTraining:
    """Read a training's journal; `name` says which one it is, e.g. "candidate".

    Raises InputError if it holds no start or no step.
    """
    starts, steps = events(journal, "start"), training_steps(journal)
    if not starts or not steps:
        raise InputError(
            f"{journal}: the {name} training recorded no step; run notebooks/03_train.ipynb again "
            f"and see {journal.parent / 'logs'} if it fails"
        )
    start = starts[-1]
    return LoggedTraining(f"{name}: {start['layout']}, {start['device']}", start, steps)


def compare_losses(
    reference: LoggedTraining, candidate: LoggedTraining, tolerance: float
) -> LossComparison:
    """Raises NotComparableError, listing why, if these are not two runs of one experiment."""
    if differences := find_differences(reference, candidate):
        raise NotComparableError(
            "these two trainings are not the same experiment, so their losses say nothing about "
            "each other; train both from one params file, data and weights:\n  - "
            + "\n  - ".join(differences)
        )
    problems = [*_broken_losses("reference", reference), *_broken_losses("candidate", candidate)]
    return LossComparison(
        steps=candidate.numbers,
        reference=reference.losses,
        candidate=candidate.losses,
        tolerance=tolerance,
        broken="; ".join(problems),
    )


def find_differences(reference: LoggedTraining, candidate: LoggedTraining) -> list[str]:
    """What keeps two trainings from being compared, one line each; empty if nothing does."""
    differences = []
    for key in ("tokens_per_step", "train_iters"):
        differences += _difference(key, reference.start.get(key), candidate.start.get(key))
    ours, theirs = reference.start.get("tags", {}), candidate.start.get("tags", {})
    for tag in IDENTITY_TAGS:
        if tag in ours and tag in theirs:
            differences += _difference(tag, ours[tag], theirs[tag])
    if not np.array_equal(reference.numbers, candidate.numbers):
        differences += [
            f"steps: {_span('reference', reference)}, {_span('candidate', candidate)}; "
            "finish the shorter training (03_train)"
        ]
    return differences


def _difference(key: str, reference: Any, candidate: Any) -> list[str]:
    if reference == candidate:
        return []
    return [f"{key}: reference {reference}, candidate {candidate}"]


def _span(name: str, training: LoggedTraining) -> str:
    numbers = training.numbers
    return f"{name} has {len(numbers)} ({numbers[0]} to {numbers[-1]})"


def _broken_losses(name: str, training: LoggedTraining) -> list[str]:
    """A sentence about the first loss that no relative error can be taken of, if any."""
    losses = training.losses
    bad = np.flatnonzero(~np.isfinite(losses) | (losses == 0))
    if not len(bad):
        return []
    first = bad[0]
    return [
        f"the {name}'s loss is {losses[first]:g} at step {training.numbers[first]} "
        f"({len(bad)} of {len(losses)} steps are NaN, infinite or zero)"
    ]
