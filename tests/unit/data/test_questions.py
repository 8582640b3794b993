"""The MMLU layout: written and read back equal, and refused where it is broken."""

from pathlib import Path

import pytest

from internlm_lib.data.questions import Question, Subject, read_subjects, write_subjects
from internlm_lib.errors import InputError

AWKWARD = Question('He said "a, b"\nand left', ("None", "NA", " null", "1,5"), "B")
PLAIN = Question("2 + 2?", ("1", "2", "3", "4"), "D")
SUBJECTS = (Subject("law", (PLAIN,), (AWKWARD, PLAIN)), Subject("sums", (AWKWARD,), (PLAIN,)))


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    write_subjects(SUBJECTS, tmp_path / "questions")
    assert tuple(read_subjects(tmp_path / "questions")) == SUBJECTS
    assert AWKWARD.answer_text == "NA"


def test_files_are_named_as_in_the_archive_and_have_no_header(tmp_path: Path) -> None:
    write_subjects(SUBJECTS, tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.csv")) == [
        "dev/law_dev.csv", "dev/sums_dev.csv", "test/law_test.csv", "test/sums_test.csv",
    ]  # fmt: skip
    assert (tmp_path / "test/sums_test.csv").read_text() == "2 + 2?,1,2,3,4,D\n"


def test_writing_again_removes_subjects_that_are_gone(tmp_path: Path) -> None:
    write_subjects(SUBJECTS, tmp_path / "questions")
    write_subjects(SUBJECTS[:1], tmp_path / "questions")
    assert [s.name for s in read_subjects(tmp_path / "questions")] == ["law"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q,a,b,c,d,A\nq,a,b,c,A\n", r"law_test.csv, row 2: 5 columns; expected 6"),
        ("question,A,B,C,D,answer\n", r"row 1: answer = 'answer'; allowed are A, B, C, D"),
        ("q,a,b,c,d,AB\n", r"row 1: answer = 'AB'"),
        ("q,a,b,c,d,\n", r"row 1: answer = ''"),
        ("", "law_test.csv: is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, content: str, message: str) -> None:
    write_subjects(SUBJECTS, tmp_path)
    (tmp_path / "test/law_test.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_subjects(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_subjects(SUBJECTS, tmp_path)
    (tmp_path / "dev/law_dev.csv").unlink()
    with pytest.raises(InputError, match=r"law_dev.csv: missing"):
        read_subjects(tmp_path)
    with pytest.raises(InputError, match=r"holds no <subject>_dev.csv"):
        read_subjects(tmp_path / "test")
