"""Hashes of token files: cheap to ask for again, and never those of a file that was there before.

A file is read whole only if nobody can vouch for it. Who can:

- the dataset card, written after the files it describes (`files`: their names and hashes).
  Replacing, rewriting or renaming a file sets its change time (ctime), which no program can set
  back; so the card's hash holds as long as the card's own modification time is not before it. A
  copy of the files is newer than its card, and is read once;
- a note that an earlier reading left, if size, times and inode are still the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internlm_lib.errors import InputError
from internlm_lib.files import read_json, sha256_of, sha256_of_json, write_json


def content_sha256(files: Sequence[Path], card: Path, notes: Path) -> str:
    """Hash of what token files hold, in this order, wherever they lie and whatever they are called.

    Every process may ask; where a file has to be read, one should ask before the others do.

    Args:
        card: the dataset card of these files, `<prefix>.json`; it need not exist.
        notes: folder in which hashes of files are noted.
    Raises:
        InputError: a file changes while it is read, or is not what its card says.
    """
    return sha256_of_json([_file_sha256(path, card, notes) for path in files])


def _file_sha256(path: Path, card: Path, notes: Path) -> str:
    said = _said_by(card, path)
    if said and card.stat().st_mtime_ns >= path.stat().st_ctime_ns:
        return said
    note = notes / f"{path.name}-{sha256_of_json(str(path.resolve()))[:8]}.json"
    found = _noted(note, path) or _read_and_note(path, note)
    if said and found != said:
        raise InputError(
            f"{path}: its sha256 is {found[:12]}…, {card} says {said[:12]}…: the file was damaged "
            "or replaced after it was made; prepare the data again, or delete the card if the file "
            "is what you want"
        )
    return found


def _said_by(card: Path, path: Path) -> str | None:
    """The hash that a card gives for a file."""
    if not card.is_file():
        return None
    try:
        said = {file["name"]: str(file["sha256"]) for file in read_json(card)["files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{card} is not a dataset card ({type(error).__name__}: {error}); prepare the data "
            "again, or delete it"
        ) from None
    return said.get(path.name)


def _noted(note: Path, path: Path) -> str | None:
    try:
        known = read_json(note)
        return str(known["sha256"]) if known["state"] == _state(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a note that cannot be used is written anew


def _read_and_note(path: Path, note: Path) -> str:
    before = _state(path)
    found = sha256_of(path)
    if _state(path) != before:
        raise InputError(f"{path} changes while it is read: is it still being written?")
    write_json(note, {"file": str(path), "state": before, "sha256": found})
    return found


def _state(path: Path) -> dict[str, Any]:
    """What changes with a file's content, as far as the file system knows."""
    stat = path.stat()
    names = ("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino")
    return {name: getattr(stat, name) for name in names}
