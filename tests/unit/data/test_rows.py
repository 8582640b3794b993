"""`read_rows`: the same rows from every kind of file, where they lie, and what damage does."""

import csv
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from internlm_lib.data.files import kind_of
from internlm_lib.data.records import Damage, RecordError, Row, read_rows
from internlm_lib.errors import InputError

ROWS: list[dict[str, Any]] = [
    {"question": "Add.", "context": "1 2", "answer": "3"},
    {"question": "Say “hi”,\nplease.", "context": "", "answer": 'hi "there"'},
    {"question": "说", "context": "\ttab", "answer": "\U0001f600 \\ud83d"},
]
KINDS = ["parquet", "arrow", "json", "jsonl", "csv"]
SUFFIXES = ["", ".gz", ".zst"]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as the name says; of `.txt`, their `text`."""
    kind, _, suffix = path.name.partition(".")[2].partition(".")
    plain = path.with_name(f"plain.{kind}")
    _WRITERS[kind](plain, rows)
    codec = {"": None, "gz": "gzip", "zst": "zstd"}[suffix]
    with pyarrow.output_stream(str(path), compression=codec) as stream:
        stream.write(plain.read_bytes())
    plain.unlink()
    return path


def write_arrow(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    table = pyarrow.Table.from_pylist(list(rows))
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


_WRITERS: dict[str, Callable[[Path, Sequence[dict[str, Any]]], Any]] = {
    "parquet": lambda path, rows: pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(list(rows)), path, row_group_size=2
    ),
    "arrow": write_arrow,
    "json": lambda path, rows: path.write_text(json.dumps(rows, indent=1, ensure_ascii=False)),
    "jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    "csv": write_csv,
    "txt": lambda path, rows: path.write_text("".join(row["text"] + "\n" for row in rows)),
}
PLACES = {
    "parquet": ["row 0", "row 1", "row 2"],
    "arrow": ["row 0", "row 1", "row 2"],
    "json": ["row 0", "row 1", "row 2"],
    "jsonl": ["line 1", "line 2", "line 3"],
    "csv": ["line 2", "line 3", "line 5"],
    "txt": ["line 1", "line 2", "line 3"],
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str, suffix: str) -> None:
    file = write(tmp_path / f"a.{kind}{suffix}", ROWS)
    places = [f"{file}, {place}" for place in PLACES[kind]]
    expected = [Row(values, where) for values, where in zip(ROWS, places, strict=True)]
    assert list(read_rows([file])) == expected


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_lines_of_text(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path / f"a.txt{suffix}", [{"text": t} for t in ("  say ", "a\rb\r", "说")])
    rows = [(row.values, row.where) for row in read_rows([file])]
    places = [f"{file}, {place}" for place in PLACES["txt"]]
    assert rows == list(zip([{"text": t} for t in ("  say ", "a\rb", "说")], places, strict=True))


def test_sources_are_read_one_behind_the_other(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    last = write(tmp_path / "a.csv", ROWS[2:])
    write(tmp_path / "folder/1.jsonl", ROWS[:1])
    write(tmp_path / "folder/2.jsonl.gz", ROWS[1:2])
    rows = read_rows([tmp_path / "folder", last])
    assert [row.values for row in rows] == ROWS


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_mapped(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path / f"a.{kind}", ROWS)

    def first(columns: dict[str, str]) -> Any:
        return next(read_rows([file], columns=columns)).values

    assert first({"instruction": "question", "output": "answer"}) == {
        "instruction": "Add.",
        "context": "1 2",
        "output": "3",
    }
    assert first({"question": "answer", "answer": "question"}) == {
        "question": "3",
        "context": "1 2",
        "answer": "Add.",
    }, "swapped"
    assert first({"question": "answer"}) == {"question": "3", "context": "1 2"}, "hidden"
    rows = read_rows([file], columns={"input": "context"})
    assert [row.values["input"] for row in rows] == ["1 2", "", "\ttab"]


@pytest.mark.parametrize("kind", [*KINDS, "txt"])
def test_a_mapped_column_that_is_missing(tmp_path: Path, kind: str) -> None:
    rows = [{"text": "a"}] if kind == "txt" else ROWS
    file = write(tmp_path / f"a.{kind}", rows)
    found = ", ".join(rows[0])
    if kind in ("parquet", "arrow", "csv"):  # which name their columns in front
        with pytest.raises(InputError, match=r"column 'reply' \(mapped to 'o'\) is missing"):
            next(read_rows([file], columns={"o": "reply"}))
    for on_damage in ("stop", "count"):
        reader = read_rows([file], columns={"o": "reply"}, on_damage=on_damage, damage=Damage())
        with pytest.raises(
            InputError, match=r"column 'reply' \(mapped to 'o'\) is missing; found "
        ) as error:
            list(reader)
        assert str(file) in str(error.value) and str(error.value).endswith(found)


def test_a_mapped_column_may_be_missing_in_some_objects(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"a": "1"}, {"a": "2", "b": "x"}])
    rows = [row.values for row in read_rows([file], columns={"input": "b"})]
    assert rows == [{"a": "1"}, {"a": "2", "input": "x"}]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_are_read_in_the_needed_columns_alone(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path / f"a.{kind}", ROWS)
    (row,) = read_rows([write(tmp_path / f"b.{kind}", ROWS[:1])], only=("answer", "other"))
    assert row.values == {"answer": "3"}
    row = next(read_rows([file], only=("output",), columns={"output": "answer"}))
    assert row.values == {"output": "3"}
    with pytest.raises(InputError, match="column 'x' is missing; found question, context, answer"):
        next(read_rows([file], only=("x", "y")))


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_what_they_are(tmp_path: Path, kind: str) -> None:
    values = {"n": 1, "x": 0.5, "none": None, "turns": [{"from": "human", "value": "hi"}]}
    (row,) = read_rows([write(tmp_path / f"a.{kind}", [values])])
    expected = (
        values if kind != "csv" else {n: "" if v is None else str(v) for n, v in values.items()}
    )
    assert row.values == expected


DAMAGED = {
    "jsonl": (b'{"a": "1"}\n{"a": \n\n{"a": "4"}\n', "line 2: not valid JSON: Expecting value"),
    "json": (
        b'[{"a": "1"}, {"a": "\xff"}, {"a": "4"}]',
        "row 1: column 'a' holds bytes that are n",
    ),
    "csv": (b"a,b\n1,\n2\n4,\n", "line 3: 1 fields for 2 columns"),
    "txt": (b"1\n2\xff\n4", "line 2: not UTF-8: byte 0xff at position 1"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_record_stops_or_is_counted(tmp_path: Path, kind: str) -> None:
    content, message = DAMAGED[kind]
    file = tmp_path / f"a.{kind}"
    file.write_bytes(content)
    reader = read_rows([file])
    assert "1" in next(reader).values.values()
    with pytest.raises(RecordError, match=f"a.{kind}, {message}"):
        next(reader)
    damage = Damage()
    rows = list(read_rows([file], on_damage="count", damage=damage))
    assert [next(iter(row.values.values())) for row in rows] == ["1", "4"]
    assert damage.count == 1 and damage.first[0].startswith(f"{file}, {message}")


def test_damage_is_counted_over_all_files_and_listed_in_part(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"a": "1"}\n' + "[]\n" * 15)
    damage = Damage()
    assert len(list(read_rows([tmp_path], on_damage="count", damage=damage))) == 2
    assert damage.count == 30 and len(damage.first) == 20
    assert damage.first[0].endswith("a.jsonl, line 2: expected an object of columns, found list")
    assert damage.first[19].startswith(f"{tmp_path / 'b.jsonl'}, line 6: ")


def test_counting_needs_something_to_count_in(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a Damage"):
        next(read_rows([write(tmp_path / "a.jsonl", ROWS)], on_damage="count"))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", [*KINDS, "txt"])
def test_files_without_records_are_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    nothing = {"json": b"[ ]", "csv": b"a,b\n", "txt": b"\n \n\r\n", "jsonl": b"\xef\xbb\xbf\n"}
    file = tmp_path / f"a.{kind}{suffix}"
    for content in {b"", nothing.get(kind, b"")}:
        with pyarrow.output_stream(str(file)) as stream:
            stream.write(content)
        with pytest.raises(
            InputError, match=f"a.{kind}{suffix}: (holds no records|not a readable)"
        ):
            list(read_rows([file], on_damage="count", damage=Damage()))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_without_rows_are_refused(tmp_path: Path, kind: str) -> None:
    table = pyarrow.table({"a": pyarrow.array([], pyarrow.string())})
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        pyarrow.ipc.new_file(str(file), table.schema).close()
    with pytest.raises(InputError, match="holds no records"):
        list(read_rows([file]))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt", "json"])
def test_a_packed_file_that_is_cut_off_stops_whatever_is_chosen(tmp_path: Path, kind: str) -> None:
    rows = [{"text": f"{number} {number**9}"} for number in range(60_000)]
    file = write(tmp_path / f"a.{kind}.gz", rows)
    file.write_bytes(file.read_bytes()[:-20])
    read: list[Any] = []
    with pytest.raises(InputError, match=rf"a\.{kind}\.gz: not a readable .*Truncated"):
        for row in read_rows([file], on_damage="count", damage=Damage()):
            read.append(row.values)
    assert 0 < len(read) < len(rows) and read == rows[: len(read)]


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match="a.jsonl: cannot be read: No such file or directory"):
        list(read_rows([tmp_path]))


def test_rows_and_errors_travel_to_other_processes(tmp_path: Path) -> None:
    row = next(read_rows([write(tmp_path / "a.jsonl", ROWS)]))
    assert pickle.loads(pickle.dumps(row)) == row
    error = pickle.loads(pickle.dumps(RecordError(f"{row.where}: why")))
    assert isinstance(error, InputError) and str(error) == f"{row.where}: why"


MEASURE = """
import sys
from pathlib import Path
import pyarrow.parquet
from internlm_lib.data.records import read_rows
def peak():  # not ru_maxrss, which begins with the peak of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
before = peak()
rows = sum(1 for _ in read_rows([Path(sys.argv[1])]))
print(rows, (peak() - before) // 1024)
"""
LARGE_ROWS, LARGE_TEXT = 100_000, "Two thousand characters, all alike. " * 56
LARGE: dict[str, tuple[str, str, str]] = {
    # What is in front of the rows, each row with its end, what is behind them.
    "json": ("[{}", f',\n{{"text": "{LARGE_TEXT}"}}', "]"),
    "jsonl": ('{"text": ""}\n', f'{{"text": "{LARGE_TEXT}"}}\n', ""),
    "csv": ("text,n\n,0\n", f'"{LARGE_TEXT}",1\n', ""),
    "txt": ("-\n", f"{LARGE_TEXT}\n", ""),
}


def write_large(file: Path) -> None:
    """200 MB; a table in one row group or one batch."""
    kind = kind_of(file)
    if kind in LARGE:
        front, row, end = (part.encode() for part in LARGE[kind])
        with pyarrow.output_stream(str(file)) as stream:
            stream.write(front)
            for _ in range(LARGE_ROWS):
                stream.write(row)
            stream.write(end)
        return
    table = pyarrow.table({"text": [LARGE_TEXT] * (LARGE_ROWS + 1)})
    if kind == "arrow":
        with pyarrow.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table)
    else:
        pyarrow.parquet.write_table(table, file, compression="none", use_dictionary=False)


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.arrow", "a.arrow.zst", "a.json", "a.jsonl.zst", "a.csv", "a.txt"]
)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name == "a.arrow.zst":
        write_large(tmp_path / "a.arrow")
        with pyarrow.output_stream(str(file)) as stream, (tmp_path / "a.arrow").open("rb") as plain:
            shutil.copyfileobj(plain, stream, 1 << 20)
    else:
        write_large(file)
    command = [sys.executable, "-c", MEASURE, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, mib = map(int, done.stdout.split())
    assert count == LARGE_ROWS + 1
    print(name, mib)
    assert mib < 100
