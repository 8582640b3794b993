"""The verdict of a comparison as the title of its figures."""

import textwrap
from typing import TYPE_CHECKING

from internlm_lib.reporting.differences import CONFIDENCE
from internlm_lib.reporting.figures import BLACK, GREEN, ORANGE, PURPLE, VERMILION, percent
from internlm_lib.reporting.loss import LossComparison, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIGNS: dict[Verdict, tuple[str, str, str]] = {
    "pass": ("\u2713", GREEN, "-"),
    "fail": ("\u2717", VERMILION, "--"),
    "inconclusive": ("?", ORANGE, "-."),
    "not-comparable": ("\u2260", PURPLE, ":"),
}
"""Verdict → symbol, colour and line of the frame: each tells them apart, in grey print too."""

_CHARACTERS_PER_INCH = 11.5
_REASON_LINES = 2
_FRAME_ROOM = 0.12
"""Inches around the title, whose frame the layout does not see."""


def write_verdict(figure: "Figure", comparison: LossComparison) -> None:
    """Verdict, numbers and, unless it is a pass, the first reason, above the panels."""
    verdict = comparison.verdict
    symbol, color, line = _SIGNS[verdict]
    width = int(figure.get_figwidth() * _CHARACTERS_PER_INCH)
    # A number and its unit stay on one line.
    text = f"{symbol} {verdict}: {headline(comparison)}".replace(" %", "\u00a0%")
    lines = textwrap.wrap(text, width)
    if verdict != "pass":
        reason = comparison.reasons[0]
        lines += textwrap.wrap(reason, width, max_lines=_REASON_LINES, placeholder=" …")
    figure.set_layout_engine("constrained", h_pad=_FRAME_ROOM)
    frame = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": color,
             "linestyle": line, "linewidth": 2.2}  # fmt: skip
    figure.suptitle(
        "\n".join(lines), x=0.015, ha="left", fontsize=11, color=BLACK, bbox=frame, linespacing=1.4
    )


def headline(comparison: LossComparison) -> str:
    """The numbers that a verdict rests on, in one line."""
    tolerance = f"tolerance {percent(comparison.tolerance)}"
    if not len(comparison.steps):
        return f"no step to compare, {tolerance}"
    bias = comparison.loss.bias
    chance = f" ({confidence(bias.interval(CONFIDENCE))})" if bias.freedom else ""
    mean = percent(float(comparison.loss.relative.mean()))
    return f"mean relative error {mean}, bias {signed(bias.value)}{chance}, {tolerance}"


def signed(fraction: float) -> str:
    """A share in percent with its sign."""
    return f"{'+' if fraction > 0 else ''}{percent(fraction)}"


def confidence(interval: tuple[float, float]) -> str:
    """As "95 %: -0.1 % to +0.3 %"."""
    return f"{percent(CONFIDENCE)}: {signed(interval[0])} to {signed(interval[1])}"
