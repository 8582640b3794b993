"""Lines of a log file, plain or gzip, whatever launchers and progress bars did to it."""

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from internlm_lib.errors import InputError

_BLOCK = 1 << 20
LONGEST = 1 << 16
"""Bytes beyond which a line is none of a training log, and may be handed out in pieces: no file
can fill the memory."""
_GZIP_MAGIC = b"\x1f\x8b"
_ANSI = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\n]{0,200}\x07|[@-Z\\^_])")
"""Colours, cursor movements and window titles of a terminal (ECMA-48)."""


class LogLines:
    """Iterates over a log's lines, without their ends and without colours, a character per byte
    (Latin-1): text is searched several times faster than bytes (`values.as_text` gives UTF-8).

    A carriage return ends a line, too: a metric line may follow the states of a progress bar.
    """

    torn = False
    """Whether the line handed out last has no end: its writer died, or still writes."""
    damage: str | None = None
    """Why a gzip file could not be read to its end."""

    def __init__(self, path: Path) -> None:
        """Raises InputError if `path` is no file."""
        if not path.is_file():
            raise InputError(f"{path}: no such log file; give the file that holds the training log")
        self.path = path

    def __iter__(self) -> Iterator[str]:
        rest = b""
        for block in self._blocks():
            data = rest + block
            held = b"\r" if data.endswith(b"\r") else b""  # its line feed may come next
            data = data[: len(data) - len(held)]
            if b"\r" in data:
                data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            if b"\x1b" in data:
                data = _ANSI.sub(b"", data)
            whole, line_feed, rest = data.rpartition(b"\n")
            if line_feed:
                yield from whole.decode("latin-1").split("\n")
            rest += held
            if len(rest) > LONGEST:
                yield rest.decode("latin-1")
                rest = b""
        if rest.endswith(b"\r") and self.damage is None:
            yield rest[:-1].decode("latin-1")
        elif rest:
            self.torn = True
            yield rest.decode("latin-1")

    def _blocks(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as plain:
                if plain.read(2) != _GZIP_MAGIC:
                    plain.seek(0)
                    while block := plain.read(_BLOCK):
                        yield block
                    return
            with gzip.open(self.path, "rb") as stream:
                while block := stream.read1(_BLOCK):
                    yield block
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self.damage = str(error)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error}") from error
