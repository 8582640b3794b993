"""The text that a model is shown, to the last blank, and the questions that are chosen."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from internlm_lib.data.questions import Question, Subject, write_subjects
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import InputError
from internlm_lib.evaluation.harness import harness_scores
from internlm_lib.evaluation.questions import questions_folder, select_subjects
from internlm_lib.evaluation.tasks import PROTOCOLS, build_task
from internlm_lib.experiment.schema import EvaluationSection
from internlm_lib.run_folder import RunFolder

CLOZE = """The following are questions about world religions.

Question: 2 + 2?
Answer: 4

Question: Say {{no}}.
Answer: no

Question: Which?
Answer:"""

LETTER = """The following are multiple choice questions (with answers) about world religions.

2 + 2?
A. 1
B. 2
C. 3
D. 4
Answer: D

Say {{no}}.
A. yes
B. no
C. NA
D. None
Answer: B

Which?
A. None
B. NA
C. null
D. a word or two
Answer:"""

ONE_BLANK_SHA256 = "c1c58478d384375de1d228c8d46206d24f9eaeafd0479246b7439f9722acefff"
"""Of the harness's header for abstract_algebra, recorded from the harness's own MMLU tasks."""


def asked(subject: Subject, protocol: str) -> list[tuple[str, str]]:
    """(context, continuation) of all requests of a task."""
    task = build_task(subject, protocol)
    task.build_all_requests()
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize(
    ("protocol", "context", "continuations"),
    [
        ("cloze", CLOZE, [" None", " NA", " null", " a word or two"]),
        ("letter", LETTER, [" A", " B", " C", " D"]),
    ],
)
def test_the_model_is_shown_exactly_this(
    subject: Subject, protocol: str, context: str, continuations: list[str]
) -> None:
    requests = asked(subject, protocol)
    assert len(requests) == 4 * len(subject.test)
    assert requests[:4] == [(context, continuation) for continuation in continuations]


def test_without_exemplars_only_header_and_question_are_shown(subject: Subject) -> None:
    zero = Subject(subject.name, (), subject.test)
    with_header = "The following are questions about world religions.\n\nQuestion: Which?\nAnswer:"
    assert asked(zero, "cloze")[0] == (with_header, " None")


def test_letter_header_is_the_harness_own() -> None:
    header = PROTOCOLS["letter"].header.format(subject="abstract algebra")
    assert hashlib.sha256(header.encode()).hexdigest() == ONE_BLANK_SHA256


class Oracle:
    """Finds the liked words likely and all others not; a blank before a word costs nothing."""

    max_length = 1024

    def __init__(self, tokenizer: Tokenizer, liked: set[str]) -> None:
        self.tokenizer, self.liked = tokenizer, liked

    def score(self, tokens: Any, rows: Any, positions: Any, targets: Any) -> Any:
        import torch

        words = [self.tokenizer.decode([t]).strip() for t in targets.tolist()]
        scores = [0.0 if not word else -0.1 if word in self.liked else -5.0 for word in words]
        return torch.tensor(scores), torch.zeros(len(scores), dtype=torch.bool)


def test_accuracy_counts_the_questions_answered_right(
    subject: Subject, tokenizer: Tokenizer
) -> None:
    evaluation = EvaluationSection(num_fewshot=2, protocols=("letter",))
    model = Oracle(tokenizer, {"A"})
    rows, predictions, shortened = harness_scores(model, tokenizer, [subject], evaluation)
    assert shortened == 0
    assert rows == [
        {"protocol": "letter", "subject": "world_religions", "questions": 3,
         "accuracy": pytest.approx(1 / 3), "accuracy_norm": pytest.approx(1 / 3)}
    ]  # fmt: skip
    assert [p["predicted"] for p in predictions] == ["A", "A", "A"]
    assert [p["correct"] for p in predictions] == [False, True, False]
    assert predictions[0]["question"] == "Which?"
    assert predictions[0]["options"] == ["None", "NA", "null", "a word or two"]
    assert predictions[0]["log_likelihoods"] == pytest.approx([-0.1, -5, -5, -5])


def test_protocols_score_different_things(subject: Subject, tokenizer: Tokenizer) -> None:
    model = Oracle(tokenizer, {"Z", "B"})
    evaluation = EvaluationSection(num_fewshot=0)
    last = Subject(subject.name, (), (Question("Last?", ("W", "X", "Y", "Z"), "D"),))
    rows, _, _ = harness_scores(model, tokenizer, [last], evaluation)
    assert {row["protocol"]: row["accuracy"] for row in rows} == {"cloze": 1, "letter": 0}


def test_subjects_are_cut_from_the_front(subject: Subject, tmp_path: Path) -> None:
    write_subjects((subject,), tmp_path)
    (cut,) = select_subjects(tmp_path, EvaluationSection(num_fewshot=1, limit=2))
    assert cut == Subject(subject.name, subject.dev[:1], subject.test[:2])
    (whole,) = select_subjects(tmp_path, EvaluationSection(num_fewshot=2))
    assert whole == subject


def test_too_few_exemplars_are_named(subject: Subject, tmp_path: Path) -> None:
    write_subjects((subject,), tmp_path)
    with pytest.raises(
        InputError, match=r"world_religions_dev.csv: 2 exemplars, .*num_fewshot = 5"
    ):
        select_subjects(tmp_path, EvaluationSection())


def test_missing_questions_say_how_to_get_them(subject: Subject, tmp_path: Path) -> None:
    folder = RunFolder.of("r", tmp_path)
    with pytest.raises(InputError, match="runs/r/data/questions: no questions there"):
        questions_folder(folder, EvaluationSection())
    write_subjects((subject,), tmp_path / "mine")
    assert questions_folder(folder, EvaluationSection(questions_path="mine")) == tmp_path / "mine"
