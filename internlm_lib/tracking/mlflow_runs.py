"""A training as any MLflow server tells it: its metrics as a journal's events."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm_lib.errors import InputError
from internlm_lib.tracking.mlflow_store import load, store_uri
from internlm_lib.tracking.replay import STEP_METRICS

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_ID = re.compile(r"[0-9a-f]{32}")

_LOSS = STEP_METRICS["loss"]
_WHOLE_NUMBERS = ("world_size", "train_iters", "tokens_per_step", "parameters", "seed")
_SECTIONS = {
    "seq_length": "training.seq_length",
    "global_batch_size": "training.global_batch_size",
    "micro_batch_size": "training.micro_batch_size",
}
_SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")


def training_events(root: Path, uri: str | None, run_id: str) -> Iterator[dict[str, Any]]:
    """`start` and `step` events of the training that a run holds.

    Args:
        uri: tracking URI; None is the project's own store below `root`.
        run_id: of a training's run, or of the kit run above it, whose candidate is taken.
    Raises:
        InputError: there is no such run, it holds no training loss, or the server does not answer.
    """
    load()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=store_uri(root, uri))
    try:
        run = _with_losses(client, client.get_run(run_id))
        yield _start(run)
        yield from _steps(client, run)
    except MlflowException as error:
        raise InputError(
            f"MLflow run {run_id} in {store_uri(root, uri)}: {error}; check the id, and the server "
            "with --tracking-uri"
        ) from error


def _with_losses(client: "MlflowClient", run: "Run") -> "Run":
    """The run itself, or the newest training below it, the candidate if there is a choice."""
    if _LOSS in run.data.metrics:
        return run
    below = client.search_runs(
        [run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'"
    )
    found = [child for child in below if _LOSS in child.data.metrics]
    found.sort(key=lambda child: child.data.tags.get("role") != "candidate")
    if not found:
        raise InputError(
            f"MLflow run {run.info.run_id} ({run.info.run_name}): no metric {_LOSS!r}, in it or "
            f"below it; its metrics are {sorted(run.data.metrics) or 'none'}"
        )
    return found[0]


def _start(run: "Run") -> dict[str, Any]:
    tags, params = run.data.tags, run.data.params
    known: dict[str, Any] = {**params, **tags}
    return {
        "event": "start",
        "first_step": 1,
        "layout": tags.get("layout", "unknown layout"),
        "device": tags.get("device", "unknown device"),
        **{n: known.get(n) for n in ("role", "engine", "device_name", "precision")},
        **{name: _integer(known.get(name)) for name in _WHOLE_NUMBERS},
        **{name: _integer(params.get(key)) for name, key in _SECTIONS.items()},
        "model": {name: _integer(params.get(f"model.{name}")) for name in _SHAPE},
        "tags": {name: tags[name] for name in tags if name.endswith("_sha256")}
        | ({"git_commit": tags["git_commit"]} if "git_commit" in tags else {}),
    }


def _steps(client: "MlflowClient", run: "Run") -> Iterator[dict[str, Any]]:
    """One event per step, in order; of a step that was sent twice the later."""
    steps: dict[int, dict[str, Any]] = {}
    for field, name in STEP_METRICS.items():
        if name not in run.data.metrics:
            continue
        history = client.get_metric_history(run.info.run_id, name)
        for point in sorted(history, key=lambda point: point.timestamp):
            # MLflow stores an infinity as 1.8e308.
            value = point.value if abs(point.value) < 1.7e308 else math.inf
            event = steps.setdefault(point.step, {"event": "step", "step": point.step})
            event[field] = value
    yield from (steps[number] for number in sorted(steps))


def _integer(text: Any) -> int | None:
    try:
        return int(text)
    except (TypeError, ValueError):
        return None
