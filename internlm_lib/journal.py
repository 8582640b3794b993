"""Append-only JSON-lines journal of a run: the truth, on local disk.

One event per line: `{"event": <kind>, "time": <unix seconds>, …}`. Kinds used by the kit:
`start`, `step`, `validation`, `test`, `end` and what befell it, `checkpoint`, `checkpoint_failed`,
`broken_checkpoint`, `bad_step`, `restart` (a training); `stage`, `metrics`, `series`, `tags`,
`artifact` (a run); `device_sampling`, `device_sample`, `device_sample_failed` (a node's devices).
A line is written whole or not at all; a torn last line, left by a crash, is ignored by readers.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internlm_lib.errors import InputError


class Journal:
    """Appends events; one writer per file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event. NaN and infinities are kept (`NaN`, `Infinity`)."""
        line = json.dumps({"event": event, "time": time.time(), **fields}) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            if event != "step":
                os.fsync(file.fileno())


def read_journal(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield (event, byte offset after it) from `offset` on, whole lines only.

    Raises InputError if a whole line is not JSON.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            try:
                event = json.loads(raw)
            except ValueError as error:
                raise InputError(
                    f"{path}, byte {offset}: not a JSON line ({error}); the journal was edited "
                    "or damaged: restore it, or delete the stage's folder and run it again"
                ) from error
            offset += len(raw)
            yield event, offset


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    """All events of one kind, oldest first."""
    return [event for event, _ in read_journal(path) if event["event"] == kind]


def training_steps(path: Path) -> list[dict[str, Any]]:
    """The `step` events of a training, one per step, in step order.

    A training that was started again (a later `start` event with `first_step`) replaces what an
    earlier attempt wrote from that step on.
    """
    steps: dict[int, dict[str, Any]] = {}
    for event, _ in read_journal(path):
        if event["event"] == "start":
            steps = {n: e for n, e in steps.items() if n < event["first_step"]}
        elif event["event"] == "step":
            steps[event["step"]] = event
    return [steps[n] for n in sorted(steps)]


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
