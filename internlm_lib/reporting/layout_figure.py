"""How tensor parallel ranks share each tensor and pipeline stages the layers, as one picture.

Lengths below are inches on paper. Boxes stand for the sizes in a compressed scale: drawn to scale,
an embedding would leave a bias no thicker than a hair.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from internlm_lib.reporting.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY_BLUE,
    VERMILION,
    YELLOW,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

RANK_COLORS = (ORANGE, BLUE, YELLOW, GREEN, PURPLE, SKY_BLUE, VERMILION, BLACK)
"""Of neighbours, one is light and one is dark; ranks past the eighth begin anew."""

_HOW = {
    "heads": "by heads",
    "columns": "by columns",
    "rows": "each by rows",
    "vocabulary": "by rows",
    "replicated": "not cut",
}
_GRID_ROWS = 3
_CELL = (2.1, 2.2)
_BOX = (0.9, 1.35)
"""Smallest and largest side of a box, for up to eight ranks."""
_THIN = 0.34
"""Width of a one-dimensional tensor."""
_STAGE = (3.5, 0.85)
_SMALL = 9

_Box = tuple[float, float, float, float]
"""Left, top (counted downwards), width, height."""


@style()
def layout_figure(
    tensors: Sequence[Mapping[str, Any]],
    stages: Sequence[Mapping[str, Any]],
    tensor_parallel: int,
) -> "Figure":
    """Left: each tensor, cut into the parts of the ranks. Right: layers and bytes of each stage.

    Args:
        tensors: `name`; `split`, as `weights.layout.Split`; `rows` and `columns` of the whole
            tensor, with q, k and v or gate and up together and with the vocabulary's padding (1
            column if it is one-dimensional). Those of one layer, and those outside the layers.
        stages: `stage`; `layers`, its first and last as "0–19"; `bytes_per_rank`; `holds`, what it
            has beside layers, may be empty.
    """
    from matplotlib.figure import Figure

    grid_columns = math.ceil(len(tensors) / _GRID_ROWS)
    grow = min(2.0, max(1.0, tensor_parallel / len(RANK_COLORS)))
    cell = (_CELL[0] + _BOX[0] * (grow - 1), _CELL[1] + _BOX[1] * (grow - 1))
    width = grid_columns * cell[0]
    height = max(_GRID_ROWS * cell[1], len(stages) * _STAGE[1])
    figure = Figure(figsize=(width + _STAGE[0], height + 0.6), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(width, _STAGE[0]))[0]
    _title(left, _counted("Tensors over", tensor_parallel, "tensor parallel rank"))
    _title(right, _counted("Layers over", len(stages), "pipeline stage"))
    left.supxlabel(
        "Colour and number: the rank. Sizes: rows × columns; boxes are not to scale.",
        x=0.01, ha="left", fontsize=_SMALL,
    )  # fmt: skip
    grid = left.subplots(_GRID_ROWS, grid_columns, squeeze=False)
    lengths = [tensor[side] for tensor in tensors for side in ("rows", "columns")]
    scale = _Scale([length for length in lengths if length > 1], grow)
    for place, axes in enumerate(grid.flat):
        _paper(axes, cell[0] - 0.1, cell[1] - 0.5)
        if place < len(tensors):
            _draw_tensor(axes, tensors[place], tensor_parallel, scale)
    axes = right.subplots()
    _paper(axes, _STAGE[0], height)
    _draw_stages(axes, stages)
    return figure


class _Scale:
    """Lengths of tensors as lengths on paper: logarithmic between the smallest and the largest."""

    def __init__(self, lengths: Sequence[int], grow: float) -> None:
        self._low, self._high = math.log(min(lengths)), math.log(max(lengths))
        self._grow = grow

    def __call__(self, length: int) -> float:
        if length == 1:
            return _THIN
        span = self._high - self._low
        share = (math.log(length) - self._low) / span if span else 0.0
        return (_BOX[0] + share * (_BOX[1] - _BOX[0])) * self._grow


def _draw_tensor(
    axes: "Axes", tensor: Mapping[str, Any], tensor_parallel: int, scale: _Scale
) -> None:
    rows, columns, split = tensor["rows"], tensor["columns"], tensor["split"]
    part = {
        "replicated": (rows, columns),
        "columns": (rows, math.ceil(columns / tensor_parallel)),
    }.get(split, (math.ceil(rows / tensor_parallel), columns))
    axes.set_title(_in_two_lines(tensor["name"]), loc="left", fontsize=_SMALL)
    whole = (0.0, 0.15, scale(columns), scale(rows))
    size = f"{_size(rows, columns)}, {_HOW[split]}\nper rank {_size(*part)}"
    axes.text(0, whole[1] + whole[3] + 0.06, size, va="top", fontsize=_SMALL)
    if split == "replicated":
        _rectangle(axes, whole, "#DDDDDD", f"{tensor['name']} every rank")
        middle = whole[1] + whole[3] / 2
        axes.text(whole[2] + 0.1, middle, "on every rank", va="center", fontsize=_SMALL)
        return
    for half, box in _halves(whole).items() if split == "rows" else [("", whole)]:
        axes.text(box[0] + box[2] / 2, box[1] - 0.04, half, ha="center", fontsize=_SMALL)
        for rank, cut in enumerate(_cuts(box, tensor_parallel, upright=split == "columns")):
            label = " ".join(filter(None, (tensor["name"], half, f"rank {rank}")))
            _draw_part(axes, cut, rank, label, stripes=split == "heads")
    if split == "heads":
        _draw_head(axes, whole)


def _halves(box: _Box) -> dict[str, _Box]:
    """Gate and up side by side: one above the other, the parts of many ranks would be too low."""
    left, top, width, height = box
    narrow = 0.65 * width
    return {
        "gate": (left, top, narrow, height),
        "up": (left + narrow + 0.12, top, narrow, height),
    }


def _draw_part(axes: "Axes", box: _Box, rank: int, label: str, *, stripes: bool) -> None:
    """A rank's part, its number inside; with stripes for the q, k and v of its heads."""
    left, top, width, height = box
    color = RANK_COLORS[rank % len(RANK_COLORS)]
    _rectangle(axes, box, color, label)
    room = 0.65 * width if stripes else width
    number = str(rank)
    turned = len(number) > 1 and width < height
    along, across = (height, room) if turned else (room, height)
    fitting = 72 * 0.85 * min(along / len(number) / 0.75, across)
    axes.text(
        left + room / 2, top + height / 2, number, rotation=90 if turned else 0,
        ha="center", va="center" if turned else "center_baseline",
        color="white" if color in (BLUE, BLACK) else "black", fontsize=min(_SMALL, fitting),
    )  # fmt: skip
    if stripes:
        _lighten_qkv(axes, (left + room, top, width - room, height), max(1, round(height / 0.1)))


def _draw_head(axes: "Axes", tensor: _Box) -> None:
    """Beside a tensor, one head as under a magnifying glass: what the stripes mean."""
    edge, (left, top, width, height) = tensor[2], (tensor[2] + 0.3, tensor[1], 0.3, 0.6)
    _rectangle(axes, (left, top, width, height), RANK_COLORS[0], "")
    _lighten_qkv(axes, (left, top, width, height), 1)
    for name, (x, y, w, h) in zip("qkv", _cuts((left, top, width, height), 3), strict=True):
        axes.text(x + w / 2, y + h / 2, name, ha="center", va="center_baseline", fontsize=_SMALL)
    axes.text(left + width + 0.06, top + height / 2, "each\nhead", va="center", fontsize=_SMALL)
    for start, end in ((top, top), (top + 0.1, top + height)):
        axes.plot((edge, left), (start, end), color=GREY, linestyle="-", linewidth=0.7)


def _lighten_qkv(axes: "Axes", box: _Box, heads: int) -> None:
    """Lighten a box in three stripes per head."""
    for number, stripe in enumerate(_cuts(box, 3 * heads)):
        alpha = (0.25, 0.55, 0.85)[number % 3]
        _rectangle(axes, stripe, "white", "", alpha=alpha, linewidth=0)


def _draw_stages(axes: "Axes", stages: Sequence[Mapping[str, Any]]) -> None:
    """From the top down, a bar per stage, as long as what each rank of it holds."""
    most = max(stage["bytes_per_rank"] for stage in stages)
    step = min(3, (len(str(most)) - 1) // 3)
    unit = ("bytes", "KiB", "MiB", "GiB")[step]
    for place, stage in enumerate(stages):
        top = place * _STAGE[1]
        length = 0.55 * _STAGE[0] * stage["bytes_per_rank"] / most
        axes.text(0, top + 0.36, _stage_text(stage), va="bottom", fontsize=_SMALL)
        _rectangle(axes, (0.0, top + 0.4, length, 0.2), GREY, f"stage {stage['stage']}")
        size = f"{stage['bytes_per_rank'] / 1024**step:.3g} {unit} per rank"
        axes.text(length + 0.06, top + 0.5, size, va="center", fontsize=_SMALL)


def _stage_text(stage: Mapping[str, Any]) -> str:
    numbers = [int(number) for number in re.findall(r"\d+", stage["layers"])]
    count = numbers[-1] - numbers[0] + 1
    layers = f"stage {stage['stage']}: {_counted('', count, 'layer')} ({stage['layers']})"
    holds = stage.get("holds")
    return f"{layers}\nand {holds}" if holds else layers


def _cuts(box: _Box, parts: int, *, upright: bool = False) -> Iterator[_Box]:
    """Equal parts of a box, from the top down or, cut upright, from the left to the right."""
    left, top, width, height = box
    for part in range(parts):
        if upright:
            yield left + part * width / parts, top, width / parts, height
        else:
            yield left, top + part * height / parts, width, height / parts


def _rectangle(axes: "Axes", box: _Box, color: str, label: str, **look: Any) -> None:
    from matplotlib.patches import Rectangle

    look = {"edgecolor": "white", "linewidth": 1.0, **look}
    axes.add_patch(Rectangle(box[:2], box[2], box[3], facecolor=color, label=label, **look))


def _paper(axes: "Axes", width: float, height: float) -> None:
    """Axes as a sheet of paper of that size, its origin at the upper left, with nothing on it."""
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal", anchor="NW")
    axes.set_axis_off()


def _title(figure: "SubFigure", text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold")


def _counted(before: str, count: int, thing: str) -> str:
    return f"{before} {count} {thing}{'' if count == 1 else 's'}".strip()


def _in_two_lines(name: str) -> str:
    """A tensor's name, broken before its last two words."""
    return re.sub(r"\.(?=[^.]+\.[^.]+$)", ".\n", name)


def _size(rows: int, columns: int) -> str:
    return f"{rows:,}" if columns == 1 else f"{rows:,} × {columns:,}"
