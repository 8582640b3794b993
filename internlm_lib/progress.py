"""What `internlm run` tells on the terminal: a line per stage, a live line, the closing table."""

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm_lib.experiment.schema import ROLES
from internlm_lib.notebook import LiveLine
from internlm_lib.pipeline import Event
from internlm_lib.reporting.html import format_number
from internlm_lib.training.progress import TrainingProgress, clock

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from internlm_lib.data.examples import Example
    from internlm_lib.data.preprocess import Progress

_REFRESH_SECONDS = 1.0
_SHOWN_CHARACTERS = 600
_SHOWN_PIECES = 80
_COLOURS = {"done": "green", "failed": "red", "unchanged": "cyan"}


class RunProgress:
    """Shows a pipeline's events on stderr; give `self.show` to it as `on_event`."""

    def __init__(self, console: "Console") -> None:
        self.console = console
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def show(self, event: Event) -> None:
        self._stop_live_line()
        if event.status == "running":
            self._start_live_line(event)
            return
        mark = f"[{_COLOURS[event.status]}]{event.status:<9}[/]"
        note = "skipped, nothing it reads has changed" if event.status == "unchanged" else ""
        seconds = f"{event.seconds:7.1f} s" if event.status != "unchanged" else ""
        self.console.print(f"{event.stage:<12} {mark} {seconds} {note}".rstrip(), highlight=False)

    def _start_live_line(self, event: Event) -> None:
        if event.detail:
            self.console.print(f"{event.stage:<12} runs again, {event.detail}", style="dim")
        self._over.clear()
        self._thread = threading.Thread(target=self._live, args=(event,), daemon=True)
        self._thread.start()

    def _stop_live_line(self) -> None:
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None
            if sys.stderr.isatty():
                print("\r\x1b[2K", end="", file=sys.stderr, flush=True)

    def _live(self, event: Event) -> None:
        started, line = time.time(), LiveLine()
        trainings = {r: TrainingProgress(event.folder.training(r).journal) for r in ROLES}
        while not self._over.wait(_REFRESH_SECONDS):
            texts = [f"{r}: {text}" for r, t in trainings.items() if (text := t.text())]
            # The roles train one after the other: the last one with a step is the one at work.
            line("  ".join([f"{event.stage:<12} {clock(time.time() - started)}", *texts[-1:]]))


class ByteProgress:
    """A bar of bytes, rate and time left on a terminal; use as a context manager and call it."""

    def __init__(self, console: "Console") -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description:<10}"), BarColumn(), DownloadColumn(),
            TransferSpeedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total, note=note)
        self._bar.update(self._tasks[what], completed=done, total=total, note=note)

    def __enter__(self) -> "ByteProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


class DocumentProgress(ByteProgress):
    """How far preprocessing is: bytes of the sources, documents and tokens."""

    def show(self, progress: "Progress") -> None:
        note = f"{progress.documents:,} documents, {progress.tokens:,} tokens"
        self("read", progress.bytes_read, progress.bytes_total, note)


def print_examples(handler: str, found: Sequence["Example"], console: "Console") -> None:
    """The first documents as text and as pieces; pieces that are not trained are dim."""
    from rich.text import Text

    for example in found:
        console.print(Text(f"{example.where}, handler {handler}", style="bold"), soft_wrap=True)
        rest = len(example.text) - _SHOWN_CHARACTERS
        note = f" … and {rest} characters" if rest > 0 else ""
        console.print(Text(example.text[:_SHOWN_CHARACTERS] + note))
        pieces = [
            Text(piece.replace("\n", "\\n"), style="" if trained else "dim")
            for piece, trained in zip(example.pieces, example.trained, strict=True)
        ]
        rest = len(pieces) - _SHOWN_PIECES
        pieces[_SHOWN_PIECES:] = [Text(f"… and {rest} pieces")] if rest > 0 else []
        console.print(Text("|", style="cyan").join(pieces))


def print_plan(target: Path, rows: Sequence[Mapping[str, Any]], console: "Console") -> None:
    """What a conversion is going to write."""
    from rich.table import Table

    grid = Table("file", "tensors", "bytes", title=str(target), title_justify="left")
    for row in rows:
        grid.add_row(row["file"], str(row["tensors"]), f"{row['bytes']:,}")
    grid.add_section()
    tensors, nbytes = (sum(row[key] for row in rows) for key in ("tensors", "bytes"))
    grid.add_row(f"{len(rows)} files", str(tensors), f"{nbytes:,}")
    console.print(grid)


def print_summary(summary: Mapping[str, Any], console: "Console") -> None:
    """The closing table: what was trained, whether it agrees, what it learnt, where to look."""
    from rich.table import Table

    grid = Table(title=f"run {summary['run']}", show_header=False, title_justify="left")
    for label, text in _summary_rows(summary):
        grid.add_row(label, text)
    console.print(grid)
    console.print(f"report   {summary['report']}", soft_wrap=True)
    console.print("MLflow   make ui  (or: internlm ui)", highlight=False)


def print_failure(error: Mapping[str, Any], console: "Console") -> None:
    """The stage that failed, its error, the log to read and the executed notebook."""
    console.print(f"[red]{error['stage']} failed[/]")
    console.print(error["message"], markup=False, highlight=False, soft_wrap=True)
    if error["log"]:
        console.print(f"log      {error['log']}", soft_wrap=True)
    console.print(f"notebook {error['notebook']}", soft_wrap=True)


def _summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for role in ROLES:
        if training := summary[role]:
            first, last = training.get("loss_first"), training.get("loss_last")
            rows += [
                (role, str(training.get("layout"))),
                ("  loss", f"{_number(first)} → {_number(last)}"),
                ("  tokens/s", _number(training.get("tokens_per_second"))),
            ]
    compare, accuracy = summary["compare"], summary["accuracy"]
    if compare["verdict"] is not None:
        rows += [
            ("relative error", f"mean {_number(compare['mean_relative_error'])}, "
                               f"max {_number(compare['max_relative_error'])}"),
            ("absolute error", f"max {_number(compare['max_absolute_error'])}"),
            ("verdict", str(compare["verdict"])),
        ]  # fmt: skip
    if accuracy["after"] is not None:
        rows.append(("accuracy", f"{_percent(accuracy['before'])} → {_percent(accuracy['after'])}"))
    return rows


def _number(value: Any) -> str:
    return "none" if value is None else format_number(value)


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"
