"""Alpaca-schema records from parquet, JSON or JSON-lines files, one at a time.

A record has the text columns `instruction`, `input` and `output`; a column `text` (the rendered
prompt of the published data set) and any others are ignored: the kit renders records itself.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

from internlm_lib.errors import InputError


@dataclass(frozen=True)
class Record:
    """One instruction and its answer; `input` is empty where the instruction needs none."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Row:
    """One row of a file of records, its columns called by their canonical names."""

    values: Mapping[str, Any]
    """As read: text, list, number or None."""
    where: str
    """File and position, for messages: `a.parquet, row 17`, `a.jsonl, line 18`."""


class RecordError(InputError):
    """A record that cannot be read or used; the message says where it lies. Others may be fine."""


def text_of(row: Row, name: str, *, optional: bool = False) -> str:
    """The text of a row's value; of an optional one that is null or missing "".

    Raises RecordError.
    """
    value = row.values.get(name)
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    if name not in row.values:
        found = ", ".join(map(str, row.values))
        raise RecordError(f"{row.where}: column {name!r} is missing; found {found}")
    raise RecordError(f"{row.where}: column {name!r} = {short_repr(value)} is not text")


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file, or of all files of a folder in the order of their names.

    A JSON file is read as a whole; parquet and JSON lines are streamed.

    Raises:
        InputError: no such file, a folder without or with several kinds of record files, or a
            record that lacks a column; the message names the file, the row and the column.
    """
    for file in record_files(path):
        number = -1
        for number, row in enumerate(_READERS[file.suffix.lower()](file)):
            yield _record(row, f"{file}, row {number}")
        if number < 0:
            raise InputError(f"{file}: holds no records; remove it, or write it again")


def record_files(path: Path) -> list[Path]:
    """The files that `read_records` reads, in its order. Raises InputError."""
    kinds = ", ".join(_READERS)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected records as {kinds}")
    if path.is_file():
        if path.suffix.lower() not in _READERS:
            raise InputError(f"{path}: records are read from {kinds}, not from {path.suffix!r}")
        return [path]
    files = sorted(p for p in path.rglob("*") if _is_visible(p, path) and p.is_file())
    found = [file for file in files if file.suffix.lower() in _READERS]
    suffixes = sorted({file.suffix.lower() for file in found})
    if len(suffixes) > 1:
        # A data set is often published in two forms side by side: reading both doubles it.
        raise InputError(
            f"{path}: holds {' and '.join(suffixes)} files; "
            "give one file, or a folder with one kind of file"
        )
    if not found:
        raise InputError(f"{path}: holds no {kinds} file")
    return found


def _is_visible(file: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _record(row: Any, where: str) -> Record:
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: expected an object of columns, found {type(row).__name__}")
    return Record(
        instruction=_column(row, "instruction", where),
        input=_column(row, "input", where, optional=True),
        output=_column(row, "output", where),
    )


def _column(row: Mapping[str, Any], name: str, where: str, optional: bool = False) -> str:
    value = row.get(name)
    if value is None and optional:
        return ""
    if name not in row:
        raise InputError(f"{where}: column {name!r} is missing; found {', '.join(map(str, row))}")
    if not isinstance(value, str):
        raise InputError(f"{where}: column {name!r} = {value!r} is not text")
    return value


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = [n for n in file.schema_arrow.names if n in Record.__dataclass_fields__]
            if not wanted:
                found = ", ".join(file.schema_arrow.names)
                raise InputError(f"{path}: column 'instruction' is missing; found {found}")
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable parquet file: {error}") from error


def _read_json(path: Path) -> Iterator[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path}: not valid JSON: {error}; a file of one object per line is named .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of records, found {type(rows).__name__}")
    yield from rows


def _read_json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise InputError(f"{path}, line {number}: not valid JSON: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".parquet": _read_parquet,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
}
