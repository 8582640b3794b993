"""A training log → a run of this kit, which can be looked at, compared and sent to MLflow."""

import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from internlm_lib.errors import InputError
from internlm_lib.experiment.load import record_kind
from internlm_lib.files import atomic_path
from internlm_lib.journal import Journal
from internlm_lib.logs.facts import Facts
from internlm_lib.logs.read import read_log
from internlm_lib.logs.reader import Event
from internlm_lib.run_folder import RunFolder, project_root

IMPORT_STAGE = "import"

_COMMENT = """\
# This run was imported from a training log (`internlm import-log`). It is a record to look at and
# to compare with; the log does not tell enough to train it again.
"""
_TICK = 1e-3
"""Seconds between events whose times the log does not tell apart."""
_LONGEST_STEP = 1e7
"""Seconds beyond which a step's time is not believed."""


def import_log(
    path: Path,
    run_name: str | None = None,
    *,
    format: str = "auto",
    facts: Facts | None = None,
    experiment: str = "imported logs",
    tracking_uri: str | None = None,
    root: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make `runs/<run>/` of a log: the candidate's journal, the run's own, `experiment.yaml`.

    The run's folder appears when it is complete, or not at all. Events whose time the log does
    not say get one: that of the event before plus the step's seconds, from the file's own on.

    Args:
        path, format, facts: as for `read_log`.
        run_name: by default the file's name without its suffixes.
        experiment: MLflow experiment that `internlm sync` sends the run to.
        tracking_uri: MLflow store; None: the project's own.
        root: project root; found from the current folder by default.
        overwrite: replace a run that was imported before; never one that was trained.
    Returns:
        `run`, `path`, `source`, `format`, `sha256`, `time` (of the import, Unix seconds), `engine`,
        `layout`, `steps_logged` (repeated ones of restarts included), `first_step`, `last_step`,
        `last_loss`, `status`, `seconds` (the import took), and the fields of the `import` event.
    Raises:
        InputError: the run exists already; or as `read_log`.
    """
    started = time.time()
    folder = RunFolder.of(run_name or _name_of(path), root or project_root())
    _check_free(folder, overwrite)
    with atomic_path(folder.path) as temporary:
        inside = RunFolder(temporary.name, folder.root)
        written = _Written()
        _write_journal(inside.training("candidate").journal, path, format, facts, written)
        imported = {
            "source": path.name,
            "format": written.start["format"],
            "sha256": written.start["tags"]["log_sha256"],
            "time": started,
            **{name: written.summary[name] for name in _TOLD},
        }
        values = {
            "run_name": folder.name,
            "tracking": {"uri": tracking_uri, "experiment": experiment},
            "imported": imported,
        }
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        inside.experiment.write_text(_COMMENT + text, encoding="utf-8")
        _write_run_journal(inside.journal, written.summary, started)
    return {
        "run": folder.name,
        "path": str(folder.path),
        **imported,
        **{name: written.start[name] for name in ("engine", "layout")},
        **written.result(),
        "seconds": round(time.time() - started, 2),
        "ignored": written.summary["ignored"],
        "unknown_examples": written.summary["unknown_examples"],
    }


_TOLD = (
    "lines", "understood", "unknown", "duplicates", "restarts", "missing_losses",
    "torn_last_line", "damage",
)  # fmt: skip
"""Fields of the `import` event that `experiment.yaml` holds, too."""


class _Written:
    """What is told of the events that went into the journal."""

    start: Event
    summary: Event
    end: Event

    def __init__(self) -> None:
        self.first_step: int | None = None
        self.last: Event = {}
        self.events = 0

    def note(self, event: Event) -> None:
        kind = event["event"]
        if kind == "step":
            self.first_step = self.first_step or event["step"]
            self.last = event
            self.events += 1
        elif kind == "start":
            self.start = event
        elif kind == "end":
            self.end = event
        elif kind == "import":
            self.summary = event

    def result(self) -> dict[str, Any]:
        return {
            "steps_logged": self.events,
            "first_step": self.first_step,
            "last_step": self.last["step"],
            "last_loss": self.last["loss"],
            "status": self.end["status"],
        }


def _write_journal(
    journal: Path, log: Path, format: str, facts: Facts | None, written: _Written
) -> None:
    journal.parent.mkdir(parents=True)
    encode = _Encoder()
    with journal.open("wb", buffering=1 << 20) as stream:
        for event in _timed(read_log(log, format, facts), log):
            written.note(event)
            stream.write(encode(event).encode())
        stream.flush()
        os.fsync(stream.fileno())


class _Encoder:
    """JSON lines of events; of plain steps, which are nearly all, in half the time."""

    def __init__(self) -> None:
        self._templates: dict[tuple[str, ...], str] = {}

    def __call__(self, event: Event) -> str:
        if event["event"] == "step":
            values = tuple(event.values())
            try:
                if math.isfinite(sum(values[1:])):
                    return self._template(event) % values
            except (TypeError, OverflowError):  # a list, a dict; a number beyond all floats
                pass
        return json.dumps(event) + "\n"

    def _template(self, event: Event) -> str:
        """The line of a step with these fields; Python writes finite numbers as JSON does."""
        names = tuple(event)
        if names not in self._templates:
            numbers = "".join(f', "{name}": %r' for name in names[1:])
            self._templates[names] = f'{{"event": "%s"{numbers}}}\n'
        return self._templates[names]


def _timed(events: Iterator[Event], log: Path) -> Iterator[Event]:
    """Give every event a time, none earlier than the one before, every start a later one.

    The MLflow replica tells attempts apart by their time, and reads up to a time.
    """
    now: float | None = None
    for event in events:
        own = event["time"]
        if now is None:
            now = log.stat().st_mtime if own is None else own
        elif own is None:
            seconds = event.get("step_seconds") or 0.0
            now += seconds if _TICK < seconds < _LONGEST_STEP else _TICK
        elif event["event"] == "start":
            now = max(now + _TICK, own)
        else:
            now = max(now, own)
        event["time"] = now
        yield event


def _write_run_journal(path: Path, summary: Event, started: float) -> None:
    """The import as a stage, so that MLflow shows what was and was not understood."""
    journal = Journal(path)
    journal.write("stage", stage=IMPORT_STAGE, status="running", seconds=0.0)
    counts = {
        f"import/{name}": summary[name]
        for name in ("lines", "understood", "unknown", "duplicates", "restarts", "missing_losses")
    }
    journal.write("metrics", stage=IMPORT_STAGE, values=counts, step=None)
    seconds = round(time.time() - started, 2)
    journal.write("stage", stage=IMPORT_STAGE, status="done", seconds=seconds)


def _name_of(path: Path) -> str:
    """`logs/train 7b.log.gz` → `train-7b`. Raises InputError if nothing usable is left."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", re.sub(r"(\.(log|txt|json|out|gz))+$", "", path.name))
    if not (name := name.strip(".-_")[:100]):
        raise InputError(f"{path}: no name for a run can be made of this; give --run-name")
    return name


def _check_free(folder: RunFolder, overwrite: bool) -> None:
    if not folder.path.exists():
        return
    if record_kind(folder.experiment) != "imported":
        raise InputError(
            f"{folder.path}: this run was not imported, and an import does not replace it; "
            "give another --run-name"
        )
    if not overwrite:
        raise InputError(
            f"{folder.path}: this run was imported already; give another --run-name, or "
            "--overwrite to import it again"
        )
