"""From journal events to MLflow runs: one replay for the run's own journal, one per training."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internlm_lib.journal import read_journal
from internlm_lib.run_folder import RunFolder
from internlm_lib.tracking.device_replay import DeviceReplay
from internlm_lib.tracking.mlflow_store import MAX_METRICS, ExperimentStore, as_metrics
from internlm_lib.tracking.replica_state import (
    RUN_JOURNAL,
    TRAINING_JOURNALS,
    Mirror,
    ReplicaState,
    Status,
)

STEP_METRICS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "loss_scale": "train/loss_scale",
    "skipped": "train/skipped",
    "nan_iterations": "train/nan_iterations",
    "consumed_samples": "train/consumed_samples",
    "consumed_tokens": "train/consumed_tokens",
    "global_batch_size": "train/global_batch_size",
    "step_seconds": "perf/step_seconds",
    "data_seconds": "perf/data_seconds",
    "forward_backward_seconds": "perf/forward_backward_seconds",
    "optimizer_seconds": "perf/optimizer_seconds",
    "communication_seconds": "perf/communication_seconds",
    "tokens_per_second_per_device": "perf/tokens_per_second_per_device",
    "model_tflops_per_device": "perf/model_tflops_per_device",
    "logged_tflops_per_device": "perf/logged_tflops_per_device",
    "logged_samples_per_second": "perf/logged_samples_per_second",
    "memory_bytes": "memory/bytes",
    "memory_allocated_bytes": "memory/allocated_bytes",
    "memory_reserved_bytes": "memory/reserved_bytes",
}
"""Field of a `step` event → MLflow metric."""

HELD_OUT_METRICS = {"validation": "eval/loss", "test": "test/loss"}
"""Event of a loss on samples that are not trained on → MLflow metric."""

TRAINING_STAGE = "03_train"

_SUMMARY_METRICS = ("train/loss", "train/grad_norm", "perf/tokens_per_second_per_device")
_TRAINING_TAGS = (
    "role", "engine", "layout", "world_size", "device", "device_name", "device_count",
    "devices_per_node", "precision", "seed", "deterministic_mode", "predecessor_decay",
)  # fmt: skip
_TRAINING_PARAMS = ("train_iters", "tokens_per_step", "parameters")
_STAGE_ENDS: dict[str, Status] = {"done": "FINISHED", "failed": "FAILED"}
_TRAINING_ENDS: dict[str, Status] = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@dataclass
class Session:
    """What a pass works with: whose journals, where to, and how far it got."""

    folder: RunFolder
    store: ExperimentStore
    state: ReplicaState
    values: Mapping[str, Any]
    """The run's resolved experiment, as in experiment.yaml."""

    def advance(self, journal: str, offset: int) -> None:
        """Everything before `offset` is in MLflow; remember it."""
        self.state.cursors[journal].offset = offset
        self.state.save(self.folder)

    def open(self, name: str, journal: str, time: float, tags: Mapping[str, Any]) -> Mirror:
        """The MLflow run, below the parent, of what began with the journal's event at `time`."""
        key = f"{self.folder.name}/{journal}/{name}@{time}{self._edition}"
        labels = {"mlflow.parentRunId": self.parent(time).run_id, **self._origin, **tags}
        mirror = Mirror(self.store.run(key, name, time, labels), last_time=time)
        self._describe(mirror)
        return mirror

    def parent(self, time: float) -> Mirror:
        """The kit run's MLflow run; begins with the event at `time` if there is none yet."""
        if self.state.parent is None:
            name = self.folder.name
            labels = {"internlm.run": name, **self._origin}
            run_id = self.store.run(f"{name}@{time}", name, time, labels)
            self.state.parent = Mirror(run_id, last_time=time)
            self._describe(self.state.parent)
        return self.state.parent

    def close(self, mirror: Mirror, status: Status, time: float) -> None:
        """Set the run's end; RUNNING opens it again."""
        mirror.last_time = max(mirror.last_time, time)
        if mirror.status != status:
            self.store.set_status(mirror.run_id, status, time)
            mirror.status = status

    @property
    def _origin(self) -> dict[str, str]:
        """Tags of a run that the kit did not train itself."""
        return {"imported": "true"} if "imported" in self.values else {}

    @property
    def _edition(self) -> str:
        """Tells imports of one log apart: their events have the log's times, which stay."""
        imported = self.values.get("imported")
        return f"#{imported['time']}" if imported else ""

    def _describe(self, mirror: Mirror) -> None:
        self.store.log(mirror.run_id, params=_flat(self.values))
        self.store.artifact(mirror.run_id, self.folder.experiment)


@dataclass
class StageReplay:
    """The run's own journal: its stages, and what they recorded."""

    session: Session

    def replay(self) -> int:
        """Send what is new; returns the number of events."""
        count = 0
        state, folder = self.session.state, self.session.folder
        for event, offset in state.new_events(folder, RUN_JOURNAL):
            kind = event["event"]
            if kind == "stage" and event["status"] == "running":
                self._begin(event)
            elif kind == "stage":
                self._end(event)
            elif kind in ("metrics", "series", "tags", "artifact"):
                self._record(event)
            self.session.advance(RUN_JOURNAL, offset)
            count += 1
        return count

    def _begin(self, event: dict[str, Any]) -> None:
        # Stages of a run come one after the other: whatever still runs by now has been killed.
        for mirror in self.session.state.stages.values():
            if mirror.status == "RUNNING":
                self.session.close(mirror, "KILLED", event["time"])
        self.session.state.stages[event["stage"]] = self._open(event)

    def _end(self, event: dict[str, Any]) -> None:
        mirror = self._mirror(event)
        metrics, _ = as_metrics({"stage/seconds": event["seconds"]}, 0, event["time"])
        self.session.store.log(mirror.run_id, metrics)
        self.session.close(mirror, _STAGE_ENDS[event["status"]], event["time"])

    def _record(self, event: dict[str, Any]) -> None:
        run_id, store = self._mirror(event).run_id, self.session.store
        if event["event"] == "metrics":
            metrics, tags = as_metrics(event["values"], event["step"] or 0, event["time"])
            store.log(run_id, metrics, tags=tags)
        elif event["event"] == "series":
            pairs = zip(event["steps"], event["values"], strict=True)
            points = (as_metrics({event["name"]: v}, n, event["time"])[0] for n, v in pairs)
            store.log(run_id, [point for found in points for point in found])
        elif event["event"] == "tags":
            store.log(run_id, tags=event["values"])
        else:
            path = self.session.folder.root / event["path"]
            if path.is_file():
                store.artifact(run_id, path, path.parent.name)
            else:  # deleted since; it must not hold up everything behind it
                store.log(run_id, tags={f"missing/{path.name}": event["path"]})

    def _mirror(self, event: dict[str, Any]) -> Mirror:
        stages = self.session.state.stages
        if event["stage"] not in stages:
            stages[event["stage"]] = self._open(event)
        return stages[event["stage"]]

    def _open(self, event: dict[str, Any]) -> Mirror:
        name = event["stage"]
        return self.session.open(name, RUN_JOURNAL, event["time"], {"stage": name})


@dataclass
class TrainingReplay:
    """The journal of one role's training; metrics go out in full requests."""

    session: Session
    role: str
    _metrics: list[Any] = field(default_factory=list)
    _tags: dict[str, str] = field(default_factory=dict)

    @property
    def journal(self) -> str:
        return TRAINING_JOURNALS[self.role]

    @property
    def mirror(self) -> Mirror | None:
        return self.session.state.trainings.get(self.role)

    def replay(self) -> int:
        """Send what is new; returns the number of events."""
        count, offset = 0, None
        devices = DeviceReplay(self.session, self.role)
        for event, offset in self.session.state.new_events(self.session.folder, self.journal):
            if event["event"] == "start":
                count += devices.replay(self.mirror)  # what belongs to the attempt before
                self._start(event)
            elif event["event"] == "step":
                self._step(event)
            elif event["event"] in HELD_OUT_METRICS:
                self._add({HELD_OUT_METRICS[event["event"]]: event["loss"]}, event)
            elif event["event"] == "end":
                self._flush()
                self._close(_TRAINING_ENDS[event["status"]], event["time"])
            if not self._metrics:
                self.session.advance(self.journal, offset)
            count += 1
        if offset is not None:
            self._flush()
            self.session.advance(self.journal, offset)
        return count + devices.replay(self.mirror)

    def close_lost(self) -> None:
        """Close a training that still runs although its stage failed or was killed."""
        stage = self.session.state.stages.get(TRAINING_STAGE)
        if stage is not None and stage.status in ("FAILED", "KILLED") and self.mirror is not None:
            if self.mirror.status == "RUNNING":
                self._close(stage.status, self.mirror.last_time)

    def _start(self, event: dict[str, Any]) -> None:
        """A later attempt continues the MLflow run only if it repeats no step of it.

        MLflow keeps both rows of a step logged twice, so otherwise the old run is closed, and a
        new one begins with the steps that the journal keeps.
        """
        self._flush()
        known = {key: event[key] for key in _TRAINING_TAGS if event.get(key) is not None}
        tags = known | _environment_tags(event) | event.get("tags", {})
        old = self.mirror
        if old is not None and event["first_step"] == old.last_step + 1 > 1:
            old.started = event["time"]
            self.session.close(old, "RUNNING", event["time"])
            self.session.store.log(old.run_id, tags=tags)
            return
        if old is not None and old.status == "RUNNING":
            self._close("KILLED", old.last_time)
        new = self._open(event["time"], tags)
        new.started = event["time"]
        params = {key: event.get(key) for key in _TRAINING_PARAMS}
        self.session.store.log(new.run_id, params=params)
        for step in self._steps(event["time"]):
            if step["step"] < event["first_step"]:
                self._step(step)

    def _open(self, time: float, tags: Mapping[str, Any]) -> Mirror:
        name = f"{TRAINING_STAGE}-{self.role}"
        mirror = self.session.open(name, self.journal, time, {"stage": TRAINING_STAGE, **tags})
        self.session.state.trainings[self.role] = mirror
        return mirror

    def _step(self, event: dict[str, Any]) -> None:
        values = {name: event.get(key) for key, name in STEP_METRICS.items()}
        if "skipped" in event:  # a curve of 0 and 1: MLflow has no metrics of truth values
            values[STEP_METRICS["skipped"]] = int(event["skipped"])
        for group, norm in event.get("grad_norms", {}).items():
            values[f"{STEP_METRICS['grad_norm']}_{group}"] = norm
        self._add(values, event)

    def _add(self, values: Mapping[str, Any], event: dict[str, Any]) -> None:
        mirror = self.mirror or self._open(event["time"], {"role": self.role})
        metrics, tags = as_metrics(values, event["step"], event["time"])
        mirror.last_step = max(mirror.last_step, event["step"])
        mirror.last_time = event["time"]
        self._metrics += metrics
        self._tags |= tags
        if len(self._metrics) > MAX_METRICS - len(STEP_METRICS):
            self._flush()

    def _flush(self) -> None:
        if self.mirror is not None and (self._metrics or self._tags):
            self.session.store.log(self.mirror.run_id, self._metrics, tags=self._tags)
        self._metrics, self._tags = [], {}

    def _close(self, status: Status, time: float) -> None:
        """Close the newest attempt, adding what the sampled curves of the UI may hide."""
        mirror = self.mirror
        if mirror is None:
            return
        metrics, _ = as_metrics(_summary(self._steps(time)), mirror.last_step, time)
        self.session.store.log(mirror.run_id, metrics)
        self.session.close(mirror, status, time)

    def _steps(self, until: float) -> list[dict[str, Any]]:
        """Steps in force at a time: as `journal.training_steps`, but blind to later attempts."""
        steps: dict[int, dict[str, Any]] = {}
        path = self.session.folder.path / self.journal
        for event in _events_until(path, until):
            if event["event"] == "start":
                steps = {n: e for n, e in steps.items() if n < event["first_step"]}
            elif event["event"] == "step":
                steps[event["step"]] = event
        return list(steps.values())


def _environment_tags(event: Mapping[str, Any]) -> dict[str, str]:
    """`environment/HCCL_CONNECT_TIMEOUT` … of a `start` event."""
    values = event.get("environment", {})
    return {f"environment/{name}": value for name, value in values.items() if value is not None}


def _events_until(path: Path, time: float) -> Iterator[dict[str, Any]]:
    for event, _ in read_journal(path):
        if event["time"] > time:
            return
        yield event


def _summary(steps: list[dict[str, Any]]) -> dict[str, float]:
    """`train/loss_min`, `_max`, `_last` … over the finite values of all steps."""
    summary = {}
    for field_name, metric in STEP_METRICS.items():
        if metric in _SUMMARY_METRICS:
            values = [step[field_name] for step in steps if _is_finite(step.get(field_name))]
            if values:
                summary[f"{metric}_min"] = min(values)
                summary[f"{metric}_max"] = max(values)
                summary[f"{metric}_last"] = values[-1]
    return summary


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < float("inf")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys: `{"training": {"lr": 1e-3}}` → `{"training.lr": 1e-3}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
