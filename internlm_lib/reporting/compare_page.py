"""`reports/<run>/compare.html`: a comparison's verdict and all that it rests on, in one file."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internlm_lib import provenance
from internlm_lib.files import write_text
from internlm_lib.reporting.html import environment
from internlm_lib.reporting.loss import LossComparison
from internlm_lib.reporting.training import LoggedTraining
from internlm_lib.run_folder import RunFolder

CAPTIONS = {
    "loss": (
        "Loss and relative error",
        "The dashed candidate lies on the reference if they agree; the error stays flat and below "
        "the tolerance. One that climbs from the first step on points to other arithmetic, a jump "
        "to other data.",
    ),
    "signed_error": (
        "Signed error",
        "A mean whose band leaves zero is a bias: one side is always higher. A trend in the shaded "
        "last part is a drift, which a longer training would turn into a failure.",
    ),
    "error_histogram": (
        "Distribution of the error",
        "Noise is narrow and centred on zero. A second hump or a long tail is a stretch of steps "
        "that went differently.",
    ),
    "grad_norm": (
        "Gradient norm",
        "It reacts before the loss does: an error here that grows means trouble ahead.",
    ),
    "throughput": (
        "Throughput",
        "Median tokens per second and device; the line spans the 5th to the 95th percentile.",
    ),
    "step_seconds": (
        "Seconds per step",
        "Grey steps are left out of the speed: warm-up, evaluation or saving. Steps that grow "
        "slower over time point to the machine, single slow ones to data or other work.",
    ),
    "step_times": (
        "Where the time of a step goes",
        "Waiting for data or for other ranks is what a faster device does not mend.",
    ),
}
"""Figure's file name → title, and how to read it; in the order of the page."""

_SYMBOLS = {"pass": "✓", "fail": "✗", "inconclusive": "?", "not-comparable": "≠"}
_NOT_COMPARED = "not compared"
_COUNTS = (
    "lines", "understood", "unknown", "duplicates", "restarts", "missing_losses", "torn_last_line",
)  # fmt: skip


def write_compare_page(
    folder: RunFolder,
    *,
    trainings: Mapping[str, LoggedTraining],
    comparison: LossComparison | None,
    statistics: Sequence[Mapping[str, Any]],
    identity: Sequence[Mapping[str, Any]],
    speeds: Sequence[Mapping[str, Any]],
    speed_ratio: float | None,
    speed_caption: str,
    published: Sequence[Mapping[str, Any]],
    published_caption: str,
    command: str,
) -> Path:
    """Write the page from tables and from the figures that lie in the report; returns its path.

    Args:
        statistics, identity, speeds, published: table rows.
        command: what makes this page again.
    """
    env = environment()
    env.filters["readable"] = _readable
    verdict = comparison.verdict if comparison else _NOT_COMPARED
    page = env.get_template("compare.html.j2").render(
        run=folder.name,
        verdict=verdict,
        symbol=_SYMBOLS.get(verdict, "–"),
        reasons=comparison.reasons if comparison else [],
        headline=_headline(comparison, speed_ratio),
        trainings=trainings,
        pictures=_pictures(folder),
        statistics=statistics,
        identity=identity,
        speeds=_transposed(speeds),
        speed_caption=speed_caption,
        published=published,
        published_caption=published_caption,
        command=command,
        provenance=provenance.record(),
    )
    return write_text(folder.report / "compare.html", page)


def _headline(comparison: LossComparison | None, ratio: float | None) -> list[tuple[str, Any]]:
    found = comparison.statistics() if comparison else {}
    numbers = {
        "steps": found.get("steps"),
        "mean relative error": found.get("mean_relative_error"),
        "tolerance": comparison.tolerance if comparison else None,
        "max relative error": found.get("max_relative_error"),
        "at step": found.get("max_relative_error_step"),
        "max absolute error": found.get("max_absolute_error"),
        "bias": found.get("signed_mean"),
        "candidate ÷ reference, speed": ratio,
    }
    return [(label, value) for label, value in numbers.items() if value is not None]


def _pictures(folder: RunFolder) -> list[dict[str, str]]:
    """The figures of this page as data addresses; SVG, which stays sharp on paper."""
    found = []
    for name, (title, caption) in CAPTIONS.items():
        path = folder.figures / f"{name}.svg"
        if path.exists():
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            address = f"data:image/svg+xml;base64,{data}"
            found.append({"title": title, "caption": caption, "data": address})
    return found


def _transposed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per quantity that is known, and one column per training: quantities are many."""
    names = [name for row in rows for name in row if name != "role" and row[name] is not None]
    return [
        {"quantity": name.replace("_", " "), **{str(row["role"]): row.get(name) for row in rows}}
        for name in dict.fromkeys(names)
    ]


def _readable(reading: Mapping[str, Any]) -> dict[str, Any]:
    return {name: reading.get(name) for name in _COUNTS}
