"""Stage 06: multiple-choice questions, before and after training.

The work is done in ranks (`evaluation/worker.py`); this process chooses questions and reads scores.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm_lib.data.questions import Subject
from internlm_lib.errors import KitError
from internlm_lib.evaluation.questions import CHANCE, questions_folder, select_subjects
from internlm_lib.evaluation.worker import evaluation_folder, progress_path, scores_path
from internlm_lib.files import read_json
from internlm_lib.generation.inference import inference_layout, weight_sets
from internlm_lib.ranks.launch import launch
from internlm_lib.stages.stage import Stage
from internlm_lib.training.nodes import device_name

WEIGHTS = ("before", "after")
ALL = "all"


@dataclass(frozen=True)
class Scores:
    """What came out, by (protocol, subject, weights)."""

    cells: Mapping[tuple[str, str, str], Mapping[str, Any]]
    shortened: int
    """Prompts that were too long for the model and lost their first exemplars."""

    @property
    def protocols(self) -> list[str]:
        return list(dict.fromkeys(protocol for protocol, _, _ in self.cells))

    @property
    def subjects(self) -> list[str]:
        return list(dict.fromkeys(subject for _, subject, _ in self.cells))

    def questions(self, protocol: str, weights: str) -> int:
        return sum(self.cells[protocol, s, weights]["questions"] for s in self.subjects)

    def accuracy(self, protocol: str, weights: str, subject: str = ALL) -> float:
        """Of one subject, or over all questions (each counts the same, whatever its subject)."""
        if subject != ALL:
            return float(self.cells[protocol, subject, weights]["accuracy"])
        cells = [self.cells[protocol, s, weights] for s in self.subjects]
        right = sum(cell["accuracy"] * cell["questions"] for cell in cells)
        return float(right / self.questions(protocol, weights))


def choose_questions(stage: Stage) -> list[Subject]:
    """The subjects to ask, cut to `num_fewshot` exemplars and `limit` questions each.

    Raises InputError if there are no questions, too few exemplars, or a malformed file.
    """
    evaluation = stage.experiment.evaluation
    return select_subjects(questions_folder(stage.folder, evaluation), evaluation)


def question_rows(subjects: list[Subject]) -> list[dict[str, Any]]:
    """One table row per subject."""
    return [
        {
            "subject": subject.name,
            "exemplars": len(subject.dev),
            "questions": len(subject.test),
            "first question": subject.test[0].text,
            "options": " | ".join(subject.test[0].options),
            "answer": subject.test[0].answer,
        }
        for subject in subjects
    ]


def score(stage: Stage, show: Callable[[str], None] = lambda text: None) -> Scores:
    """Ask both sets of weights all questions in all protocols, through the harness.

    Args:
        show: told how far the work is, in a line of text.
    Raises:
        WorkerError: a rank failed.
    """
    checkpoints = weight_sets(stage.folder, stage.experiment.model)
    stage.needs(checkpoints["before"], "02_convert")
    stage.needs(checkpoints["after"], "03_train")
    for old in (scores_path(stage.folder), progress_path(stage.folder)):
        old.unlink(missing_ok=True)
    started = time.monotonic()
    launch(
        "internlm_lib.evaluation.worker",
        stage.folder,
        world_size=inference_layout(stage.experiment.parallel.candidate).world_size,
        device=device_name(stage.experiment),
        environment=stage.experiment.parallel.environment,
        logs=evaluation_folder(stage.folder) / "logs",
        on_tick=lambda: show(f"{_progress(stage)}, {time.monotonic() - started:.0f} s"),
    )
    found = read_json(scores_path(stage.folder))
    show(f"scored in {time.monotonic() - started:.0f} s")
    cells = {(row["protocol"], row["subject"], row["weights"]): row for row in found["rows"]}
    stage.artifact(*(evaluation_folder(stage.folder) / f"predictions_{w}.jsonl" for w in WEIGHTS))
    return Scores(cells, found["shortened"])


def accuracy_rows(stage: Stage, scores: Scores) -> list[dict[str, Any]]:
    """One table row per subject and one over all; written as CSV and as metrics too."""
    rows = [_accuracy_row(scores, subject) for subject in (*scores.subjects, ALL)]
    stage.metrics(
        {
            f"eval/{protocol}/{subject}/{weights}": scores.accuracy(protocol, weights, subject)
            for protocol in scores.protocols
            for subject in (*scores.subjects, ALL)
            for weights in WEIGHTS
        }
    )
    stage.table("accuracy", rows)
    return rows


def draw_accuracy(stage: Stage, scores: Scores, protocol: str) -> Path:
    """Draw the accuracies of one protocol, with its CSV beside; returns the PNG."""
    from internlm_lib.reporting.figures import accuracy_figure

    rows = [
        {"subject": subject, **{w: scores.accuracy(protocol, w, subject) for w in WEIGHTS}}
        for subject in (*scores.subjects, ALL)
    ]
    stage.table(f"accuracy_{protocol}", rows)
    figure = accuracy_figure(rows, chance=CHANCE, title=f"Accuracy, {protocol} protocol")
    return stage.figure(f"accuracy_{protocol}", figure)


def summarize(scores: Scores) -> dict[str, Any]:
    """The stage's result: accuracies over all questions, None for a protocol not asked."""
    return {
        "accuracy": _overall(scores, "cloze"),
        "letter": _overall(scores, "letter"),
        "questions": scores.questions(scores.protocols[0], "after"),
        "subjects": len(scores.subjects),
        "chance": CHANCE,
        "shortened": scores.shortened,
    }


def check_scores(subjects: list[Subject], scores: Scores) -> str:
    """Says whether accuracy rose.

    Raises KitError if another number of questions was scored than was asked.
    """
    asked = {subject.name: len(subject.test) for subject in subjects}
    for protocol in scores.protocols:
        for weights in WEIGHTS:
            for name, number in asked.items():
                cell = scores.cells.get((protocol, name, weights), {"questions": 0})
                if cell["questions"] != number:
                    raise KitError(
                        f"06_evaluate: {cell['questions']} questions scored of {name} ({protocol}, "
                        f"{weights} training), but {number} were to be asked; run it again"
                    )
    parts = [_verdict(scores, protocol) for protocol in scores.protocols]
    return f"{sum(asked.values())} questions; " + "; ".join(parts)


def run(stage: Stage, show: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """All steps in order; returns the stage's result. Raises what `check_scores` raises."""
    subjects = choose_questions(stage)
    scores = score(stage, show)
    accuracy_rows(stage, scores)
    for protocol in scores.protocols:
        draw_accuracy(stage, scores, protocol)
    check_scores(subjects, scores)
    return summarize(scores)


def _accuracy_row(scores: Scores, subject: str) -> dict[str, Any]:
    protocol = scores.protocols[0]
    number = (
        scores.questions(protocol, "after")
        if subject == ALL
        else scores.cells[protocol, subject, "after"]["questions"]
    )
    row: dict[str, Any] = {"subject": subject, "questions": number}
    for protocol in scores.protocols:
        for weights in WEIGHTS:
            row[f"{protocol}_{weights}"] = scores.accuracy(protocol, weights, subject)
    return row


def _overall(scores: Scores, protocol: str) -> dict[str, float] | None:
    if protocol not in scores.protocols:
        return None
    return {weights: scores.accuracy(protocol, weights) for weights in WEIGHTS}


def _verdict(scores: Scores, protocol: str) -> str:
    before, after = (scores.accuracy(protocol, weights) for weights in WEIGHTS)
    word = "rose" if after > before else "fell" if after < before else "stayed"
    return f"{protocol} accuracy {word}: {before:.1%} → {after:.1%} (guessing: {CHANCE:.0%})"


def _progress(stage: Stage) -> str:
    path = progress_path(stage.folder)
    if not path.exists():
        return "starting"
    at = read_json(path)
    return f"{at['weights']} training: {at['done']} of {at['total']} prompts"
