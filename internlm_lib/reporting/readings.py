"""One speed, claimed several times: the cells of a published row held against each other.

Samples per second, tokens per second and seconds per step are one speed in different units. Every
cell is read as it is labelled, and as it might have been meant; the speed that most cells agree on
is the row's, and a cell that does not give it as it is labelled contradicts its row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from internlm_lib.published import PublishedRow
from internlm_lib.published.tables import COLUMNS, Column

AVERAGING = 0.005
"""Relative difference up to which two cells can be one run's: one is often a mean over the run and
the other its last step. The digits of a contradiction are still told."""

Kind = Literal["unit", "value", "digits"]


@dataclass(frozen=True)
class Unit:
    """What a number means: tokens/s/device = factor × value ** power."""

    meaning: str
    factor: float
    power: Literal[1, -1] = 1

    def speed(self, value: float) -> float:
        return self.factor * value**self.power

    def value(self, speed: float) -> float:
        return (speed / self.factor) ** self.power


@dataclass(frozen=True)
class Span:
    """A speed in tokens/s/device, and between which it may lie given the printed digits."""

    low: float
    speed: float
    high: float

    def holds(self, speed: float) -> bool:
        return self.low <= speed <= self.high

    def overlaps(self, other: "Span") -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Reading:
    """A cell, read in one unit."""

    column: Column
    unit: Unit
    as_labelled: bool
    span: Span

    def near(self, speed: float) -> bool:
        return abs(self.span.speed / speed - 1) <= AVERAGING or self.span.holds(speed)


@dataclass(frozen=True)
class Contradiction:
    """A cell that cannot hold with the rest of its row under its label."""

    column: Column
    printed: str
    fits: float
    """The value that the rest of the row gives it, in the unit of its label."""
    off: float
    """printed ÷ fits − 1."""
    kind: Kind
    """unit: true under another label; value: under none; digits: within `AVERAGING`."""
    why: str


def row_speed(row: PublishedRow) -> Span | None:
    """The speed that most cells of a row agree on; None if no cell tells a speed.

    Of equally many, the one that more cells give to the digit as they are labelled, then that of
    the first of `COLUMNS`.
    """
    readings = list(_readings(row))
    if not readings:
        return None

    def agreement(speed: float) -> tuple[int, int]:
        near = {reading.column for reading in readings if reading.near(speed)}
        return len(near), sum(r.as_labelled and r.span.holds(speed) for r in readings)

    # Where spans overlap most, one of them begins.
    best = max((s for r in readings for s in (r.span.speed, r.span.low)), key=agreement)
    spans = [r.span for r in readings if r.span.holds(best)]
    low, high = max(span.low for span in spans), min(span.high for span in spans)
    printed = (span.speed for span in spans if low <= span.speed <= high)
    return Span(low, next(printed, (low + high) / 2), high)


def derived_columns(row: PublishedRow, speed: float) -> dict[Column, float]:
    """What every column would be at that speed in tokens/s/device, where the row tells enough."""
    return {c: units[0].value(speed) for c in COLUMNS if (units := units_of(c, row))}


def contradictions(row: PublishedRow, speed: Span) -> list[Contradiction]:
    """Cells of speed that do not give the row's speed as they are labelled, by `COLUMNS`."""
    cells: dict[Column, list[Reading]] = {}
    for reading in _readings(row):
        cells.setdefault(reading.column, []).append(reading)
    return [
        _contradiction(row.printed[column], readings, speed)
        for column, readings in cells.items()
        if not readings[0].span.overlaps(speed)
    ]


def units_of(column: Column, row: PublishedRow) -> list[Unit]:
    """As which units a column can be read, that of its label first; none where the row does not
    tell enough."""
    devices, seq, batch = row.devices, row.seq_length, row.global_batch_size
    if column == "tokens_per_second_per_device":
        cluster = [Unit("tokens/s of the cluster", 1 / devices)] if devices else []
        return [Unit("tokens/s/device", 1), *cluster]
    if column == "tokens_per_second" and devices:
        return [Unit("tokens/s", 1 / devices), Unit("tokens/s of one device", 1)]
    if column == "samples_per_second_per_device" and seq and devices:
        return [Unit("samples/s/device", seq), Unit("samples/s of the cluster", seq / devices)]
    if column == "samples_per_second" and seq and devices:
        return [Unit("samples/s", seq / devices), Unit("samples/s of one device", seq)]
    if column == "seconds_per_step" and seq and devices and batch:
        tokens = batch * seq / devices
        return [
            Unit("seconds", tokens, -1),
            Unit("milliseconds", 1000 * tokens, -1),
            Unit(f"seconds for {batch // 2} sequences, where {batch} are given", tokens / 2, -1),
            Unit(f"seconds for {2 * batch} sequences, where {batch} are given", tokens * 2, -1),
        ]
    return []


def half_digit(printed: str) -> float:
    """Half a unit of the last printed digit: "13.000" → 0.0005."""
    exponent = Decimal(printed).as_tuple().exponent
    assert isinstance(exponent, int), f"{printed} is not finite"
    return 0.5 * 10.0**exponent


def _readings(row: PublishedRow) -> Iterator[Reading]:
    for column in COLUMNS:
        if column in row.printed:
            value, half = float(row.printed[column]), half_digit(row.printed[column])
            for i, unit in enumerate(units_of(column, row)):
                low, high = sorted([unit.speed(value - half), unit.speed(value + half)])
                yield Reading(column, unit, i == 0, Span(low, unit.speed(value), high))


def _contradiction(printed: str, readings: list[Reading], speed: Span) -> Contradiction:
    label, *others = readings
    fits = label.unit.value(speed.speed)
    off = float(printed) / fits - 1
    meant = next((reading.unit for reading in others if reading.near(speed.speed)), None)
    kind: Kind = "value"
    why = f"the rest of its row gives {fits:.5g} {label.unit.meaning}"
    if abs(off) <= AVERAGING:
        kind, why = "digits", f"off by {off:+.2%}, more than its digits allow: {why}"
    elif meant is not None:
        kind, exact = "unit", meant.value(speed.speed)
        why = f"holds as {meant.meaning} (the row gives {exact:.5g}), not as {label.unit.meaning}"
    return Contradiction(label.column, printed, fits, off, kind, why)
