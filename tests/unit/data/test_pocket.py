"""The pocket world: the same for a seed, fair as a test, and not answerable by copying."""

import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest

from internlm_lib.data.pocket import PocketWorld, make_pocket_world, write_pocket_world
from internlm_lib.data.prompts import TEMPLATES
from internlm_lib.data.questions import Question, read_subjects
from internlm_lib.data.records import Record, read_rows, text_of
from internlm_lib.files import sha256_of

SEEDS = (1, 7, 1234)


@pytest.fixture(scope="module", params=SEEDS)
def world(request: pytest.FixtureRequest) -> PocketWorld:
    return make_pocket_world(request.param)


def all_questions(world: PocketWorld) -> list[Question]:
    return [q for subject in world.subjects for q in (*subject.dev, *subject.test)]


def test_equal_seeds_give_equal_bytes_and_others_do_not(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write_pocket_world(make_pocket_world(seed), tmp_path / name)
    assert sha256_of(tmp_path / "a") == sha256_of(tmp_path / "b")
    assert sha256_of(tmp_path / "a/questions") != sha256_of(tmp_path / "c/questions")
    assert sha256_of(tmp_path / "a/records.parquet") != sha256_of(tmp_path / "c/records.parquet")


def test_files_hold_the_world(world: PocketWorld, tmp_path: Path) -> None:
    write_pocket_world(world, tmp_path)
    rows = read_rows([tmp_path / "records.parquet"])
    names = ("instruction", "input", "output")
    assert tuple(Record(*(text_of(row, n) for n in names)) for row in rows) == world.records
    assert tuple(read_subjects(tmp_path / "questions")) == world.subjects


def test_text_column_is_rendered_as_in_the_published_data_set(tmp_path: Path) -> None:
    write_pocket_world(make_pocket_world(1), tmp_path)
    rows = pyarrow.parquet.read_table(tmp_path / "records.parquet").to_pylist()
    assert list(rows[0]) == ["instruction", "input", "output", "text"]
    for row in rows:
        assert row["text"].startswith("Below is an instruction that describes a task")
        assert row["text"].endswith(f"### Response:\n{row['output']}")
        assert ("### Input:" in row["text"]) == bool(row["input"])


def test_no_question_is_in_the_training_text(world: PocketWorld) -> None:
    rendered = (TEMPLATES["question_answer"].document(record) for record in world.records)
    text = "\n".join(rendered).lower()
    assert not [q.text for q in all_questions(world) if q.text.lower() in text]


def test_every_answer_is_in_the_training_text_with_what_is_asked(world: PocketWorld) -> None:
    """Some record has the answer, and every name or number of the question."""
    known = Counter((name, record.output) for record in world.records for name in names(record))
    for question in all_questions(world):
        for name in re.findall(r"\b[A-Z][a-z]*\b|\d+", question.text.removeprefix("Do")):
            assert known[name, question.answer_text] >= 6, question


def names(record: object) -> set[str]:
    return set(re.findall(r"\b[A-Z][a-z]*\b|\d+", f"{record}"))


def test_a_thing_is_told_one_way_only(world: PocketWorld) -> None:
    """Equal questions have equal answers: the world does not contradict itself."""
    answers: dict[tuple[str, str], set[str]] = {}
    for record in world.records:
        answers.setdefault((record.instruction, record.input), set()).add(record.output)
    assert {len(each) for each in answers.values()} == {1}
    assert len(answers) == len(world.records)


def test_options_are_four_of_one_kind(world: PocketWorld) -> None:
    trained_answers = {record.output for record in world.records}
    for question in all_questions(world):
        assert len(set(question.options)) == 4
        assert question.options["ABCD".index(question.answer)] == question.answer_text
        # Numbers may be off the table of sums; all else is an answer to another question.
        assert all(o in trained_answers or o.isdigit() for o in question.options)


def test_numbers_have_as_many_digits_as_the_answer(world: PocketWorld) -> None:
    arithmetic = next(s for s in world.subjects if s.name == "arithmetic")
    for question in arithmetic.test:
        assert {len(option) for option in question.options} == {len(question.answer_text)}


def test_letters_are_balanced_and_no_question_is_asked_twice(world: PocketWorld) -> None:
    assert [s.name for s in world.subjects] == sorted(s.name for s in world.subjects)
    for subject in world.subjects:
        assert Counter(q.answer for q in subject.test) == dict.fromkeys("ABCD", 10)
        texts = [q.text for q in (*subject.dev, *subject.test)]
        assert (len(subject.dev), len(set(texts))) == (5, 45)


def test_size_suits_a_tiny_model(world: PocketWorld) -> None:
    """Larger, and a minute of training on a CPU no longer learns it."""
    assert 2000 <= len(world.records) <= 2500
    assert 0.2 < sum(bool(record.input) for record in world.records) / len(world.records) < 0.4
    assert max(len(q.text) for q in all_questions(world)) <= 60
