"""Readers of files that are text: txt, jsonl, json and csv, in UTF-8, with or without a BOM."""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from internlm_lib.data.columns import Columns, Fault, Found, Values
from internlm_lib.data.files import open_bytes
from internlm_lib.errors import InputError

MAX_RECORD_BYTES = 32 << 20
"""A longer line or JSON record is a fault: most likely a line or a list that never ends."""
_BLOCK_BYTES = 1 << 20

_BLANKS = re.compile(r"[ \t\n\r]*")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_txt(file: Path, columns: Columns) -> Iterator[Found]:
    """A row with the column `text` per line, as `datasets` reads text files."""
    with open_bytes(file) as stream:
        yield from _parsed_lines(stream, _text_row)


def read_jsonl(file: Path, columns: Columns) -> Iterator[Found]:
    """A row per line, each a JSON object."""
    with open_bytes(file) as stream:
        yield from _parsed_lines(stream, _object)


def _parsed_lines(stream: io.BufferedReader, parse: Callable[[str], Values]) -> Iterator[Found]:
    lines = _Lines(stream)

    def read() -> Values | None:
        line = next(lines)
        return parse(line) if line and not line.isspace() else None

    return _read_each(lines, read)


def _text_row(line: str) -> Values:
    return {"text": line.removesuffix("\n").removesuffix("\r")}


def _object(line: str) -> Values:
    try:
        doubtful = _ESCAPED_SURROGATE.search(line) is not None
        return _checked(json.loads(line), doubtful=doubtful)
    except json.JSONDecodeError as error:
        raise Fault(f"not valid JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:
        raise Fault(f"not valid JSON: {error}") from None


def read_csv(file: Path, columns: Columns) -> Iterator[Found]:
    """The first record names the columns; see RFC 4180."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))  # the process's
    with open_bytes(file) as stream:
        # Strict UTF-8 would lose the beginning of a record whose second line is bad.
        lines = _Lines(stream, errors="surrogateescape")
        records = csv.reader(lines, strict=True)
        try:
            names = next((fields for fields in records if fields), [])
        except (csv.Error, Fault) as error:
            raise InputError(f"{file}, line {lines.number}: no names of columns: {error}") from None
        if _has_surrogates("".join(names)):
            raise InputError(f"{file}, line {lines.number}: the names of the columns are not UTF-8")
        if names:
            columns.of(file, names)

        def read() -> Values | None:
            fields = next(records)
            return _csv_row(names, fields) if fields else None

        yield from _read_each(lines, read)


def _csv_row(names: Sequence[str], fields: Sequence[str]) -> Values:
    if len(fields) != len(names):
        raise Fault(f"{len(fields)} fields for {len(names)} columns")
    row = dict(zip(names, fields, strict=True))
    return _checked(row, doubtful=_has_surrogates("".join(fields)))


def _read_each(lines: "_Lines", read: Callable[[], Values | None]) -> Iterator[Found]:
    """What `read` returns or the fault it raises, until the lines end; None is left out."""
    while True:
        start = lines.number + 1
        found: Values | Fault | None
        try:
            found = read()
        except StopIteration:
            return
        except (Fault, csv.Error) as fault:
            found = Fault(fault)
        if found is not None:
            yield f"line {start}", found


class _Lines(Iterator[str]):
    """The lines of a stream, with their ends. Goes on after a line that raised a Fault."""

    def __init__(self, stream: io.BufferedReader, errors: str = "strict") -> None:
        self.number = 0
        """Of the line last read, from 1."""
        self._stream = stream
        self._errors = errors

    def __next__(self) -> str:
        line = self._stream.readline(MAX_RECORD_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > MAX_RECORD_BYTES:
            while line and not line.endswith(b"\n"):
                line = self._stream.readline(_BLOCK_BYTES)
            raise Fault(f"longer than {MAX_RECORD_BYTES} bytes")
        if self.number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            return line.decode("utf-8", self._errors)
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise Fault(f"not UTF-8: byte 0x{byte:02x} at position {error.start}") from None


def read_json(file: Path, columns: Columns) -> Iterator[Found]:
    """A list of objects or, as many a published `.json` is, one object per line."""
    with open_bytes(file) as stream:
        first = stream.peek(_BLOCK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if first == b"{":
            yield from _json_lines(file, stream)
        elif first == b"[":
            yield from _json_list(file, stream)
        elif first:
            raise InputError(f"{file}: expected a list of records or one object per line, as JSON")


def _json_lines(file: Path, stream: io.BufferedReader) -> Iterator[Found]:
    rows = _parsed_lines(stream, _object)
    for number, (position, found) in enumerate(rows):
        if number == 0 and isinstance(found, Fault):
            raise InputError(
                f"{file}: expected a list of records or one object per line, found neither "
                f"({position}: {found}); a file of one object per line is better named .jsonl"
            )
        yield position, found


def _json_list(file: Path, stream: io.BufferedReader) -> Iterator[Found]:
    text = _JsonText(stream)
    number = 0
    try:
        mark = text.mark("[")
        if text.next() == "]":
            mark = text.mark("]")
        while mark != "]":
            yield f"row {number}", text.value()
            number += 1
            mark = text.mark(",", "]")
        text.mark("")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file}, row {number}: not valid JSON: {error}. Where a next row would begin cannot "
            "be told: repair the file, or write it with one object per line, as .jsonl"
        ) from None


class _JsonText:
    """A window on a JSON text: decodes one value after the other, forgets what is behind it.

    Not by ijson, whose parser turns half of a surrogate pair into "?" without a word, knows no NaN
    and no large integers, and gives up at the first byte that is not UTF-8.
    """

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        # Bad bytes become lone surrogates, by which `_checked` finds their row.
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._json = json.JSONDecoder()
        self._window, self._at = "", 0
        self._bad_bytes = False

    def mark(self, *expected: str) -> str:
        """Go behind the next mark; "" is the end of the text. Raises ValueError."""
        found = self.next()
        if found not in expected:
            allowed = " or ".join(mark or "the end" for mark in expected)
            raise ValueError(f"expected {allowed}, found {found or 'the end'}")
        self._at += 1
        return found

    def value(self) -> Values | Fault:
        """Go behind the value that comes next. Raises ValueError, RecursionError."""
        self.next()
        while True:
            try:
                value, end = self._json.raw_decode(self._window, self._at)
            except json.JSONDecodeError as error:
                problem = f"{error.msg} at {self._window[error.pos : error.pos + 40]!r}"
                if self._read_on():
                    continue
                raise ValueError(self._too_long() + problem) from None
            if end + len("e-") < len(self._window) or not self._read_on():
                break  # else the beginning of a number may have been taken for all of it
        start, self._at = self._at, end
        try:
            doubtful = self._bad_bytes or _ESCAPED_SURROGATE.search(self._window, start, end)
            return _checked(value, doubtful=bool(doubtful))
        except Fault as fault:
            return fault

    def next(self) -> str:
        """The next character that is no blank, "" at the end."""
        while True:
            self._at = _BLANKS.match(self._window, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._window) or not self._read_on():
                return self._window[self._at : self._at + 1]

    def _read_on(self) -> bool:
        """Read as much as is in the window, so that a long value is decoded a few times only.

        Returns whether the window has grown; it has not, and is as it was, at the text's end.
        """
        rest = len(self._window) - self._at
        if rest > MAX_RECORD_BYTES:
            return False
        block, text = b"-", ""
        while block and not text:  # a block may end, or be, inside of a character
            block = self._stream.read(max(_BLOCK_BYTES, rest))
            text = self._utf8.decode(block, final=not block)
        if text:
            self._bad_bytes |= _has_surrogates(text)
            self._window, self._at = self._window[self._at :] + text, 0
        return bool(text)

    def _too_long(self) -> str:
        too_long = len(self._window) - self._at > MAX_RECORD_BYTES
        return f"no end within {MAX_RECORD_BYTES} characters; " if too_long else ""


def _checked(row: Any, *, doubtful: bool) -> Values:
    """The row, if it is an object. A doubtful one's text is searched for what is no text."""
    if not isinstance(row, dict):
        raise Fault(f"expected an object of columns, found {type(row).__name__}")
    for name, value in row.items() if doubtful else ():
        if _has_surrogates(json.dumps([name, value], ensure_ascii=False)):
            raise Fault(f"column {name!a} holds bytes that are not UTF-8, or half a surrogate pair")
    return row


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
