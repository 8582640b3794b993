"""Which files a source of records means, and their bytes, unpacked.

A source is a file, a folder (searched through, hidden names left out) or a glob. The name says what
a file is: `train-0.jsonl`, `train-0.jsonl.gz`, `train-0.parquet.zst`.
"""

import errno
import glob
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from internlm_lib.errors import InputError

KINDS = ("parquet", "arrow", "json", "jsonl", "csv", "txt")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_NAMES = f"{', '.join('.' + kind for kind in KINDS)} (plain, or packed as .gz or .zst)"
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
"""How packed files begin: RFC 1952, RFC 8878."""

_DATASETS_STATE = ("state.json", "dataset_info.json")
_DATASETS_FILES = (*_DATASETS_STATE, "dataset_infos.json", "dataset_dict.json")
"""What Hugging Face `datasets` puts beside its arrow files (`datasets/config.py`)."""
_PROSE = ("readme", "license", "licence", "notice", "copying", "changelog", "requirements")
"""Text files of these names are about a data set, they are not its records."""
_NOT_UNPACKED = (".bz2", ".xz", ".lz4", ".br", ".zip", ".7z", ".rar", ".tar", ".tgz")
_UNFINISHED = (".part", ".partial", ".incomplete", ".crdownload")
"""What browsers and download tools call a file of which they have the beginning."""
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Sources:
    """The files of some sources: those that are read, in order, and those that are not."""

    files: tuple[Path, ...]
    """In the order of the sources; those of a folder or glob sorted by their paths."""
    ignored: tuple[Path, ...]
    """Files of folders and globs that hold no records: README.md, LICENSE, scripts, hashes."""


def source_files(sources: Sequence[Path]) -> list[Path]:
    """The files that the sources mean, in the order in which they are read. Raises InputError."""
    return list(find_sources(sources).files)


def find_sources(sources: Sequence[Path]) -> Sources:
    """Look up what the sources mean; a folder's other files are named in `ignored`.

    Sources may differ in kind; the files of one folder or glob may not: a data set is often
    published in two forms side by side, and reading both would double it.

    Raises:
        InputError: a source that is not there or holds no records; several kinds in one folder or
            glob; a file given twice, plain and packed, unfinished, or packed in another way.
    """
    if not sources:
        raise InputError("no source of records is given; give files, folders or globs")
    files: list[Path] = []
    ignored: list[Path] = []
    for source in sources:
        if source.is_file():
            files.append(_given(source))
        else:
            found, others = _sorted_out(source, _look_inside(source))
            files += found
            ignored += others
    _refuse_doubles(files)
    return Sources(tuple(files), tuple(ignored))


def kind_of(file: Path) -> str:
    """One of KINDS, or "" if the name says none."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    kind = suffixes[-1].removeprefix(".") if suffixes else ""
    return kind if kind in KINDS else ""


def compression_of(file: Path) -> str | None:
    """`gzip`, `zstd`, or None for a plain file, by its name."""
    return COMPRESSIONS.get(file.suffix.lower())


@contextmanager
def open_bytes(file: Path) -> Iterator["io.BufferedReader[Any]"]:
    """Open a file for reading from its beginning to its end, unpacked as its name says.

    Raises:
        InputError: a packed file under the name of a plain one.
        OSError: while reading a packed file that is cut off or damaged, like any failed read.
    """
    import pyarrow

    compression = compression_of(file)
    if compression is None:
        with io.BufferedReader(file.open("rb", buffering=0), _BUFFER_BYTES) as plain:
            _refuse_packed(file, plain.peek(4))
            yield plain
    else:
        packed = pyarrow.input_stream(str(file), compression=compression, buffer_size=_BUFFER_BYTES)
        with io.BufferedReader(packed, _BUFFER_BYTES) as unpacked:
            yield unpacked


@contextmanager
def open_seekable(file: Path) -> Iterator[BinaryIO]:
    """Open a file that is read at several places; a packed one is unpacked to a temporary file.

    Raises:
        InputError: no space for the temporary file.
        OSError: see `open_bytes`.
    """
    with open_bytes(file) as stream:
        if compression_of(file) is None:
            yield stream
            return
        with tempfile.TemporaryFile() as copy:
            try:
                shutil.copyfileobj(stream, copy, _BUFFER_BYTES)
                copy.flush()
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise InputError(
                    f"{file}: no space left to unpack it into {tempfile.gettempdir()}; "
                    "set TMPDIR to a folder on a larger disk, or unpack the file yourself"
                ) from error
            yield copy


def _given(file: Path) -> Path:
    if not kind_of(file):
        raise InputError(f"{file}: records are read from {_NAMES}, not from {file.suffix!r}")
    return file


def _sorted_out(source: Path, files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The files of a folder or glob that hold records, all of one kind, and the others."""
    found = [file for file in files if _holds_records(file)]
    if not found:
        raise InputError(f"{source}: holds no records; their files are named {_NAMES}")
    examples = {kind_of(file): str(file) for file in reversed(found)}
    if len(examples) > 1:
        kinds = sorted(examples)
        raise InputError(
            f"{source}: holds {' and '.join('.' + kind for kind in kinds)} files; give one file, "
            "a folder with one kind of file, or a glob that matches one kind. "
            f"Among others: {', '.join(examples[kind] for kind in kinds)}"
        )
    return found, sorted(set(files) - set(found))


def _look_inside(source: Path) -> list[Path]:
    """All visible files of a folder, or of what a glob matches."""
    if source.is_dir():
        return sorted(_walk(source))
    pattern = str(source)
    if not any(mark in pattern for mark in "*?["):
        raise InputError(f"{source}: no such file or folder; expected records as {_NAMES}")
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    files = {file for match in matches for file in (_walk(match) if match.is_dir() else [match])}
    return sorted(files)


def _walk(folder: Path) -> Iterator[Path]:
    """Visible files below a folder, links to folders followed, each folder once."""
    seen = set()
    for top, folders, names in os.walk(folder, followlinks=True, onerror=_refuse_unreadable):
        seen.add(os.path.realpath(top))
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(top, name)) not in seen
        ]
        yield from (Path(top, name) for name in names if not name.startswith("."))


def _refuse_unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: {error.strerror}; a part of the records would be missing")


def _holds_records(file: Path) -> bool:
    """Whether a file is one of records. Raises InputError if that cannot be told."""
    suffix = file.suffix.lower()
    if suffix in _UNFINISHED:
        raise InputError(f"{file}: an unfinished download; finish it, or remove the file")
    if suffix in _NOT_UNPACKED or (suffix in COMPRESSIONS and not kind_of(file)):
        raise InputError(
            f"{file}: cannot tell whether it holds records; their files are named {_NAMES}. "
            "Unpack it, rename it, or leave it out by a glob"
        )
    about = file.name in _DATASETS_FILES or (suffix == ".txt" and file.stem.lower() in _PROSE)
    return kind_of(file) != "" and not about and not _is_cached(file)


def _is_cached(file: Path) -> bool:
    """Whether `datasets` keeps a result of `map` there, beside the arrow files it was made from."""
    return file.match("cache-*.arrow") and any(
        file.with_name(name).exists() for name in _DATASETS_STATE
    )


def _refuse_doubles(files: Iterable[Path]) -> None:
    """Two names of one file, or a file and the same one packed, would double the records."""
    seen: dict[Path, Path] = {}
    for file in files:
        plain = file.with_suffix("") if compression_of(file) else file
        for identity in {file.resolve(), plain.resolve()}:
            if identity in seen:
                raise InputError(
                    f"{seen[identity]} and {file}: the same records twice; give them once"
                )
            seen[identity] = file


def _refuse_packed(file: Path, beginning: bytes) -> None:
    for magic, suffix in _MAGIC.items():
        if beginning.startswith(magic):
            raise InputError(f"{file}: is packed; name it {file.name}{suffix}")
