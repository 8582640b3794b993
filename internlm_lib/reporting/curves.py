"""How one number per step is drawn: many steps on little paper, and steps without a number."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from internlm_lib.reporting.decimation import (
    BUCKETS,
    SMOOTHING,
    decimate,
    isolated,
    rolling_mean,
    smoothing_width,
)
from internlm_lib.reporting.figures import RoleStyle
from internlm_lib.reporting.pairing import Pairing
from internlm_lib.reporting.training import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_FEW = 30
"""Up to so many steps each gets a marker."""
_SMOOTH_BUCKETS = 2 * SMOOTHING
_TICKS = (1, 2, 2.5, 5, 10)
_TOKEN_UNITS = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))


@dataclass(frozen=True)
class Abscissa:
    """Where the steps of a comparison lie on the horizontal axis."""

    values: Floats
    """[n], rising, in the label's unit."""
    label: str

    @property
    def limits(self) -> tuple[float, float]:
        """The first and the last with a margin; of a single step, one to each side."""
        first, last = float(self.values[0]), float(self.values[-1])
        margin = 0.03 * (last - first) or 1.0
        return first - margin, last + margin


def abscissa(pairing: Pairing) -> Abscissa:
    """Steps, or the candidate's consumed tokens where those are what the trainings share."""
    if pairing.by == "step":
        return Abscissa(pairing.steps.astype(np.float64), "step")
    tokens = pairing.tokens
    for unit, name in _TOKEN_UNITS:
        if tokens[-1] >= 2 * unit:
            return Abscissa(tokens / unit, f"consumed tokens ({name})")
    return Abscissa(tokens, "consumed tokens")


def draw(axes: "Axes", x: Floats, y: Floats, line: dict[str, Any], buckets: int = BUCKETS) -> None:
    """A curve with gaps where y is not finite; no spike is lost, however many the points.

    Args:
        line: keyword arguments for `Axes.plot`.
    """
    rows = decimate(x, y, buckets)
    x, y = x[rows], np.where(np.isfinite(y[rows]), y[rows], np.nan)
    line = {"linestyle": "-", **line}  # else the style's cycle would choose one
    size = max(3.0, 2.2 * line["linewidth"])
    if len(x) <= _FEW:
        line = {**line, "marker": "o", "markersize": size}
    axes.plot(x, y, **line)
    if len(x) > _FEW and len(alone := isolated(y)):
        dots = {**line, "linestyle": "none", "marker": "o", "markersize": size, "label": None}
        axes.plot(x[alone], y[alone], **dots)


def draw_smoothed(axes: "Axes", x: Floats, y: Floats, style: RoleStyle, label: str) -> None:
    """Every step thin and pale, and their rolling mean on top, in the style of a role."""
    width = smoothing_width(len(x))
    if width > 1:
        draw(axes, x, y, {**dense(style.color, len(x)), "zorder": 2})
        y = rolling_mean(y, width)
    draw(axes, x, y, {**style.line, "label": label, "zorder": 3}, _SMOOTH_BUCKETS)


def mark_gaps(
    axes: "Axes", x: Floats, y: Floats, style: RoleStyle, height: float, label: str
) -> None:
    """Ticks near the top of the axes at the steps without a finite value, if there are any.

    Args:
        height: of the ticks, 0 at the bottom and 1 at the top.
        label: whose they are and what is missing; their number is added.
    """
    gaps = x[~np.isfinite(y)]
    if not len(gaps):
        return
    _, distinct = np.unique(np.round((gaps - x[0]) * (BUCKETS / max(x[-1] - x[0], 1))), True)
    axes.plot(
        gaps[distinct], np.full(len(distinct), height), transform=axes.get_xaxis_transform(),
        color=style.color, linestyle="none", marker="|", markersize=9,
        markeredgewidth=style.linewidth, label=f"{label} ({counted(len(gaps))})",
    )  # fmt: skip


def dense(color: str, steps: int) -> dict[str, Any]:
    """The line of every step, paler where a smoothed one lies on top of it."""
    return {"color": color, "linewidth": 0.8, "alpha": 0.6 if smoothing_width(steps) > 1 else 1.0}


def step_axis(axes: "Axes", label: str) -> None:
    """Steps, or tokens in a unit of their own, on the horizontal axis."""
    grouped_axis(axes.xaxis, whole=label == "step")
    axes.set_xlabel(label)


def grouped_axis(axis: "Axis", *, whole: bool) -> None:
    """Numbers as 1,000 on a linear axis; whole ones only, where others make no sense."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(6, steps=_TICKS, integer=whole))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def plain_log_axis(axes: "Axes") -> None:
    """Ticks as 2, 5 and 10, not powers of ten; round ones where a decade is not in view."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axes.get_ylim()
    narrow = high < 10 * low
    axes.yaxis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def relative_axis(axis: "Axis", low: float, high: float) -> None:
    """Percents on a linear axis from low to high, or powers of ten where those are tiny."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

    axis.set_major_locator(MaxNLocator(6, steps=_TICKS))
    if high - low >= 2e-5:
        axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        return
    formatter = ScalarFormatter(useMathText=True)
    formatter.set_powerlimits((0, 0))
    axis.set_major_formatter(formatter)


def counted(steps: int) -> str:
    """As "1 step", "7,000 steps"."""
    return f"{steps:,} step{'' if steps == 1 else 's'}"


def spread(steps: NDArray[np.int64], found: NDArray[np.int64], values: Floats) -> Floats:
    """Values of the steps found [m], among all steps [n]; NaN elsewhere."""
    spread_out = np.full(len(steps), np.nan)
    spread_out[np.searchsorted(steps, found)] = values
    return spread_out
