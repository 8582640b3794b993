"""How long each step of a training took: a single slow step shows, a median hides it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from internlm_lib.reporting.curves import counted, draw, plain_log_axis, step_axis
from internlm_lib.reporting.figures import (
    BLACK,
    GREY,
    empty_figure,
    label_axes,
    role_style,
    style,
    write_note,
)
from internlm_lib.reporting.training import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

_WIDE_RANGE = 10
"""From this ratio of the slowest step to the median on, the axis is logarithmic."""


@dataclass(frozen=True)
class StepTimes:
    """The seconds of one training's steps."""

    name: str
    """For the title of its panel."""
    role: str
    """`reference` or `candidate`: how it is drawn."""
    steps: NDArray[np.int64]
    """Step numbers [n], rising."""
    seconds: Floats
    """Per step [n]; NaN where a step recorded none."""
    left_out: NDArray[np.bool_]
    """Steps [n] that count in no median: warm-up, and those whose seconds contain more."""

    @property
    def median(self) -> float:
        """Seconds of the steps that count; NaN if there are none."""
        counted_seconds = self.seconds[~self.left_out & np.isfinite(self.seconds)]
        return float(np.median(counted_seconds)) if len(counted_seconds) else float("nan")


@style()
def step_time_figure(series: Sequence[StepTimes]) -> "Figure":
    """Seconds of every step, one panel per training, all on the same axes.

    Args:
        series: one or more, in the order of their panels.
    """
    figure = empty_figure(10.0, 1.2 + 2.4 * len(series))
    panels = figure.subplots(len(series), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, training in zip(panels, series, strict=True):
        _draw_training(axes, training)
    if any(_slowest(training) > _WIDE_RANGE * training.median for training in series):
        panels[0].set_yscale("log")
        plain_log_axis(panels[0])
    else:
        panels[0].set_ylim(bottom=0)
    step_axis(panels[-1], "step")
    return figure


def step_time_rows(series: Sequence[StepTimes]) -> "DataFrame":
    """One row per training and step: `training`, `role`, `step`, `seconds`, `left_out`."""
    from pandas import DataFrame, concat

    return concat(
        [
            DataFrame(
                {
                    "training": training.name,
                    "role": training.role,
                    "step": training.steps,
                    "seconds": training.seconds,
                    "left_out": training.left_out,
                }
            )
            for training in series
        ],
        ignore_index=True,
    )


def _draw_training(axes: "Axes", training: StepTimes) -> None:
    label_axes(axes, training.name, "", "seconds per step")
    x = training.steps.astype(np.float64)
    if not np.isfinite(training.seconds).any():
        write_note(axes, "no step recorded its seconds")
        return
    kept = np.where(training.left_out, np.nan, training.seconds)
    out = np.where(training.left_out, training.seconds, np.nan)
    # A dashed line of single steps would be read as gaps: the role shows in its colour alone.
    color = role_style(training.role).color
    draw(axes, x, kept, {"color": color, "linewidth": 0.9, "label": "step"})
    if (number := int(np.isfinite(out).sum())) > 0:
        text = f"left out of the median: {counted(number)}"
        draw(axes, x, out, {"color": GREY, "linewidth": 1.6, "alpha": 0.7, "label": text})
    if np.isfinite(training.median):
        text = f"median {training.median:.3g} s"
        axes.axhline(training.median, color=BLACK, linestyle="--", linewidth=1.4, label=text)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _slowest(training: StepTimes) -> float:
    return float(np.nanmax(training.seconds, initial=0.0))
