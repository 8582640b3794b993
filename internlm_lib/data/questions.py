"""Multiple-choice questions in the original MMLU layout.

A folder holds `dev/<subject>_dev.csv` (exemplars) and `test/<subject>_test.csv`, each without a
header: question, A, B, C, D, letter of the answer. Source: the data archive of hendrycks/test.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from internlm_lib.errors import InputError
from internlm_lib.files import atomic_path

LETTERS = "ABCD"
SPLITS = ("dev", "test")


@dataclass(frozen=True)
class Question:
    """One question; `answer` is the letter of the right option."""

    text: str
    options: tuple[str, str, str, str]
    answer: str

    @property
    def answer_text(self) -> str:
        return self.options[LETTERS.index(self.answer)]


@dataclass(frozen=True)
class Subject:
    name: str
    dev: tuple[Question, ...]
    """Exemplars to show before a question, in this order."""
    test: tuple[Question, ...]
    """Questions to ask."""


def read_subjects(folder: Path) -> list[Subject]:
    """All subjects of a folder, in the order of their names.

    Raises:
        InputError: the layout is not MMLU's; the message names the file and the row.
    """
    names = {split: _subject_names(folder, split) for split in SPLITS}
    if alone := names["dev"] ^ names["test"]:
        name = sorted(alone)[0]
        missing = next(split for split in SPLITS if name not in names[split])
        raise InputError(
            f"{_csv_path(folder, name, missing)}: missing; "
            f"every subject needs dev/<subject>_dev.csv and test/<subject>_test.csv"
        )
    return [
        Subject(name, *(_read_questions(_csv_path(folder, name, split)) for split in SPLITS))
        for name in sorted(names["test"])
    ]


def write_subjects(subjects: tuple[Subject, ...], folder: Path) -> None:
    """Write subjects as `folder`, in place of whatever it held."""
    with atomic_path(folder) as temporary:
        for subject in subjects:
            for split, questions in (("dev", subject.dev), ("test", subject.test)):
                path = _csv_path(temporary, subject.name, split)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(_as_csv(questions), encoding="utf-8", newline="")


def _csv_path(folder: Path, subject: str, split: str) -> Path:
    return folder / split / f"{subject}_{split}.csv"


def _subject_names(folder: Path, split: str) -> set[str]:
    ending = f"_{split}.csv"
    names = {p.name.removesuffix(ending) for p in (folder / split).glob(f"*{ending}")}
    if not names:
        raise InputError(
            f"{folder / split}: holds no <subject>{ending}; expected the folder of MMLU's archive, "
            "with dev/<subject>_dev.csv and test/<subject>_test.csv"
        )
    return names


def _read_questions(path: Path) -> tuple[Question, ...]:
    # Not pandas: it would read the options None, NA and null as missing values.
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    if not rows:
        raise InputError(f"{path}: is empty; expected rows of question, A, B, C, D, answer")
    return tuple(_question(row, f"{path}, row {number}") for number, row in enumerate(rows, 1))


def _question(row: list[str], where: str) -> Question:
    if len(row) != 6:
        raise InputError(
            f"{where}: {len(row)} columns; expected 6 (question, A, B, C, D, answer), "
            "with quotes around a text that holds commas"
        )
    text, first, second, third, fourth, answer = row
    if len(answer) != 1 or answer not in LETTERS:
        raise InputError(
            f"{where}: answer = {answer!r}; allowed are A, B, C, D, and there is no header row"
        )
    return Question(text, (first, second, third, fourth), answer)


def _as_csv(questions: tuple[Question, ...]) -> str:
    text = io.StringIO()
    rows = ([q.text, *q.options, q.answer] for q in questions)
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
