"""What a notebook shows: settings, tables, figures, one live line. Nothing is computed here."""

import html
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm_lib.reporting.html import format_number
from internlm_lib.stages.stage import Stage

if TYPE_CHECKING:
    from IPython.display import DisplayHandle, Image
    from pandas import DataFrame

    from internlm_lib.data.examples import Example

_SECONDS_BETWEEN_LINES = 10.0
_NUMBER = "text-align:right;font-variant-numeric:tabular-nums"
_TEXT = "text-align:left;white-space:pre-wrap;overflow-wrap:break-word"
_DOCUMENT = "font-family:monospace;line-height:1.7;margin:0;max-width:52em;overflow-wrap:anywhere"
_PIECE_COLOURS = ("#cfe2f3", "#fce5a8")
"""Light blue and light orange: told apart with any colour vision, black on them readable."""
_READ_COLOUR = "#d9d9d9"
_SHOWN_PIECES = 200


@dataclass(frozen=True)
class Table:
    """Rows under column names, shown as HTML in a notebook and as aligned text elsewhere."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    caption: str = ""

    def _repr_html_(self) -> str:
        numeric = self._numeric_columns()
        styles = [_NUMBER if number else _TEXT for number in numeric]
        head = _html_cells("th", self.columns, styles)
        body = "\n".join(
            f"<tr>{_html_cells('td', [_text(v) for v in row], styles)}</tr>" for row in self.rows
        )
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        return (
            f"<table>{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
        )

    def __repr__(self) -> str:
        cells = [self.columns, *(tuple(_text(v) for v in row) for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        numeric = self._numeric_columns()
        lines = [
            "  ".join(
                text.rjust(width) if number else text.ljust(width)
                for text, width, number in zip(row, widths, numeric, strict=True)
            ).rstrip()
            for row in cells
        ]
        return "\n".join([self.caption, *lines] if self.caption else lines)

    def _numeric_columns(self) -> list[bool]:
        """Whether all values of a column that are there are numbers."""
        columns = [[row[i] for row in self.rows] for i in range(len(self.columns))]
        return [
            any(_is_number(v) for v in column) and all(v is None or _is_number(v) for v in column)
            for column in columns
        ]


def table(rows: "Sequence[Mapping[str, Any]] | DataFrame", caption: str = "") -> Table:
    """A table of one row per mapping; a key that a row lacks is shown as an empty cell."""
    if not isinstance(rows, Sequence):
        rows = rows.to_dict("records")
    columns = list(dict.fromkeys(str(key) for row in rows for key in row))
    values = tuple(tuple(row.get(column) for column in columns) for row in rows)
    return Table(tuple(name.replace("_", " ") for name in columns), values, caption)


@dataclass(frozen=True)
class Pieces:
    """Documents as the pieces that a model reads, shown in alternating colours in a notebook and
    between bars elsewhere; pieces that are not trained are grey."""

    examples: "Sequence[Example]"

    def _repr_html_(self) -> str:
        return "\n".join(
            f"<p style='margin:1em 0 .3em'><b>{html.escape(Path(example.where).name)}</b></p>"
            f"<p style='{_DOCUMENT}'>{''.join(_piece_spans(example))}</p>"
            for example in self.examples
        )

    def __repr__(self) -> str:
        return "\n\n".join(
            f"{Path(example.where).name}\n"
            + "|".join(map(_spelled, example.pieces[:_SHOWN_PIECES]))
            for example in self.examples
        )


def pieces(examples: "Sequence[Example]") -> Pieces:
    return Pieces(tuple(examples))


def _piece_spans(example: "Example") -> Iterator[str]:
    shown = zip(example.pieces, example.trained, strict=True)
    for number, (piece, trained) in enumerate(islice(shown, _SHOWN_PIECES)):
        colour = _PIECE_COLOURS[number % len(_PIECE_COLOURS)] if trained else _READ_COLOUR
        text = html.escape(_spelled(piece)).replace("\\n", "↵<br>")
        yield f'<span style="background:{colour};color:#111">{text}</span>'
    if (rest := len(example.pieces) - _SHOWN_PIECES) > 0:
        yield f" … and {rest:,} pieces"


def _spelled(piece: str) -> str:
    """A piece with its blanks and line breaks to be seen."""
    return piece.replace("\n", "\\n")


def show_settings(stage: Stage, sections: Sequence[str]) -> Table:
    """The resolved values of an experiment's sections, one row per key, e.g. `training.lr`.

    Numbers are shown as they are, not rounded: this is what the stage is going to use.
    """
    resolved = stage.experiment.model_dump(mode="json", include=set(sections))
    rows = [
        {"setting": key, "value": "none" if value is None else str(value)}
        for section in sections
        for key, value in _leaves(resolved[section], section)
    ]
    return table(rows, caption=f"{stage.name} of run {stage.folder.name}")


def figure(path: Path | None) -> "Image | None":
    """A picture that a stage has drawn, embedded in the notebook; nothing if it drew none."""
    from IPython.display import Image

    if path is None:
        return None
    return Image(filename=str(path), alt=path.stem.replace("_", " "))


class LiveLine:
    """One line of progress, updated in place: call it with the new text.

    In a notebook the line is one output that is replaced, so that the saved file stays small. On
    a terminal it is rewritten on stderr. Elsewhere (a log file) a line is written every 10 s.
    Used as a context manager, or closed, it leaves a terminal at the start of a fresh line.
    """

    def __init__(self) -> None:
        self._kernel = _in_kernel()
        self._handle: DisplayHandle | None = None
        self._text = ""
        self._written = float("-inf")

    def __call__(self, text: str) -> None:
        if text == self._text:
            return
        self._text = text
        if self._kernel:
            self._show(text)
        elif sys.stderr.isatty():
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._written >= _SECONDS_BETWEEN_LINES:
            self._written = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the line on a terminal; the last text stays."""
        if self._text and not self._kernel and sys.stderr.isatty():
            print(file=sys.stderr)

    def __enter__(self) -> "LiveLine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self, text: str) -> None:
        from IPython.display import display

        line = {"text/plain": text}
        if self._handle is None:
            self._handle = display(line, raw=True, display_id=True)
        else:
            self._handle.update(line, raw=True)


def _in_kernel() -> bool:
    """Whether this runs in a Jupyter kernel, without importing IPython where it is not loaded."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module else None
    return shell is not None and hasattr(shell, "kernel")


def _leaves(values: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            leaves += _leaves(value, f"{prefix}.{key}")
        else:
            leaves.append((f"{prefix}.{key}", value))
    return leaves


def _html_cells(tag: str, texts: Sequence[str], styles: Sequence[str]) -> str:
    return "".join(
        f'<{tag} style="{style}">{html.escape(text)}</{tag}>'
        for text, style in zip(texts, styles, strict=True)
    )


def _text(value: Any) -> str:
    return "" if value is None else format_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
