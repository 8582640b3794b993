"""Which questions an evaluation asks, and which it shows as exemplars."""

from dataclasses import replace
from pathlib import Path

from internlm_lib.data.questions import SPLITS, Subject, read_subjects
from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import EvaluationSection
from internlm_lib.run_folder import RunFolder

CHANCE = 0.25
"""Accuracy of guessing among four options."""


def questions_folder(folder: RunFolder, evaluation: EvaluationSection) -> Path:
    """The folder named by `evaluation.questions_path`, or the pocket world's.

    Raises InputError if there is neither.
    """
    given = evaluation.questions_path
    path = folder.root / given if given else folder.questions
    if not all((path / split).is_dir() for split in SPLITS):
        raise InputError(
            f"{path}: no questions there (a folder with dev/ and test/, as in MMLU's archive); set "
            "evaluation.questions_path; 01_prepare makes questions only where it makes the pocket "
            "world, that is with data.train_path: null"
        )
    return path


def select_subjects(folder: Path, evaluation: EvaluationSection) -> list[Subject]:
    """The subjects, each cut to its `num_fewshot` first exemplars and `limit` first questions.

    Raises InputError if a file is malformed or a subject has too few exemplars.
    """
    shots, limit = evaluation.num_fewshot, evaluation.limit
    subjects = read_subjects(folder)
    for subject in subjects:
        if len(subject.dev) < shots:
            raise InputError(
                f"{folder / 'dev' / subject.name}_dev.csv: {len(subject.dev)} exemplars, "
                f"evaluation.num_fewshot = {shots}; lower it, or add rows"
            )
    return [replace(s, dev=s.dev[:shots], test=s.test[:limit]) for s in subjects]
