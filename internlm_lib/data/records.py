"""Records of parquet, arrow, JSON, JSON-lines, CSV and text files, one at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, Literal

from internlm_lib.data.columns import Columns, Fault, Found, missing_column
from internlm_lib.data.files import kind_of, source_files
from internlm_lib.data.tables import read_arrow, read_parquet
from internlm_lib.data.text_files import read_csv, read_json, read_jsonl, read_txt
from internlm_lib.errors import InputError

OnDamage = Literal["stop", "count"]

_LISTED = 20


class RecordError(InputError):
    """A record that cannot be read or used; the message says where it lies. Others may be fine."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file."""

    values: Mapping[str, Any]
    """Name → value as it is read: text, a number, a list, None …"""
    where: str
    """`<file>, row 17` (parquet, arrow, a JSON list; from 0) or `<file>, line 18` (from 1)."""


@dataclass
class Damage:
    """Records that were left out: filled while they are read with on_damage="count"."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    """Messages of the first 20, each with file and position."""

    def add(self, message: str) -> None:
        self.count += 1
        if len(self.first) < _LISTED:
            self.first.append(message)


@dataclass(frozen=True)
class Record:
    """One instruction and its answer; `input` is empty where the instruction needs none."""

    instruction: str
    input: str
    output: str


def read_rows(
    sources: Sequence[Path],
    *,
    columns: Mapping[str, str] = {},
    only: Sequence[str] | None = None,
    on_damage: OnDamage = "stop",
    damage: Damage | None = None,
) -> Iterator[Row]:
    """Yield the rows of all files that the sources (files, folders, globs) mean, streamed.

    Files are read in the order of `data.files.source_files`; blank lines are left out. Of a text
    file every line is a row with the one column `text`.

    Args:
        columns: a row's name for a value → the column of the file, where they differ.
        only: names that are needed; parquet and arrow files are read in these alone. A name that
            a file lacks is left out of its rows.
        on_damage: "stop" raises a RecordError at a record that cannot be read; "count" leaves it
            out and notes it in `damage`, which is then needed.
    Raises:
        InputError: whatever `on_damage` is: no such source, several kinds of files in one, a file
            that is cut off, holds no records, or lacks a mapped column.
    """
    if on_damage == "count" and damage is None:
        raise ValueError('on_damage="count" needs a Damage to count in')
    for file in source_files(sources):
        yield from _file_rows(
            file, Columns(columns, only), damage if on_damage == "count" else None
        )


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


def _file_rows(file: Path, columns: Columns, damage: Damage | None) -> Iterator[Row]:
    """The rows of one file; damaged ones are noted in `damage` or, if that is None, raised."""
    empty, unseen, values = True, dict(columns.mapping), {}
    rename = columns.renamer()
    for position, found in _read_file(file, columns):
        where = f"{file}, {position}"
        empty = False
        if not isinstance(found, Fault):
            values = rename(found)
            if unseen:
                unseen = {name: c for name, c in unseen.items() if name not in values}
            yield Row(values, where)
        elif damage is None:
            raise RecordError(f"{where}: {found}")
        else:
            damage.add(f"{where}: {found}")
    if empty:
        raise InputError(f"{file}: holds no records; remove it, or write it again")
    if unseen and values:
        name, column = unseen.popitem()
        raise missing_column(file, name, column, ", ".join(values))


def _read_file(file: Path, columns: Columns) -> Iterator[Found]:
    """What the reader of the file's kind yields; its errors become InputErrors."""
    import pyarrow

    kind, position = kind_of(file), ""
    try:
        for position, found in _READERS[kind](file, columns):
            yield position, found
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:  # of a column's name
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from error
        after = f" (after {position})" if position else ""
        raise InputError(
            f"{file}: not a readable {kind} file{after}: {error}. "
            "Is it cut off? Rows that are lost cannot be counted: fetch or write it again"
        ) from error


_READERS: dict[str, Callable[[Path, Columns], Iterator[Found]]] = {
    "parquet": read_parquet,
    "arrow": read_arrow,
    "json": read_json,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "txt": read_txt,
}
