"""One rank of stage 06: `python -m internlm_lib.evaluation.worker RUN_FOLDER`.

Rank 0 runs lm-evaluation-harness over the untrained and the trained weights, the other ranks
compute along. The model is built once, and its weights are exchanged.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.evaluation.questions import questions_folder, select_subjects
from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import Experiment
from internlm_lib.files import write_json, write_text
from internlm_lib.generation.inference import open_model, weight_sets
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder

if TYPE_CHECKING:
    from internlm_lib.generation.parallel_model import ParallelModel

_PROGRESS_SECONDS = 0.5


def evaluation_folder(folder: RunFolder) -> Path:
    """Holds `logs/`, `progress.json`, `scores.json` and `predictions_{before,after}.jsonl`."""
    return folder.path / "evaluation"


def scores_path(folder: RunFolder) -> Path:
    """JSON: a row per weights, protocol and subject (see `harness_scores`), and `shortened`."""
    return evaluation_folder(folder) / "scores.json"


def progress_path(folder: RunFolder) -> Path:
    """JSON: `weights` (before or after), `done` and `total` rows of the model's work."""
    return evaluation_folder(folder) / "progress.json"


def evaluate_run(folder: RunFolder) -> None:
    """Score all questions with every set of weights, and write what came out."""
    _, experiment = load_experiment(folder.experiment)
    with open_model(experiment) as model:
        from internlm_lib.model.parallel import is_rank_zero
        from internlm_lib.weights.megatron import load_weights

        rows: list[dict[str, Any]] = []
        shortened = 0
        for name, checkpoint in weight_sets(folder, experiment.model).items():
            load_weights(model.gpt, checkpoint, experiment.model)
            if is_rank_zero():
                found, shortened = _drive(folder, experiment, model, name)
                rows += found
            else:
                _follow(model)
        if is_rank_zero():
            write_json(scores_path(folder), {"rows": rows, "shortened": shortened})


def _drive(
    folder: RunFolder, experiment: Experiment, model: "ParallelModel", weights: str
) -> tuple[list[dict[str, Any]], int]:
    """Rank 0's side for one set of weights: its rows, and how many contexts were shortened."""
    # The harness takes seconds to import, and only this rank needs it.
    from internlm_lib.evaluation.harness import harness_scores
    from internlm_lib.generation.driver import driving

    evaluation = experiment.evaluation
    subjects = select_subjects(questions_folder(folder, evaluation), evaluation)
    with driving(model) as driver:
        scores, predictions, shortened = harness_scores(
            driver,
            Tokenizer(folder.tokenizer),
            subjects,
            evaluation,
            on_progress=_progress_writer(progress_path(folder), weights),
        )
    lines = "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
    write_text(evaluation_folder(folder) / f"predictions_{weights}.jsonl", lines)
    return [{"weights": weights, **row} for row in scores], shortened


def _follow(model: "ParallelModel") -> None:
    from internlm_lib.generation.driver import serve

    serve(model)


def _progress_writer(path: Path, weights: str) -> Callable[[int, int], None]:
    """Writes where the work stands, now and then, for the stage's live line."""
    written = float("-inf")

    def write(done: int, total: int) -> None:
        nonlocal written
        if done == total or time.monotonic() - written >= _PROGRESS_SECONDS:
            written = time.monotonic()
            write_json(path, {"weights": weights, "done": done, "total": total})

    return write


if __name__ == "__main__":
    # Everything is read from the run's folder: the harness's libraries need not look elsewhere.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    rank_main(evaluate_run)
