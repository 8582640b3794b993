"""The figure of what the devices did: utilisation and memory over time, per training."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from internlm_lib.reporting.curves import draw
from internlm_lib.reporting.device_use import TrainingDevices
from internlm_lib.reporting.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY_BLUE,
    VERMILION,
    empty_figure,
    label_axes,
    style,
    write_note,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_COLORS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY_BLUE, BLACK, GREY)
_DASHES = ("-", "--", "-.", ":")
"""Of the devices, one after the other. Of more than there are colours the range is drawn."""
_REASON_WIDTH = 150
_NONE = "no sample was taken (tracking.device_sample_seconds)"


@style()
def device_figure(trainings: Sequence[TrainingDevices]) -> "Figure":
    """One row of panels per training: utilisation of each device, and memory in use.

    Args:
        trainings: one or more; of one without samples it is said why.
    """
    heights = [3.6 if training.tracks else 1.0 for training in trainings]
    figure = empty_figure(11.0, sum(heights))
    rows = figure.subfigures(len(trainings), 1, squeeze=False, height_ratios=heights)[:, 0]
    for row, training in zip(rows, trainings, strict=True):
        row.suptitle(training.name, x=0.01, ha="left", fontsize=12, fontweight="bold")
        if training.tracks:
            _draw_training(row, training)
        else:
            axes = row.subplots()
            axes.set_axis_off()
            write_note(axes, training.reason or _NONE)
    return figure


def _draw_training(row: "SubFigure", training: TrainingDevices) -> None:
    left, right = row.subplots(1, 2)
    for axes, unit in ((left, "utilisation (%)"), (right, "memory in use (GiB)")):
        label_axes(axes, "", "minutes since the first step", unit)
    _draw(left, training, "utilization_percent", 1.0)
    left.set_ylim(-3, 103)
    left.set_yticks([0, 25, 50, 75, 100])
    _draw(right, training, "memory_used_mib", 1024.0)
    totals = [np.nanmax(track.columns["memory_total_mib"], initial=0) for track in training.tracks]
    if (total := max(totals) / 1024) > 0:
        dots, label = (0, (1, 3)), f"capacity: {total:.3g} GiB"
        right.axhline(total, color=BLACK, linestyle=dots, linewidth=1.4, label=label)
    right.set_ylim(bottom=0)
    title = "host" if training.tracks[0].host else "device"
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), title=title, alignment="left")
    if training.reason:
        text = textwrap.fill(textwrap.shorten(training.reason, 2 * _REASON_WIDTH), _REASON_WIDTH)
        row.supxlabel(text, x=0.01, ha="left", fontsize=8, color=GREY)


def _draw(axes: "Axes", training: TrainingDevices, column: str, unit: float) -> None:
    """One line per device, or of many the median and the range that they lie in."""
    tracks = training.tracks
    if len(tracks) > len(_COLORS):
        _draw_range(axes, training, column, unit)
    for place, track in enumerate(tracks if len(tracks) <= len(_COLORS) else ()):
        line: dict[str, Any] = {
            "color": _COLORS[place], "linestyle": _DASHES[place % len(_DASHES)], "linewidth": 1.6,
            "label": track.name,
        }  # fmt: skip
        draw(axes, track.minutes, track.columns[column] / unit, line)
    for place, minute in enumerate((0.0, *training.restarts)):
        label = "start of training" if place == 0 else None
        axes.axvline(minute, color=GREY, linewidth=0.9, label=label)


def _draw_range(axes: "Axes", training: TrainingDevices, column: str, unit: float) -> None:
    """Nodes take their samples at times of their own: all are looked at when the first does."""
    tracks, minutes = training.tracks, training.tracks[0].minutes
    values = np.array([np.interp(minutes, t.minutes, t.columns[column] / unit) for t in tracks])
    low, middle, high = np.nanpercentile(values, [0, 50, 100], axis=0)
    text = f"lowest to highest of {len(tracks)}"
    axes.fill_between(minutes, low, high, color=SKY_BLUE, alpha=0.5, linewidth=0, label=text)
    draw(axes, minutes, middle, {"color": BLUE, "linewidth": 1.6, "label": "median"})
