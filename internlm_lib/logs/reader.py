"""What every format's reader offers, and what it makes of a line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from internlm_lib.logs.header import Header

Event = dict[str, Any]
"""An event as in a journal (`journal.py`), without bookkeeping: `event`, `time` (Unix seconds or
None) and the fields the line gives."""

FACT = "fact"
"""A line that was read for what it says of the training."""

Parsed = Event | list[Event] | str | None
"""Events of a line; `FACT`; the kind of a line that is known and not needed; None for others."""


class Lines(Protocol):
    """See `LogLines`."""

    torn: bool
    damage: str | None

    def __iter__(self) -> Iterator[str]: ...


class Reader(Protocol):
    """One pass over one log."""

    @property
    def program(self) -> str:
        """Whose log it is, the `engine` of the journal."""
        ...

    facts: str
    """Where the facts come from, for messages, e.g. "the log's arguments"."""
    averages: bool
    """Whether steps that are not logged are part of the next one's numbers."""
    header: Header
    begins: bool
    """Set by lines that a training prints when it starts; the caller takes it back."""

    total_steps: int | None
    """Length of the training as metric lines or the file state it."""

    def lines(self, path: Path) -> Lines: ...

    def parse(self, line: str) -> Parsed: ...

    def is_whole(self, line: str) -> bool:
        """Whether a last line without an end can be trusted to hold all its numbers."""
        ...


def is_step(parsed: Parsed) -> bool:
    """Whether a line gave at least one step."""
    events = parsed if isinstance(parsed, list) else [parsed]
    return any(isinstance(event, dict) and event["event"] == "step" for event in events)
