"""Published throughput, computed again: what each column should be, by which FLOP convention the
TFLOPs were counted, which share of the peak they are, and which cells contradict their row."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from internlm_lib.experiment.presets import PRESETS
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.model.arithmetic import (
    CONVENTIONS,
    ascendspeed_flops_per_token,
    internevo_flops_per_token,
    tflops_per_device,
    training_flops_per_token,
)
from internlm_lib.published import (
    Peak,
    PublishedRow,
    mfu,
    peak_candidates,
    throughput_row,
    throughput_rows,
)
from internlm_lib.published.tables import UNKNOWN, Column
from internlm_lib.reporting.readings import (
    Contradiction,
    Span,
    contradictions,
    derived_columns,
    half_digit,
    row_speed,
)

FORMULAS: dict[str, Callable[[ModelSection, int], float]] = {
    **{
        name: partial(training_flops_per_token, attention=attention, recompute=recompute)
        for name, (attention, recompute) in CONVENTIONS.items()
    },
    "AscendSpeed": ascendspeed_flops_per_token,
    "AscendSpeed, full recompute": partial(
        ascendspeed_flops_per_token, checkpoint_activations=True
    ),
    "InternEvo": internevo_flops_per_token,
}
"""Convention → FLOPs of one token in training, of (model, sequence length)."""

MODEL_FORMULAS = (
    *(name for name, (_, recompute) in CONVENTIONS.items() if recompute is None),
    "AscendSpeed",
    "InternEvo",
)
"""Those that count no recomputation: an MFU can be built on them."""

TFLOPS_AGREE = 0.01
"""Relative difference up to which printed TFLOPs agree with a convention: a padded vocabulary and
the rounding of the speed make less, another convention mostly more."""


@dataclass(frozen=True)
class Fit:
    """How a convention meets the printed TFLOPs."""

    convention: str
    tflops: float
    error: float
    """printed ÷ tflops − 1."""


@dataclass(frozen=True)
class RederivedRow:
    """A published row and what follows from it; empty where the row does not tell enough."""

    row: PublishedRow
    derived: dict[Column, float]
    """Every column of speed, at the speed that most cells agree on."""
    tflops: dict[str, float]
    """TFLOPs per device at that speed, by convention."""
    best_convention: Fit | None
    """The convention that is nearest to the printed TFLOPs."""
    own_convention: Fit | None
    """The publisher's own, where its code or page gives it."""
    mfu: list[dict[str, Any]]
    """For each peak the device may have: that peak and `mfu` by convention, from 0 to 1. More than
    one where its name is shared: then the MFU is known as a range only."""
    ratio_to_reference: float | None
    """Speed ÷ speed of the row it is compared with."""
    contradictions: list[Contradiction]

    def as_dict(self) -> dict[str, Any]:
        """Everything as values that JSON can hold, the row's own fields at the top level."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "row"}
        plain = {
            "best_convention": self.best_convention and asdict(self.best_convention),
            "own_convention": self.own_convention and asdict(self.own_convention),
            "contradictions": [asdict(found) for found in self.contradictions],
        }
        return self.row.model_dump() | own | plain


def published_table() -> list[dict[str, Any]]:
    """All published rows with what follows from them: see `RederivedRow`; JSON-serialisable."""
    return [rederive(row).as_dict() for row in throughput_rows()]


def rederive(row: PublishedRow) -> RederivedRow:
    """Compute a row again from its own cells.

    Raises InputError if its speed would be more than the device's peak.
    """
    speed = row_speed(row)
    flops = _flops_per_token(row)
    tflops = {}
    if speed is not None:
        tflops = {name: tflops_per_device(speed.speed, each) for name, each in flops.items()}
    fits = _fits(row, tflops)
    best = min(fits.values(), key=lambda fit: abs(fit.error), default=None)
    own = fits.get(row.flops_convention)
    found = contradictions(row, speed) if speed is not None else []
    if best is not None and speed is not None:
        found += _tflops_contradictions(row, own or best, best, speed)
    return RederivedRow(
        row=row,
        derived=derived_columns(row, speed.speed) if speed is not None else {},
        tflops=tflops,
        best_convention=best,
        own_convention=own,
        mfu=_utilisations(row, speed, flops),
        ratio_to_reference=_ratio(row, speed),
        contradictions=found,
    )


def model_of(row: PublishedRow) -> ModelSection | None:
    """The row's model, if it has InternLM's layers; else no FLOP formula holds."""
    if row.shape is not None:
        shape = PRESETS["internlm-7b"] | row.shape.model_dump()
        return ModelSection(preset=row.model, **shape)
    return ModelSection(preset=row.model, **PRESETS[row.model]) if row.model in PRESETS else None


def _flops_per_token(row: PublishedRow) -> dict[str, float]:
    model = model_of(row)
    if model is None or row.seq_length is None:
        return {}
    return {name: formula(model, row.seq_length) for name, formula in FORMULAS.items()}


def _fits(row: PublishedRow, tflops: dict[str, float]) -> dict[str, Fit]:
    if "tflops_per_device" not in row.printed:
        return {}
    printed = float(row.printed["tflops_per_device"])
    return {name: Fit(name, value, printed / value - 1) for name, value in tflops.items()}


def _tflops_contradictions(
    row: PublishedRow, expected: Fit, best: Fit, speed: Span
) -> list[Contradiction]:
    """Printed TFLOPs that the publisher's convention (or, if unknown, none) gives at this speed."""
    text = row.printed["tflops_per_device"]
    printed = float(text)
    digits = half_digit(text) / printed
    if abs(expected.error) <= max(TFLOPS_AGREE, digits):
        return []
    fitting = speed.speed * printed / expected.tflops
    why = (
        f"{expected.convention} gives {expected.tflops:.5g} at {speed.speed:.5g} tokens/s/device,"
        f" and {text} at {fitting:.5g}; nearest is {best.convention} ({best.error:+.1%})"
    )
    fits, off = expected.tflops, expected.error
    return [Contradiction("tflops_per_device", text, fits, off, "value", why)]


def _utilisations(
    row: PublishedRow, speed: Span | None, flops: dict[str, float]
) -> list[dict[str, Any]]:
    if speed is None or not flops or row.device is None or row.precision == UNKNOWN:
        return []

    def utilisation(peak: Peak) -> dict[str, Any]:
        shares = {name: mfu(speed.speed, flops[name], peak) for name in MODEL_FORMULAS}
        return {"peak": peak.model_dump(), "mfu": shares}

    return [utilisation(peak) for peak in peak_candidates(row.device, row.precision)]


def _ratio(row: PublishedRow, speed: Span | None) -> float | None:
    if row.reference is None or speed is None:
        return None
    reference = row_speed(throughput_row(row.reference))
    return speed.speed / reference.speed if reference is not None else None


_INTERNEVO_ENDS = ("internevo-tp1-zero8-8", "internevo-tp1-zero8-1024")


def beside_rows() -> list[dict[str, Any]]:
    """What a comparison is shown beside: InternLM's own rows, and the best of each device, one
    table row each; of InternEvo's scaling tables the ends of the row that scales best."""
    return [
        {
            "row": row["name"],
            "device": row["device"] or "not named",
            "devices": row["devices"],
            "tokens_per_second_per_device": row["derived"].get("tokens_per_second_per_device"),
            "step_seconds": row["derived"].get("seconds_per_step"),
            "tflops_as_printed": row["printed"].get("tflops_per_device"),
            "which_are": (row["best_convention"] or {}).get("convention"),
            "to_its_reference": row["ratio_to_reference"],
            "contradictions": "; ".join(
                f"{found['column'].replace('_', ' ')} {found['printed']} {found['why']}"
                for found in row["contradictions"]
            ),
        }
        for row in published_table()
        if not row["name"].startswith("internevo") or row["name"] in _INTERNEVO_ENDS
    ]
