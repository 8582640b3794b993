"""What a check is: a figure that must not be above its tolerance."""

import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Group = Literal["kernels", "collectives", "memory", "rates", "parity"]


@dataclass(frozen=True)
class Outcome:
    """What a check found."""

    figure: float
    measured: Mapping[str, float] = field(default_factory=dict)
    """What was measured on the way and has no tolerance, by name with its unit."""


@dataclass(frozen=True)
class Check:
    """Something to find out on this rank's device. Every rank has the same checks, in one order."""

    group: Group
    name: str
    unit: str
    """Of the figure."""
    tolerance: float
    find: Callable[[], Outcome]


@dataclass(frozen=True)
class Row:
    """One check, done: as it stands in the table."""

    group: str
    name: str
    figure: float | None
    """None if the check ran into an error."""
    tolerance: float
    unit: str
    passed: bool
    rank: int
    """Whose figure it is: of all ranks', the worst is kept."""
    measured: Mapping[str, float]
    seconds: float
    error: str = ""


def carry_out(check: Check, rank: int) -> Row:
    """Do a check; an error in it makes it a failed one. A figure that is NaN fails, too."""
    begin, outcome, error = time.perf_counter(), None, ""
    try:
        outcome = check.find()
    except Exception:  # a missing operator must not hide what the others do
        error = traceback.format_exc(limit=-3)
    return Row(
        group=check.group,
        name=check.name,
        figure=outcome.figure if outcome else None,
        tolerance=check.tolerance,
        unit=check.unit,
        passed=outcome is not None and outcome.figure <= check.tolerance,
        rank=rank,
        measured=outcome.measured if outcome else {},
        seconds=time.perf_counter() - begin,
        error=error,
    )


def worst_of_ranks(ranks: Sequence[Iterable[Row]]) -> list[Row]:
    """Of every check the rank that came off worst: one that failed, else the largest figure."""
    return [max(rows, key=_badness) for rows in zip(*ranks, strict=True)]


def _badness(row: Row) -> tuple[bool, float]:
    return not row.passed, row.figure if row.passed and row.figure is not None else 0.0


def as_values(row: Row) -> dict[str, Any]:
    """The row as JSON."""
    return asdict(row)
