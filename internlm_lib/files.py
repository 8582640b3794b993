"""Files that are either whole or absent: written under a temporary name, synced, renamed."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success sync it and rename it into place.

    The temporary path keeps `path`'s suffix, for writers that look at it. Whatever was at `path`
    stays untouched if the body raises. Works for a file or a folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    _remove(temporary)
    try:
        yield temporary
        sync(temporary)
        if path.is_dir():
            _remove(path)
        temporary.replace(path)
        sync(path.parent, recursive=False)
    finally:
        _remove(temporary)


def remove_abandoned(folder: Path) -> None:
    """Remove what `atomic_path` left in a folder where its process was killed. Nobody else may be
    writing there."""
    for path in list(folder.rglob(".*.tmp*")):
        if re.fullmatch(r"\..+\.\d+\.tmp(\..+)?", path.name):
            _remove(path)


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text atomically; returns `path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write indented JSON atomically; returns `path`."""
    return write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Indented JSON as `write_json` writes it."""
    return json.dumps(value, indent=2, default=str) + "\n"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, or of a folder's relative names and contents in sorted order."""
    digest = hashlib.sha256()
    for file in _files(path):
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def sync(path: Path, recursive: bool = True) -> None:
    """Wait until a file, or a folder and all that is in it, is on the disk."""
    inside = path.rglob("*") if recursive else ()
    for target in [*inside, path]:
        handle = os.open(target, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
