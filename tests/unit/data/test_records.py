"""Alpaca-schema records: every accepted form, and errors that name file, row and column."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from internlm_lib.data.records import Record, RecordError, Row, read_rows, text_of
from internlm_lib.errors import InputError

ROWS: list[dict[str, Any]] = [
    {"instruction": "Add.", "input": "1 2", "output": "3", "text": "ignored"},
    {"instruction": "Say hi.", "input": "", "output": "hi\n“there”", "text": "ignored"},
]
RECORDS = [Record("Add.", "1 2", "3"), Record("Say hi.", "", "hi\n“there”")]


def read_records(path: Path) -> Iterator[Record]:
    """The columns of Alpaca's schema, whatever others there are."""
    names = ("instruction", "input", "output")
    for row in read_rows([path], only=names):
        yield Record(*(text_of(row, name, optional=name == "input") for name in names))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "a.jsonl", "A.JSONL"])
def test_all_forms_give_the_same_records(tmp_path: Path, name: str) -> None:
    assert list(read_records(write(tmp_path / name, ROWS))) == RECORDS


def test_folder_is_read_in_the_order_of_names_and_other_files_are_left_alone(
    tmp_path: Path,
) -> None:
    write(tmp_path / "data/train-1.parquet", ROWS[1:])
    write(tmp_path / "data/train-0.parquet", ROWS[:1])
    write(tmp_path / ".cache/old.parquet", ROWS)
    (tmp_path / "README.md").write_text("a data set")
    assert list(read_records(tmp_path)) == RECORDS


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "a.jsonl"])
def test_input_may_be_null_or_absent(tmp_path: Path, name: str) -> None:
    rows = [{"instruction": "Go.", "output": "ok"}, {"instruction": "Go.", "input": None,
                                                      "output": "ok"}]  # fmt: skip
    assert [r.input for r in read_records(write(tmp_path / name, rows))] == ["", ""]


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "a.jsonl"])
def test_missing_column_is_named_with_file_and_row(tmp_path: Path, name: str) -> None:
    rows = [{"instruction": "Go.", "answer": "ok"}]
    place = "line 1" if name == "a.jsonl" else "row 0"
    with pytest.raises(InputError, match=rf"{name}, {place}: column 'output' is missing; found"):
        list(read_records(write(tmp_path / name, rows)))


def test_value_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [ROWS[0], {"instruction": "Add.", "output": 3}])
    reader = read_records(path)
    assert next(reader) == RECORDS[0]
    with pytest.raises(InputError, match=r"row 1: column 'output' = 3 is not text"):
        next(reader)


def test_parquet_without_any_alpaca_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"question": "?"}])
    with pytest.raises(InputError, match="column 'instruction' is missing; found question"):
        list(read_records(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '"instruction"', "expected a list of records or one object per line"),
        ("a.json", '{\n "a": [{"b": 1}]\n}', "found neither .line 1: not valid JSON"),
        ("a.json", "[]", "holds no records"),
        ("a.json", '["x"]', "row 0: expected an object of columns, found str"),
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n{oops', "line 2: not valid JSON"),
        ("a.parquet", "text", "not a readable parquet file"),
        ("a.csv", "instruction,output", "holds no records"),
        ("a.tsv", "instruction\toutput", r"records are read from \.parquet, .*, not from '.tsv'"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        list(read_records(tmp_path / name))
    assert name in str(error.value)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        list(read_records(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="holds no records; their files are named .parquet"):
        list(read_records(tmp_path))
    write(tmp_path / "a.json", ROWS)
    write(tmp_path / "a.parquet", ROWS)
    with pytest.raises(InputError, match=r"holds \.json and \.parquet files; give one"):
        list(read_records(tmp_path))


def test_text_of_a_value() -> None:
    row = Row({"a": "x", "b": None, "c": ["y"] * 1000}, "f.jsonl, line 3")
    assert (text_of(row, "a"), text_of(row, "b", optional=True)) == ("x", "")
    assert text_of(row, "d", optional=True) == ""
    for name, message in {
        "b": "column 'b' = None is not text",
        "c": r"column 'c' = \['y', .*\.\.\.\] is not text",
        "d": "column 'd' is missing; found a, b, c",
    }.items():
        with pytest.raises(RecordError, match=f"f.jsonl, line 3: {message}") as error:
            text_of(row, name)
        assert len(str(error.value)) < 100
    with pytest.raises(RecordError, match="is not text"):
        text_of(row, "c", optional=True)
