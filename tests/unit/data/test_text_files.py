"""Readers of txt, jsonl, json and csv: whatever is written is read; damage stays in its record."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internlm_lib.data import text_files
from internlm_lib.data.records import Damage, read_rows
from internlm_lib.errors import InputError

quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(), values, max_size=4)


def read(file: Path, content: bytes) -> tuple[list[Any], list[str]]:
    """The rows of a file with such content, and the damage that was counted."""
    file.write_bytes(content)
    damage = Damage()
    rows = [row.values for row in read_rows([file], on_damage="count", damage=damage)]
    return rows, [message.removeprefix(f"{file}, ") for message in damage.first]


def places(damage: Sequence[str]) -> list[str]:
    return [message.partition(":")[0] for message in damage]


@quick
@given(
    rows=st.lists(objects, min_size=1),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    mark=st.sampled_from(["", "\ufeff"]),
    block=st.integers(1, 9),
)
def test_a_json_list_is_read_through_a_window_of_any_size(
    tmp_path: Path, rows: list[Any], indent: int | None, ascii_only: bool, mark: str, block: int
) -> None:
    text = mark + json.dumps(rows, indent=indent, ensure_ascii=ascii_only) + "\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_BLOCK_BYTES", block)
        assert read(tmp_path / "a.json", text.encode()) == (rows, [])


@quick
@given(rows=st.lists(objects, min_size=1), end=st.sampled_from(["\n", "\r\n", "\n\n \n"]))
def test_json_lines(tmp_path: Path, rows: list[Any], end: str) -> None:
    text = end.join(json.dumps(row, ensure_ascii=False) for row in rows)
    for name in ("a.jsonl", "a.json"):  # one object per line, as many a published .json is
        for mark in ("", "\ufeff"):
            assert read(tmp_path / name, (mark + text).encode()) == (rows, [])


@quick
@given(
    names=st.lists(st.text(min_size=1), min_size=2, max_size=4, unique=True),
    fields=st.lists(st.lists(st.text(), min_size=4, max_size=4), min_size=1),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_csv(tmp_path: Path, names: list[str], fields: list[list[str]], quoting: Any) -> None:
    # Python before 3.11 reads no NUL, and writes a lone "\r" without quotes.
    names, *fields = [
        [f.replace("\0", "").replace("\r", "\r\n") for f in row] for row in [names, *fields]
    ]
    if len(set(names)) < len(names):
        return
    out = io.StringIO(newline="")
    csv.writer(out, quoting=quoting).writerows([names, *(row[: len(names)] for row in fields)])
    expected = [dict(zip(names, row, strict=False)) for row in fields]
    assert read(tmp_path / "a.csv", out.getvalue().encode()) == (expected, [])


@quick
@given(before=st.integers(1, 3), line=st.binary(), behind=st.integers(0, 3))
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_damage_stays_in_its_line(
    tmp_path: Path, name: str, before: int, line: bytes, behind: int
) -> None:
    line = line.replace(b"\n", b"")
    good = [{"text": "{}"}, {"text": "é"}, {"text": "3"}]
    form = (lambda row: row["text"]) if name == "a.txt" else json.dumps
    content = [form(row).encode() for row in good[:before]] + [line]
    content += [form(row).encode() for row in good[:behind]]
    rows, damage = read(tmp_path / name, b"\n".join(content))
    assert rows[:before] == good[:before]
    assert rows[len(rows) - behind :] == good[:behind]
    assert places(damage) in ([], [f"line {before + 1}"])
    inside = len(rows) - before - behind
    try:
        text = line.decode()
    except UnicodeDecodeError:
        assert damage[0].startswith(f"line {before + 1}: not UTF-8: byte 0x") and inside == 0
        return
    if name == "a.txt":
        assert inside == (text.strip() != "") and not damage
    else:
        assert inside + len(damage) == (text.strip() != "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "not valid JSON: Expecting ',' delimiter at character 8"),
        (b'{"a": 1} {"a": 2}', "not valid JSON: Extra data at character 9"),
        (b'["a"]', "expected an object of columns, found list"),
        (b"null", "expected an object of columns, found NoneType"),
        (b"[" * 100_000, "not valid JSON: maximum recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (
            b'{"a": [{"b": "x\\ud83d"}]}',
            "column 'a' holds bytes that are not UTF-8, or half a surr",
        ),
        (b'{"a": "\\uDE00\\uD83D"}', "column 'a' holds bytes that are not UTF-8, or half a surr"),
        (b'{"\\udc00": ""}', r"column '\udc00' holds bytes that are not UTF-8, or half a surr"),
        (b'{"a": "\xed\xa0\xbd"}', "not UTF-8: byte 0xed at position 7"),
        (b'{"a": "\xff"}', "not UTF-8: byte 0xff at position 7"),
    ],
)
def test_lines_that_are_no_objects(tmp_path: Path, line: bytes, message: str) -> None:
    rows, damage = read(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}')
    assert rows == [{"a": 1}, {"a": 3}]
    assert len(damage) == 1 and damage[0].startswith(f"line 2: {message}")


def test_characters_that_are_escaped_as_pairs(tmp_path: Path) -> None:
    line = rb'{"a": "\ud83d\ude00 \\ud83d"}'
    expected = [{"a": "\U0001f600 \\ud83d"}]
    assert read(tmp_path / "a.jsonl", line) == (expected, [])
    assert read(tmp_path / "a.json", b"[" + line + b"]") == (expected, [])


def test_what_python_writes_as_json_is_read(tmp_path: Path) -> None:
    rows = [{"a": 10**30, "b": [1.5, float("inf")], "c": {"d": None}}]
    assert read(tmp_path / "a.json", json.dumps(rows).encode()) == (rows, [])


def test_json_lists_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 1)  # numbers are cut at every digit
    rows, damage = read(tmp_path / "a.json", b'[12, 3.5e2, "x", {"a": 67}, null]')
    assert rows == [{"a": 67}]
    kinds = enumerate(["int", "float", "str", "dict", "NoneType"])
    expected = [f"row {n}: expected an object of columns, found {kind}" for n, kind in kinds]
    assert damage == [*expected[:3], expected[4]]


def test_half_of_an_escaped_pair_in_a_json_list(tmp_path: Path) -> None:
    rows, damage = read(tmp_path / "a.json", rb'[{"a": "\ud83d"}, {"a": "\ud83d\ude00"}]')
    assert rows == [{"a": "\U0001f600"}] and places(damage) == ["row 0"]


def test_records_of_a_json_list_that_are_damaged(tmp_path: Path) -> None:
    content = b'[{"a": "1"}, {"a": "\xff"}, "x", {"b": "\\ud800"}, {"\xc3\xa9": "5"}, {"\xc3": 6}]'
    rows, damage = read(tmp_path / "a.json", content)
    assert rows == [{"a": "1"}, {"é": "5"}]
    assert [message.split(" hold")[0] for message in damage] == [
        "row 1: column 'a'",
        "row 2: expected an object of columns, found str",
        "row 3: column 'b'",
        r"row 5: column '\udcc3'",
    ]


@pytest.mark.parametrize(
    ("content", "read_before", "message"),
    [
        (
            '[{"a": 1}, {"a" 2}, {"a": 3}]',
            1,
            "row 1: not valid JSON: Expecting ':' delimiter at '2}",
        ),
        ('[{"a": 1}, {"a": 2}', 2, "row 2: not valid JSON: expected , or ], found the end"),
        ('[{"a": 1}, {"a": "tw', 1, "row 1: not valid JSON: Unterminated string"),
        ('[{"a": 1},', 1, "row 1: not valid JSON: Expecting value at ''"),
        ('[{"a": 1}, ]', 1, "row 1: not valid JSON: Expecting value at ']'"),
        ('[{"a": 1} {"a": 2}]', 1, "row 1: not valid JSON: expected , or ], found {"),
        ('[{"a": 1}] x', 1, "row 1: not valid JSON: expected the end, found x"),
        ('[{"a": 1}][{"a": 2}]', 1, r"row 1: not valid JSON: expected the end, found ["),
        ('[{"a": 1}, ' + "[" * 100_000, 1, "row 1: not valid JSON: maximum recursion"),
    ],
)
def test_a_broken_json_list_stops_whatever_is_chosen(
    tmp_path: Path, content: str, read_before: int, message: str
) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    reader = read_rows([file], on_damage="count", damage=Damage())
    for number in range(read_before):
        assert next(reader).values == {"a": number + 1}
    with pytest.raises(InputError) as error:
        next(reader)
    assert str(error.value).startswith(f"{file}, {message}")
    assert "write it with one object per line, as .jsonl" in str(error.value)


def test_records_without_an_end_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MAX_RECORD_BYTES", 100)
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 7)
    fits, long = ('{"a": "%s"}' % ("x" * count) for count in (90, 92))
    content = f'{fits}\n{long}\n{{"a": "3"}}\n{fits}\n{long}'
    assert len(f"{fits}\n") == 100 and len(long) == 101
    rows, damage = read(tmp_path / "a.jsonl", content.encode())
    assert rows == [{"a": "x" * 90}, {"a": "3"}, {"a": "x" * 90}]
    assert damage == [f"line {number}: longer than 100 bytes" for number in (2, 5)]
    with pytest.raises(
        InputError, match="row 1: not valid JSON: no end within 100 characters; Unterm"
    ):
        read(tmp_path / "a.json", f'[{fits}, {{"a": "{"y" * 1000}"}}]'.encode())


def test_csv_that_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (
        b'\xef\xbb\xbfa,b\r\n1,"x\ny"\r\n2\r\n3,"\n\xff"\r\n\r\n4,"z"z\r\n5,,\r\n6,""""\r\n7,"open'
    )
    rows, damage = read(tmp_path / "a.csv", content)
    assert rows == [{"a": "1", "b": "x\ny"}, {"a": "6", "b": '"'}]
    assert damage == [
        "line 4: 1 fields for 2 columns",
        "line 5: column 'b' holds bytes that are not UTF-8, or half a surrogate pair",
        "line 8: ',' expected after '\"'",
        "line 9: 3 fields for 2 columns",
        "line 11: unexpected end of data",
    ]


def test_csv_fields_may_be_long_but_must_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "x" * 200_000  # more than Python's own limit
    rows, damage = read(tmp_path / "a.csv", f'a,b\n"{long}\n",1\n'.encode())
    assert rows == [{"a": long + "\n", "b": "1"}] and not damage
    limit = csv.field_size_limit()
    try:
        csv.field_size_limit(50)
        monkeypatch.setattr(text_files, "MAX_RECORD_BYTES", 100)
        rows, damage = read(tmp_path / "a.csv", b'a,b\n1,"' + b"x\n" * 60 + b"\n2,2\n")
    finally:
        csv.field_size_limit(limit)
    assert damage[0] == "line 2: field larger than field limit (100)"
    assert rows == [{"a": "2", "b": "2"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'a,"b', "line 1: no names of columns: unexpected end of data"),
        (b"a,\xff\n1,2\n", "line 1: the names of the columns are not UTF-8"),
        (b"a,b,a\n1,2,3\n", "two columns have the same name; found a, b, a"),
    ],
)
def test_csv_without_names_of_columns(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.csv", content)
