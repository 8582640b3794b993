"""One MLflow experiment, reduced to what the replica needs: runs found by key, batched logging.

All calls of mlflow are here. Limits of MLflow 3.17: 1000 metrics and
100 parameters or tags per request; parameter values of 6000 characters, longer ones are cut
without a word; +inf is stored as 1.8e308.
"""

import fcntl
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm_lib.tracking.replica_state import Status

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

MAX_METRICS = 1000
_MAX_PARAMS, _MAX_TAGS = 100, 100
_MAX_PARAM_LENGTH, _MAX_TAG_LENGTH, _MAX_KEY_LENGTH = 6000, 8000, 250
_KEY_TAG = "internlm.key"


def load() -> None:
    """Import mlflow, with short timeouts and without telemetry; takes seconds the first time."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow's defaults add up to 4 minutes of retries per call, 20 with a server that hangs.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow  # noqa: F401


def store_uri(root: Path, uri: str | None = None) -> str:
    """Tracking URI: the one given, or the project's own sqlite store (never MLflow's default,
    which depends on the current folder)."""
    return uri or f"sqlite:///{root.resolve() / 'mlflow' / 'mlflow.db'}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` among the processes of this machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


class ExperimentStore:
    """Runs of one MLflow experiment."""

    def __init__(self, client: "MlflowClient", experiment_id: str) -> None:
        self.client = client
        self.experiment_id = experiment_id

    @classmethod
    def open(cls, root: Path, uri: str | None, experiment: str) -> "ExperimentStore":
        """Open, and create where missing, the store and the experiment."""
        from mlflow import MlflowClient

        # Two processes that create the tables at once break each other's migration.
        with locked(root / "mlflow" / "store.lock"):
            client = MlflowClient(tracking_uri=store_uri(root, uri))
            found = client.get_experiment_by_name(experiment)
            if found is not None:
                return cls(client, found.experiment_id)
            artifacts = None if uri else (root.resolve() / "mlflow" / "artifacts").as_uri()
            return cls(client, client.create_experiment(experiment, artifacts))

    def has(self, run_id: str) -> bool:
        """Whether the run is still in this experiment (a store may have been deleted)."""
        from mlflow.exceptions import MlflowException

        try:
            info = self.client.get_run(run_id).info
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return info.experiment_id == self.experiment_id and info.lifecycle_stage == "active"

    def run(self, key: str, name: str, seconds: float, tags: Mapping[str, Any]) -> str:
        """Id of the run with this key; created, starting at `seconds` of Unix time, if missing."""
        found = self.client.search_runs(
            [self.experiment_id], f"tags.`{_KEY_TAG}` = '{key}'", max_results=1
        )
        if found:
            return found[0].info.run_id
        texts = {k: str(v)[:_MAX_TAG_LENGTH] for k, v in tags.items()}
        run = self.client.create_run(
            self.experiment_id,
            start_time=_milliseconds(seconds),
            tags={_KEY_TAG: key, **texts},
            run_name=name,
        )
        return run.info.run_id

    def log(
        self,
        run_id: str,
        metrics: "Sequence[Metric]" = (),
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """Log any number of metrics, parameters and tags, in requests MLflow accepts.

        Parameters that the run has already keep their value: MLflow refuses to change one.
        """
        from mlflow.entities import Param, RunTag

        for part in _slices(list(metrics), MAX_METRICS):
            self.client.log_batch(run_id, metrics=part)
        known = self.client.get_run(run_id).data.params if params else {}
        entries = [Param(_key(k), _param_text(v)) for k, v in (params or {}).items()]
        for part in _slices([e for e in entries if e.key not in known], _MAX_PARAMS):
            self.client.log_batch(run_id, params=part)
        labels = [RunTag(_key(k), str(v)[:_MAX_TAG_LENGTH]) for k, v in (tags or {}).items()]
        for part in _slices(labels, _MAX_TAGS):
            self.client.log_batch(run_id, tags=part)

    def artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        self.client.log_artifact(run_id, str(path), folder)

    def set_status(self, run_id: str, status: Status, seconds: float) -> None:
        """Close a run at `seconds` of Unix time, or open it again with status RUNNING."""
        if status == "RUNNING":
            self.client.update_run(run_id, status=status)
        else:
            self.client.set_terminated(run_id, status, end_time=_milliseconds(seconds))


def as_metrics(
    values: Mapping[str, Any], step: int, seconds: float
) -> "tuple[list[Metric], dict[str, str]]":
    """Numbers as MLflow metrics, and tags that point out those that are not finite.

    The time is the event's own: a point sent twice is then one point. NaN is kept; an infinity
    would be shown as a huge number, so it is left out and only tagged. Other values are skipped.
    """
    from mlflow.entities import Metric

    metrics, tags = [], {}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            tags[f"nonfinite/{_key(name)}"] = f"{value} at step {step}"
        if not math.isinf(value):
            metrics.append(Metric(_key(name), float(value), _milliseconds(seconds), step))
    return metrics, tags


def _key(name: str) -> str:
    """`name` with what MLflow refuses in names replaced."""
    return re.sub(r"[^\w/.\- ]", "_", name)[:_MAX_KEY_LENGTH]


def _param_text(value: Any) -> str:
    text = str(value)
    if len(text) <= _MAX_PARAM_LENGTH:
        return text
    return f"{len(text)} characters, see experiment.yaml: {text[:200]} ..."


def _slices(values: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
