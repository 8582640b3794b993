"""Which step of one training belongs to which of another."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from internlm_lib.errors import NotComparableError
from internlm_lib.reporting.training import Floats, LoggedTraining


@dataclass(frozen=True)
class Pairing:
    """Steps at which two trainings are held against each other."""

    reference: LoggedTraining
    candidate: LoggedTraining
    rows: NDArray[np.int64]
    """Rows of the candidate [n]."""
    places: Floats
    """Where in the reference each of them lies [n]: a row, or between two rows."""
    by: str
    """`step`, or `consumed tokens` where a step is not the same number of tokens in both."""
    notes: tuple[str, ...]
    """What is left out."""

    @property
    def steps(self) -> NDArray[np.int64]:
        """Step numbers of the candidate [n]."""
        return self.candidate.steps[self.rows]

    @property
    def tokens(self) -> Floats:
        """Tokens the candidate consumed up to each of them [n]; NaN if it does not say."""
        found = consumed_tokens(self.candidate)
        return np.full(len(self.rows), np.nan) if found is None else found[self.rows]

    def values(self, column: str) -> tuple[Floats, Floats]:
        """A column of the reference and of the candidate [n], NaN where one recorded none.

        Between two rows of the reference its values are joined by a straight line.
        """
        ours, low = self.reference.column(column), self.places.astype(np.int64)
        share = self.places - low
        high = np.minimum(low + 1, len(ours) - 1)
        with np.errstate(invalid="ignore"):  # of an infinite loss, 0 · inf
            between = ours[low] * (1 - share) + ours[high] * share
        joined = np.where(share == 0, ours[low], between)
        return joined, self.candidate.column(column)[self.rows]


def pair(reference: LoggedTraining, candidate: LoggedTraining) -> Pairing:
    """Pair by step; by consumed tokens where both know them and their steps differ in tokens.

    Raises NotComparableError if they have no step in common.
    """
    ours, theirs = (consumed_tokens(training) for training in (reference, candidate))
    if ours is not None and theirs is not None and _differ(reference, candidate):
        return _by_tokens(reference, candidate, ours, theirs)
    common, rows, places = np.intersect1d(
        candidate.steps, reference.steps, assume_unique=True, return_indices=True
    )
    if not len(common):
        raise NotComparableError(
            f"the trainings have no step in common: {_span(reference)} in the reference, "
            f"{_span(candidate)} in the candidate; give two logs of the same part of a training"
        )
    notes = (
        *_left_out("reference", reference, len(common)),
        *_left_out("candidate", candidate, len(common)),
    )
    return Pairing(reference, candidate, rows, places.astype(np.float64), "step", notes)


def _by_tokens(
    reference: LoggedTraining, candidate: LoggedTraining, ours: Floats, theirs: Floats
) -> Pairing:
    rows = np.flatnonzero((theirs >= ours[0]) & (theirs <= ours[-1]))
    if not len(rows):
        raise NotComparableError(
            f"the trainings saw no number of tokens in common: {ours[0]:,.0f} to {ours[-1]:,.0f} "
            f"in the reference, {theirs[0]:,.0f} to {theirs[-1]:,.0f} in the candidate"
        )
    places = np.interp(theirs[rows], ours, np.arange(len(ours)))
    note = "steps differ in tokens: the reference's loss is read off at the candidate's tokens"
    notes = (note, *_left_out("candidate", candidate, len(rows)))
    return Pairing(reference, candidate, rows, places, "consumed tokens", notes)


def consumed_tokens(training: LoggedTraining) -> Floats | None:
    """Tokens consumed after each step [n]; None if the training does not say."""
    logged = training.column("consumed_tokens")
    if np.isfinite(logged).all():
        return logged
    each = training.start.get("tokens_per_step")
    return None if each is None else training.steps.astype(np.float64) * each


def _differ(reference: LoggedTraining, candidate: LoggedTraining) -> bool:
    ours, theirs = (t.start.get("tokens_per_step") for t in (reference, candidate))
    return ours is not None and theirs is not None and ours != theirs


def _left_out(name: str, training: LoggedTraining, paired: int) -> list[str]:
    missing = len(training) - paired
    if not missing:
        return []
    return [f"{missing} of the {name}'s {len(training)} steps ({_span(training)}) have no partner"]


def _span(training: LoggedTraining) -> str:
    return f"steps {training.steps[0]} to {training.steps[-1]}"
