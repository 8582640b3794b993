"""How far a run's journals have been sent to MLflow: `runs/<run>/mlflow.json`.

Losing this file, or a crash before it is written, costs nothing: runs are found again by their
key, and MLflow drops a point that is equal in name, step, value and time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from internlm_lib.files import write_text
from internlm_lib.journal import read_journal
from internlm_lib.run_folder import RunFolder

RUN_JOURNAL = "journal.jsonl"
TRAINING_JOURNALS = {role: f"training/{role}/journal.jsonl" for role in ("reference", "candidate")}

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


@dataclass
class Cursor:
    """Place in one journal."""

    born: float
    """Time of the journal's first event: tells a new file of the same name from the old one."""
    offset: int = 0
    """Bytes already sent."""


@dataclass
class Mirror:
    """An MLflow run that events go to."""

    run_id: str
    last_time: float
    """Time of the newest event sent to it, in Unix seconds."""
    status: Status = "RUNNING"
    last_step: int = 0
    started: float = 0.0
    """Time of a training's newest `start` event."""


@dataclass
class ReplicaState:
    store: str
    """Tracking URI all this is about; another store starts from nothing."""
    parent: Mirror | None = None
    cursors: dict[str, Cursor] = field(default_factory=dict)
    stages: dict[str, Mirror] = field(default_factory=dict)
    """Newest execution of each stage."""
    trainings: dict[str, Mirror] = field(default_factory=dict)
    """Newest attempt of each role."""

    def new_events(self, folder: RunFolder, journal: str) -> Iterator[tuple[dict[str, Any], int]]:
        """Unsent (event, byte offset after it) pairs of a journal, given relative to the run."""
        path = folder.path / journal
        first = next(read_journal(path), None)
        if first is None:
            return
        born = first[0]["time"]
        cursor = self.cursors.get(journal)
        if cursor is None or cursor.born != born:
            cursor = self.cursors[journal] = Cursor(born)
        yield from read_journal(path, cursor.offset)

    def has_new_events(self, folder: RunFolder) -> bool:
        devices = (name for role in TRAINING_JOURNALS for name in device_journals(folder, role))
        journals = (RUN_JOURNAL, *TRAINING_JOURNALS.values(), *devices)
        return any(next(self.new_events(folder, name), None) for name in journals)

    def save(self, folder: RunFolder) -> None:
        write_text(state_path(folder), _ADAPTER.dump_json(self, indent=2).decode() + "\n")


def device_journals(folder: RunFolder, role: str) -> list[str]:
    """Journals of the devices that a training ran on, relative to the run."""
    found = folder.training(role).device_journals()
    return [path.relative_to(folder.path).as_posix() for path in found]


_ADAPTER = TypeAdapter(ReplicaState)


def state_path(folder: RunFolder) -> Path:
    return folder.path / "mlflow.json"


def load_state(folder: RunFolder, store: str) -> ReplicaState:
    """The saved state, or an empty one if there is none for this store."""
    try:
        state = _ADAPTER.validate_json(state_path(folder).read_bytes())
    except (FileNotFoundError, ValidationError):
        return ReplicaState(store)
    return state if state.store == store else ReplicaState(store)
