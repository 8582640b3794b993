"""Numbers, texts, times and rank labels as logs write them."""

import re
from datetime import date
from functools import lru_cache

_EPOCH = date(1970, 1, 1).toordinal()
_STAMP = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d):(\d\d):(\d\d)(?:[.,](\d{1,9}))?\s?(?:(Z)|([+-])(\d\d):?(\d\d))?"
)
_RANK = re.compile(
    r"(?:rank|default|worker)[ _]?(\d+)\]?:|^\s*(\d+):\s|^\[\d+,(\d+)\]<", re.IGNORECASE
)
"""What torchrun (`[rank3]:`, `[default7]:`), srun (`7: `) and mpirun (`[1,0]<stdout>:`) put before
a rank's lines."""


def as_text(characters: str) -> str:
    """What a line of `LogLines`, a character per byte, says in UTF-8."""
    return characters.encode("latin-1").decode(errors="replace")


def number(text: str) -> float | None:
    """A float, NaN and infinities included; None if it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def count(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def unix_seconds(text: str) -> float | None:
    """The last time stamp in `text`: what stands nearest to a message is its own.

    Without a zone it counts as UTC: logs do not say where they were written.
    """
    stamps = _STAMP.findall(text)
    if not stamps:
        return None
    day, hour, minute, second, fraction, _, sign, zone_hours, zone_minutes = stamps[-1]
    days = _days(day)
    if days is None:
        return None
    seconds = 86400 * days + 3600 * int(hour) + 60 * int(minute) + int(second)
    if sign:
        offset = 3600 * int(zone_hours) + 60 * int(zone_minutes)
        seconds += offset if sign == "-" else -offset
    return seconds + float("0." + fraction) if fraction else float(seconds)


@lru_cache(maxsize=16)
def _days(day: str) -> int | None:
    try:
        return date.fromisoformat(day).toordinal() - _EPOCH
    except ValueError:
        return None


def rank_label(line: str) -> str | None:
    """The rank a launcher says this line is from; None where it says nothing."""
    found = _RANK.search(line[:200])
    return next(group for group in found.groups() if group) if found else None
