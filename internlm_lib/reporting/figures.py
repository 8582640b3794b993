"""The kit's figures: one look, one colour per role, each saved as PNG and SVG with a CSV twin.

Figures are `matplotlib.figure.Figure` objects, made without pyplot, so that nothing global is left
behind in a notebook. Colours are Okabe and Ito's, told apart by the colour-blind; line styles and
hatches tell the roles apart in grey print as well.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm_lib.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from internlm_lib.reporting.training import LoggedTraining

BLACK, ORANGE, SKY_BLUE, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#6B6B6B"


@dataclass(frozen=True)
class RoleStyle:
    """How one side of a comparison is drawn, in every figure of the kit."""

    color: str
    linestyle: str
    linewidth: float
    hatch: str

    @property
    def line(self) -> dict[str, Any]:
        """Keyword arguments for `Axes.plot`."""
        return {"color": self.color, "linestyle": self.linestyle, "linewidth": self.linewidth}

    @property
    def bar(self) -> dict[str, Any]:
        """Keyword arguments for `Axes.bar` and `Axes.barh`."""
        return {"color": self.color, "hatch": self.hatch, "edgecolor": "white", "linewidth": 0}


# The reference is a broad line below, the candidate a thin dashed one on top: both stay visible
# where the curves coincide, which is what a good comparison looks like.
REFERENCE = RoleStyle(color=BLUE, linestyle="-", linewidth=2.8, hatch="")
CANDIDATE = RoleStyle(color=VERMILION, linestyle="--", linewidth=1.5, hatch="///")


def role_style(role: str) -> RoleStyle:
    """The style of a training's role: `reference`, or any other."""
    return REFERENCE if role == "reference" else CANDIDATE


_TIME_STYLES = {
    "forward_backward_seconds": ("forward and backward", BLUE, ""),
    "communication_seconds": ("communication", ORANGE, "///"),
    "optimizer_seconds": ("optimizer", GREEN, "..."),
    "data_seconds": ("data", VERMILION, "xxx"),
    "other_seconds": ("other", GREY, ""),
}
"""Column of `performance.step_times` → label, colour, hatch; in the order they are drawn."""

_RC: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "svg.hashsalt": "internlm",
    "hatch.linewidth": 0.8,
}


@contextmanager
def style() -> Iterator[None]:
    """The kit's look for figures made and saved inside the `with` block."""
    import matplotlib
    from cycler import cycler

    colors = [BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY_BLUE, BLACK]
    dashes = ["-", "--", "-.", ":", "-", "--", "-."]
    cycle = cycler(color=colors) + cycler(linestyle=dashes)
    with matplotlib.rc_context({**_RC, "axes.prop_cycle": cycle}):
        yield


def save_figure(figure: "Figure", path: Path) -> list[Path]:
    """Write `<path>.png` (150 dpi) and `<path>.svg`; returns both paths.

    The same data, drawn anew, gives the same bytes: no dates, no random identifiers.
    """
    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        target = path.with_name(path.name + suffix)
        with style(), atomic_path(target) as temporary:
            figure.savefig(temporary, dpi=150, metadata=metadata)
        written.append(target)
    return written


def save_table(rows: "Sequence[Mapping[str, Any]] | DataFrame", path: Path) -> Path:
    """Write rows as CSV, one column per key in order of appearance; returns `path`."""
    import pandas

    with atomic_path(path) as temporary:
        pandas.DataFrame(rows).to_csv(temporary, index=False)
    return path


@style()
def loss_figure(candidate: "LoggedTraining", reference: "LoggedTraining | None" = None) -> "Figure":
    """Loss over steps."""
    figure = empty_figure(7.0, 4.2)
    axes = figure.subplots()
    if reference is not None:
        axes.plot(reference.steps, reference.losses, label=reference.name, **REFERENCE.line)
    axes.plot(candidate.steps, candidate.losses, label=candidate.name, **CANDIDATE.line)
    label_axes(axes, "Training loss", "step", "loss (nats per token)")
    axes.legend()
    return figure


@style()
def schedule_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Learning rate over steps.

    Args:
        rows: `step`, `learning_rate`.
    """
    figure = empty_figure(7.0, 3.0)
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["learning_rate"] for row in rows], color=BLACK)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="scientific", scilimits=(0, 0), useMathText=True)
    label_axes(axes, "Learning rate", "step", "learning rate")
    return figure


@style()
def throughput_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Tokens per second and device, one bar per training, whiskers at the 5th and 95th percentile.

    Args:
        rows: of `performance.throughput`.
    """
    figure = empty_figure(8.0, 1.3 + 0.9 * len(rows))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        role = role_style(row["role"])
        speed = row["tokens_per_second_per_device"] or 0.0
        low, high = row["tokens_per_second_p5"] or 0.0, row["tokens_per_second_p95"] or 0.0
        axes.barh(place, speed, height=0.6, **role.bar)
        axes.hlines(place, low, high, color=BLACK, linewidth=1.4)
        axes.annotate(
            f"{speed:,.0f}", (max(high, speed), place), xytext=(6, 0),
            textcoords="offset points", va="center",
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{r['role']}\n{r['layout']}" for r in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    unit = "tokens per second and device (median; line: p5 to p95)"
    label_axes(axes, "Training throughput", unit, "")
    return figure


@style()
def step_times_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Where the time of a step went, one bar per training, its parts one after the other.

    Args:
        rows: of `performance.step_times`.
    """
    figure = empty_figure(8.0, 1.9 + 0.7 * len(rows))
    axes = figure.subplots()
    for name, (label, color, hatch) in _TIME_STYLES.items():
        values = [row[name] or 0.0 for row in rows]
        if all(row[name] is None for row in rows):
            continue
        before = [sum(row[n] or 0.0 for n in _parts_before(name)) for row in rows]
        axes.barh(
            range(len(rows)), values, 0.6, left=before, label=label, color=color, hatch=hatch,
            edgecolor="white", linewidth=0,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{row['role']}\n{row['layout']}" for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(left=0)
    label_axes(axes, "Where the time of a step goes", "seconds per step (medians)", "")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


@style()
def accuracy_figure(
    rows: Sequence[Mapping[str, Any]], *, chance: float | None = None, title: str = "Accuracy"
) -> "Figure":
    """Accuracy per subject before and after training, as pairs of bars.

    Args:
        rows: `subject`, `before`, `after`, accuracies in [0, 1]; `before` may be None.
        chance: accuracy of guessing, drawn as a line.
    """
    figure = empty_figure(8.0, 1.7 + 0.55 * len(rows))
    axes = figure.subplots()
    for shift, key, role in ((-0.2, "before", REFERENCE), (0.2, "after", CANDIDATE)):
        values = [row[key] for row in rows]
        if all(value is None for value in values):
            continue
        places = [place + shift for place in range(len(rows))]
        bars = axes.barh(places, [v or 0.0 for v in values], 0.38, label=key, **role.bar)
        labels = ["" if v is None else f"{100 * v:.0f} %" for v in values]
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(bars, labels, padding=4, fontsize=9, bbox=box)
    if chance is not None:
        axes.axvline(chance, color=BLACK, linestyle=":", linewidth=1.6, label="guessing")
    axes.set_yticks(range(len(rows)), [str(row["subject"]).replace("_", " ") for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    label_axes(axes, title, "questions answered correctly", "")
    legend_below(axes)
    return figure


@style()
def length_histogram(
    lengths: Mapping[int, int], *, seq_length: int | None = None, what: str = "documents"
) -> "Figure":
    """Distribution of lengths in tokens; a line marks the training's samples.

    Args:
        lengths: length → how many have it.
        what: has these lengths, in the plural.
    """
    figure = empty_figure(7.0, 4.0)
    axes = figure.subplots()
    values = sorted(lengths)
    counts = [lengths[value] for value in values]
    if len(values) <= 60:  # one bar per length is exact; bins would show a comb of gaps
        axes.bar(values, counts, width=0.9, **REFERENCE.bar)
    else:
        axes.hist(values, weights=counts, bins=60, **REFERENCE.bar)
    if seq_length is not None and seq_length <= 2 * values[-1]:
        axes.axvline(
            seq_length, color=VERMILION, linestyle="--", label=f"one sample: {seq_length} tokens"
        )
        axes.legend()
    title = f"Length of {sum(counts):,} {what}"
    label_axes(axes, title, f"tokens per {what.removesuffix('s')}", what)
    return figure


def _parts_before(name: str) -> list[str]:
    """Parts of a step that are drawn left of one."""
    names = list(_TIME_STYLES)
    return names[: names.index(name)]


def empty_figure(width: float, height: float) -> "Figure":
    """An empty figure of that many inches in the kit's look."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def label_axes(axes: "Axes", title: str, x: str, y: str) -> None:
    """Title at the left, and what the axes count with its unit."""
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def write_note(axes: "Axes", text: str) -> None:
    """A sentence in the middle of the axes, where there is nothing to draw."""
    text = textwrap.fill(text, 44)
    box = {"facecolor": "white", "edgecolor": "none"}
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", bbox=box)


def legend_below(axes: "Axes", columns: int | None = None) -> None:
    """A legend outside the data, where bars or dense curves leave no free corner.

    Args:
        columns: as many as there are entries, if left out.
    """
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        ncols = columns or len(handles)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=ncols)


def percent(fraction: float) -> str:
    """A share in percent with three digits; below 0.0001 % the fraction, as 3.4e-07."""
    size = abs(fraction)
    if 0 < size < 1e-6:
        return f"{fraction:.2g}"
    return f"{100 * fraction:,.0f} %" if size >= 10 else f"{100 * fraction:.3g} %"
