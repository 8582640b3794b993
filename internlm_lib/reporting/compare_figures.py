"""Two trainings side by side: their losses and gradient norms, and how far these lie apart.

Each figure has its CSV twin, a function of the same name with `rows`. All can be drawn of any
comparison, also of a broken one, and of hundreds of thousands of steps.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np

from internlm_lib.reporting.curves import (
    abscissa,
    dense,
    draw,
    draw_smoothed,
    mark_gaps,
    plain_log_axis,
    spread,
    step_axis,
)
from internlm_lib.reporting.decimation import rolling_mean, smoothing_width
from internlm_lib.reporting.differences import Differences
from internlm_lib.reporting.figures import (
    BLACK,
    CANDIDATE,
    GREEN,
    GREY,
    PURPLE,
    REFERENCE,
    empty_figure,
    label_axes,
    legend_below,
    percent,
    style,
    write_note,
)
from internlm_lib.reporting.loss import LossComparison
from internlm_lib.reporting.verdict_title import write_verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

Scale = Literal["linear", "log"]

_GAP_HEIGHTS = (0.975, 0.925)
"""Of the ticks at steps without a value: the reference's, the candidate's."""
_SIZE = (12.0, 5.4)


@style()
def losses_figure(comparison: LossComparison, *, scale: Scale = "linear") -> "Figure":
    """Left: both losses over steps. Right: their relative error, with its limit.

    Args:
        scale: of the losses.
    """
    figure = empty_figure(*_SIZE)
    left, right = figure.subplots(1, 2, sharex=True)
    _draw_values(left, comparison, "loss", scale)
    label_axes(left, _smoothed_title("Training loss", comparison), "", "loss (nats per token)")
    _draw_errors(right, comparison, comparison.loss)
    _draw_limits(right, comparison)
    label_axes(right, "Relative error of the loss", "", "|candidate - reference| / reference")
    _finish(figure, (left, right), comparison)
    return figure


@style()
def grad_norm_figure(comparison: LossComparison) -> "Figure":
    """Left: both gradient norms over steps. Right: their relative error. Logarithmic both."""
    figure = empty_figure(*_SIZE)
    left, right = figure.subplots(1, 2, sharex=True)
    title = _smoothed_title("Gradient norm", comparison)
    if all(np.isnan(v).all() for v in comparison.pairing.values("grad_norm")):
        write_note(left, "neither training logged gradient norms")
        title = "Gradient norm"
    else:
        _draw_values(left, comparison, "grad_norm", "log")
    label_axes(left, title, "", "gradient norm")
    _draw_errors(right, comparison, comparison.grad_norm)
    quantity = "|candidate - reference| / reference"
    label_axes(right, "Relative error of the gradient norm", "", quantity)
    _finish(figure, (left, right), comparison)
    return figure


def losses_rows(comparison: LossComparison) -> "DataFrame":
    """One row per paired step: `step`, `consumed_tokens` if they are what pairs the trainings,
    `reference` and `candidate` (nats per token), `relative_error`; NaN where there is none."""
    return _rows(comparison, "loss", comparison.loss)


def grad_norm_rows(comparison: LossComparison) -> "DataFrame":
    """As `losses_rows`, of the gradient norms."""
    return _rows(comparison, "grad_norm", comparison.grad_norm)


def _rows(comparison: LossComparison, column: str, differences: Differences) -> "DataFrame":
    from pandas import DataFrame

    pairing = comparison.pairing
    reference, candidate = pairing.values(column)
    tokens = {} if pairing.by == "step" else {"consumed_tokens": pairing.tokens}
    return DataFrame(
        {
            "step": pairing.steps,
            **tokens,
            "reference": reference,
            "candidate": candidate,
            "relative_error": spread(pairing.steps, differences.steps, differences.relative),
        }
    )


def _draw_values(axes: "Axes", comparison: LossComparison, column: str, scale: Scale) -> None:
    """Both trainings' values, and ticks where they have none."""
    pairing, x = comparison.pairing, abscissa(comparison.pairing).values
    sides = (
        (pairing.reference, REFERENCE, _GAP_HEIGHTS[0], "reference"),
        (pairing.candidate, CANDIDATE, _GAP_HEIGHTS[1], "candidate"),
    )
    axes.set_yscale(scale)
    for values, (training, look, height, role) in zip(pairing.values(column), sides, strict=True):
        draw_smoothed(axes, x, values, look, training.name)
        quantity = column.replace("_", " ")
        mark_gaps(axes, x, values, look, height, f"{role}: no finite {quantity}")
    if scale == "log":
        plain_log_axis(axes)


def _draw_errors(axes: "Axes", comparison: LossComparison, differences: Differences) -> None:
    """The relative error on a logarithmic axis, its mean, and where it is largest."""
    axes.set_yscale("log")
    where, steps = abscissa(comparison.pairing), comparison.pairing.steps
    # Nothing may be drawn, and the other panel shares this axis.
    axes.set_xlim(*where.limits)
    errors = differences.relative
    if not errors.any():
        axes.set_ylim(comparison.tolerance / 1e6, comparison.tolerance * 10)
        write_note(axes, "no difference at any step" if len(errors) else "no step to compare")
        return
    # A log axis has no place for steps that agree to the last bit: the label counts them.
    visible = spread(steps, differences.steps, np.where(errors > 0, errors, np.nan))
    equal = int((errors == 0).sum())
    label = f"error (0 at {equal:,} of {len(errors):,} steps)" if equal else "error"
    draw(axes, where.values, visible, {**dense(GREY, len(steps)), "label": label})
    width = smoothing_width(len(steps))
    if width > 1:
        smooth = rolling_mean(spread(steps, differences.steps, errors), width)
        line = {"color": BLACK, "linewidth": 1.4, "label": f"mean of {width:,} steps"}
        draw(axes, where.values, np.where(smooth > 0, smooth, np.nan), line)
    mean, worst = float(errors.mean()), int(errors.argmax())
    text = f"mean {percent(mean)}"
    axes.axhline(mean, color=GREEN, linestyle="-.", linewidth=1.8, label=text, zorder=4)
    step = differences.steps[worst]
    axes.plot(
        where.values[np.searchsorted(steps, step)], errors[worst], color=BLACK, linestyle="none",
        marker="o", markersize=9, markerfacecolor="none", markeredgewidth=1.6, zorder=5,
        label=f"largest {percent(float(errors[worst]))} at step {step:,}",
    )  # fmt: skip
    # Noise passes through 0, and how closely says nothing: the lowest are left out of view.
    low = min(float(np.quantile(errors[errors > 0], 0.01, method="lower")), mean)
    axes.set_ylim(low / 2, float(errors[worst]) * 2)


def _draw_limits(axes: "Axes", comparison: LossComparison) -> None:
    """What the error of the loss is held against: the tolerance, and the noise between repeats."""
    limits = [comparison.tolerance]
    text = f"tolerance {percent(comparison.tolerance)}"
    axes.axhline(comparison.tolerance, color=BLACK, linestyle=":", linewidth=2.2, label=text)
    if comparison.noise_floor:
        limits.append(comparison.noise_floor)
        text = f"repeats on one device {percent(comparison.noise_floor)}"
        axes.axhline(
            comparison.noise_floor, color=PURPLE, linestyle=(0, (6, 2, 1, 2, 1, 2)), linewidth=1.6,
            label=text,
        )  # fmt: skip
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, *(v / 2 for v in limits)), max(high, *(v * 2 for v in limits)))


def _finish(figure: "Figure", panels: tuple["Axes", "Axes"], comparison: LossComparison) -> None:
    for axes in panels:
        step_axis(axes, abscissa(comparison.pairing).label)
        legend_below(axes, columns=1 if axes is panels[0] else 2)
    write_verdict(figure, comparison)


def _smoothed_title(title: str, comparison: LossComparison) -> str:
    width = smoothing_width(len(comparison.pairing.steps))
    return title if width == 1 else f"{title} (thick: mean of {width:,} steps)"
