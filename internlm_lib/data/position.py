"""How far files are read, for a progress bar: asked of the kernel, not of their readers, which are
libraries as often as not. Source: proc(5), /proc/pid/fd and /proc/pid/fdinfo."""

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path


class Position:
    """Bytes of some files that this process has read, one file after the other.

    A file that is mapped into memory counts when the next one is read. Where there is no /proc, all
    files do at the end.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        sizes = [file.stat().st_size for file in files]
        starts = accumulate(sizes, initial=0)
        self._places = {
            str(file.resolve()): (start, size)
            for file, start, size in zip(files, starts, sizes, strict=False)
        }
        self.total = sum(sizes)
        self._reached = 0

    def __call__(self) -> int:
        for number in _open_files():
            start, size = self._places.get(_path_of(number), (0, 0))
            self._reached = max(self._reached, start + min(_offset(number), size))
        return self._reached


def _open_files() -> list[str]:
    try:
        return os.listdir("/proc/self/fd")
    except OSError:
        return []


def _path_of(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:  # closed since
        return ""


def _offset(number: str) -> int:
    try:
        lines = Path(f"/proc/self/fdinfo/{number}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("pos:")), 0)
