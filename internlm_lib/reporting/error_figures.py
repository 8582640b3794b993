"""The signed error of a candidate's loss: over the steps, and how it is distributed.

Each figure has its CSV twin, a function of the same name with `rows`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from internlm_lib.reporting.curves import (
    abscissa,
    counted,
    dense,
    draw,
    grouped_axis,
    relative_axis,
    spread,
    step_axis,
)
from internlm_lib.reporting.decimation import smoothing_width
from internlm_lib.reporting.differences import CONFIDENCE
from internlm_lib.reporting.figures import (
    BLACK,
    GREEN,
    GREY,
    PURPLE,
    REFERENCE,
    SKY_BLUE,
    VERMILION,
    empty_figure,
    label_axes,
    percent,
    style,
    write_note,
)
from internlm_lib.reporting.loss import LossComparison
from internlm_lib.reporting.training import Floats
from internlm_lib.reporting.verdict_title import confidence, signed, write_verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

_QUANTITY = "(candidate - reference) / reference"
_MEAN: dict[str, Any] = {"color": GREEN, "linestyle": "-.", "linewidth": 1.8}
_TOLERANCE: dict[str, Any] = {"color": BLACK, "linestyle": ":", "linewidth": 2.2}


@style()
def signed_error_figure(comparison: LossComparison) -> "Figure":
    """The signed relative error over steps: its mean, its late trend, and the band to stay in.

    Single steps far outside of what the others show are drawn as triangles at the edge.
    """
    figure = empty_figure(10.0, 5.4)
    axes = figure.subplots()
    label_axes(axes, "Signed relative error of the loss", "", _QUANTITY)
    where = abscissa(comparison.pairing)
    if not comparison.loss.signed.any():
        _say_nothing_differs(figure, axes, comparison)
        return figure
    x = where.values[np.searchsorted(comparison.pairing.steps, comparison.steps)]
    error = comparison.loss.signed
    low, high = _view(error)
    near = [*comparison.loss.bias.interval(CONFIDENCE), *_limits(comparison)]
    low, high = _stretch(min(low, 0.0), max(high, 0.0), near)
    axes.axhline(0.0, color=BLACK, linewidth=0.9)
    _draw_course(axes, comparison, where.values)
    _draw_tolerance(axes, comparison, low, high, across=True)
    _draw_mean(axes, comparison)
    _draw_trend(axes, comparison, x)
    margin = 0.05 * (high - low)
    _draw_beyond(axes, x, error, low - margin, high + margin)
    axes.set_xlim(*where.limits)
    axes.set_ylim(low - margin, high + margin)
    relative_axis(axes.yaxis, low, high)
    step_axis(axes, where.label)
    _finish(figure, comparison)
    return figure


@style()
def error_histogram(comparison: LossComparison) -> "Figure":
    """How the signed relative error is distributed, and the share of steps beyond the tolerance."""
    figure = empty_figure(8.0, 5.2)
    axes = figure.subplots()
    label_axes(axes, "Distribution of the signed relative error", _QUANTITY, "steps per bar")
    error = comparison.loss.signed
    if not error.any():
        _say_nothing_differs(figure, axes, comparison)
        return figure
    edges, counts = _bins(error)
    axes.bar(
        edges[:-1], counts, np.diff(edges), align="edge", color=SKY_BLUE, edgecolor=GREY,
        linewidth=0.4, label=_outside(comparison),
    )  # fmt: skip
    low, high = _stretch(edges[0], edges[-1], [0.0])
    low, high = _stretch(low, high, _limits(comparison))
    if low <= 0 <= high:
        axes.axvline(0.0, color=BLACK, linewidth=0.9)
    else:
        axes.plot([], [], color=BLACK, linewidth=0.9, label="0 (out of view)")
    mean = comparison.loss.bias.value
    axes.axvline(mean, label=f"mean {signed(mean)}", **_MEAN)
    _draw_tolerance(axes, comparison, low, high, across=False)
    if beyond := len(error) - int(counts.sum()):
        largest = signed(float(error[np.abs(error).argmax()]))
        label = f"out of view: {counted(beyond)}, up to {largest}"
        axes.plot([], [], color=VERMILION, linestyle="none", marker=">", label=label)
    margin = 0.03 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    relative_axis(axes.xaxis, low, high)
    grouped_axis(axes.yaxis, whole=True)
    _finish(figure, comparison)
    return figure


def signed_error_rows(comparison: LossComparison) -> "DataFrame":
    """One row per step with a sound loss on both sides: `step`, `signed_error`, `smoothed`."""
    from pandas import DataFrame

    loss = comparison.loss
    return DataFrame({"step": loss.steps, "signed_error": loss.signed, "smoothed": loss.smoothed})


def error_histogram_rows(comparison: LossComparison) -> list[dict[str, Any]]:
    """One row per bar: `lower`, `upper` (not reached but by the last), `steps`; those out of view
    are the first and the last row, from the smallest or to the largest error."""
    error = comparison.loss.signed
    if not len(error):
        return []
    edges, counts = _bins(error)
    limits, steps = edges.tolist(), counts.tolist()
    if below := int((error < edges[0]).sum()):
        limits, steps = [float(error.min()), *limits], [below, *steps]
    if above := int((error > edges[-1]).sum()):
        limits, steps = [*limits, float(error.max())], [*steps, above]
    return [
        {"lower": low, "upper": high, "steps": count}
        for low, high, count in zip(limits[:-1], limits[1:], steps, strict=True)
    ]


def _draw_course(axes: "Axes", comparison: LossComparison, x: Floats) -> None:
    """The error of every step, with gaps, and smoothed."""
    steps, loss = comparison.pairing.steps, comparison.loss
    line = {**dense(GREY, len(steps)), "label": "error"}
    draw(axes, x, spread(steps, loss.steps, loss.signed), line)
    width = smoothing_width(len(loss.steps))
    if width > 1:
        line = {"color": REFERENCE.color, "linewidth": 1.8, "label": f"mean of {width:,} steps"}
        draw(axes, x, spread(steps, loss.steps, loss.smoothed), line)


def _draw_mean(axes: "Axes", comparison: LossComparison) -> None:
    bias = comparison.loss.bias
    label = f"mean {signed(bias.value)}"
    if bias.freedom:
        interval = bias.interval(CONFIDENCE)
        label += f" ({confidence(interval)})"
        axes.axhspan(*interval, color=GREEN, alpha=0.25, linewidth=0)
    axes.axhline(bias.value, label=label, zorder=4, **_MEAN)


def _draw_trend(axes: "Axes", comparison: LossComparison, x: Floats) -> None:
    """The late window, and the line and its confidence through it, if it has steps enough."""
    late, count = comparison.loss.late, comparison.loss.late_steps
    if not late.freedom:
        return
    x, level = x[-count:], float(comparison.loss.signed[-count:].mean())
    place = np.arange(count) - (count - 1) / 2
    low, high = late.interval(CONFIDENCE)
    change = f"{signed(late.value * count)} ({confidence((low * count, high * count))})"
    ends = [0, -1]
    axes.axvspan(x[0], x[-1], color="#EFEFEF", linewidth=0, zorder=0)
    axes.fill_between(
        x[ends], level + low * place[ends], level + high * place[ends], color=PURPLE, alpha=0.3,
        linewidth=0, zorder=3.5,
    )  # fmt: skip
    axes.plot(
        x[ends], level + late.value * place[ends], color=PURPLE, linestyle="--", linewidth=2.6,
        zorder=4, label=f"trend of the last {counted(count)}: {change}",
    )  # fmt: skip


def _draw_tolerance(
    axes: "Axes", comparison: LossComparison, low: float, high: float, *, across: bool
) -> None:
    """The tolerance on both sides of 0, or in the legend alone if it lies out of view.

    Args:
        across: lines go from left to right.
    """
    label = f"tolerance ±{percent(comparison.tolerance)}"
    seen = [limit for limit in _limits(comparison) if low <= limit <= high]
    if not seen:
        axes.plot([], [], label=f"{label} (out of view)", **_TOLERANCE)
    for limit in seen:
        line = axes.axhline if across else axes.axvline
        line(limit, label=label if limit == seen[0] else None, zorder=3, **_TOLERANCE)


def _draw_beyond(axes: "Axes", x: Floats, error: Floats, low: float, high: float) -> None:
    """Triangles at the edge for the steps that lie beyond it."""
    for marker, edge, rows in (
        ("v", low, np.flatnonzero(error < low)),
        ("^", high, np.flatnonzero(error > high)),
    ):
        if len(rows):
            largest = signed(float(error[rows[np.abs(error[rows]).argmax()]]))
            label = f"out of view: {counted(len(rows))}, up to {largest}"
            axes.plot(
                x[rows], np.full(len(rows), edge), color=VERMILION, linestyle="none",
                marker=marker, clip_on=False, zorder=5, label=label,
            )  # fmt: skip


def _limits(comparison: LossComparison) -> list[float]:
    return [-comparison.tolerance, comparison.tolerance]


def _view(error: Floats) -> tuple[float, float]:
    """From the smallest to the largest, unless these would press the rest into a line."""
    centre = float(np.median(error))
    reach = 3 * float(np.quantile(np.abs(error - centre), 0.99))
    low, high = float(error.min()), float(error.max())
    if reach and max(centre - low, high - centre) > 3 * reach:
        return max(low, centre - reach), min(high, centre + reach)
    return low, high


def _stretch(low: float, high: float, values: Sequence[float]) -> tuple[float, float]:
    """A view that takes in those of the values that are near: no further than it is wide."""
    near = [v for v in values if low - (high - low) <= v <= high + (high - low)]
    return min([low, *near]), max([high, *near])


def _bins(error: Floats) -> tuple[Floats, Any]:
    """Edges [bars + 1] and counts [bars] of the histogram's view."""
    bars = int(np.clip(np.ceil(2 * np.cbrt(len(error))), 5, 80))
    low, high = _view(error)
    if low == high:
        low, high = low - abs(low) / 2, high + abs(high) / 2
    counts, edges = np.histogram(error, bars, (low, high))
    return edges, counts


def _outside(comparison: LossComparison) -> str:
    count = int((comparison.loss.relative > comparison.tolerance).sum())
    steps = len(comparison.steps)
    return f"{counted(steps)}, {count:,} ({percent(count / steps)}) beyond the tolerance"


def _say_nothing_differs(figure: "Figure", axes: "Axes", comparison: LossComparison) -> None:
    write_note(axes, "no difference at any step" if len(comparison.steps) else "no step to compare")
    axes.set_xticks([])
    axes.set_yticks([])
    write_verdict(figure, comparison)


def _finish(figure: "Figure", comparison: LossComparison) -> None:
    figure.legend(loc="outside lower center", ncols=2)
    write_verdict(figure, comparison)
