"""Replays into a real sqlite store, made once for this file."""

import itertools
import math

import pytest
import yaml

from internlm_lib.errors import InputError, KitError
from internlm_lib.journal import Journal, events
from internlm_lib.run_folder import RunFolder
from internlm_lib.tracking import mlflow_store
from internlm_lib.tracking.mlflow_replica import sync
from internlm_lib.tracking.replica_state import state_path

_names = (f"run-{n}" for n in itertools.count())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("project")


@pytest.fixture
def folder(root):
    folder = RunFolder.of(next(_names), root)
    _write_experiment(folder)
    return folder


def _write_experiment(folder, uri=None, **training):
    folder.path.mkdir(parents=True, exist_ok=True)
    values = {
        "run_name": folder.name,
        "training": {"lr": 1e-3, **training},
        "generation": {"prompts": ["long " * 2000]},
        "tracking": {"uri": uri, "experiment": "study"},
    }
    folder.experiment.write_text(yaml.safe_dump(values))


def _client(root):
    mlflow_store.load()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=mlflow_store.store_uri(root))


def _runs(folder, experiment="study"):
    """name → MLflow runs of this kit run, oldest first."""
    client = _client(folder.root)
    everything = client.search_runs(
        [client.get_experiment_by_name(experiment).experiment_id], order_by=["start_time ASC"]
    )
    parent = [r for r in everything if r.data.tags.get("internlm.run") == folder.name]
    assert len(parent) == 1
    runs = {"parent": parent}
    for run in everything:
        if run.data.tags.get("mlflow.parentRunId") == parent[0].info.run_id:
            runs.setdefault(run.info.run_name, []).append(run)
    return runs


def _history(folder, run, metric):
    client = _client(folder.root)
    points = client.get_metric_history(run.info.run_id, metric)
    return sorted((p.step, p.value) for p in points)


def _start(journal, first_step=1):
    journal.write(
        "start", role="candidate", engine="megatron", layout="megatron TP2 PP1 DP1",
        world_size=2, device="cpu", device_name="a CPU", precision="fp32", train_iters=9,
        first_step=first_step, tokens_per_step=64, parameters=100,
        tags={"data_sha256": "d" * 64},
    )  # fmt: skip


def _steps(journal, steps, loss=lambda step: 5.0 - step / 10):
    for step in steps:
        journal.write(
            "step", step=step, loss=loss(step), grad_norm=1.0, lr=1e-3, step_seconds=0.1,
            tokens_per_second_per_device=640.0, model_tflops_per_device=None, memory_bytes=2**20,
        )  # fmt: skip


def _sample(journal, number, start, *, node=0, nodes=1, utilization=50.0):
    gpu = {
        "index": 3, "name": "a GPU", "utilization_percent": utilization, "memory_used_mib": 1000.0,
        "memory_total_mib": 2000.0, "power_watts": None, "temperature_celsius": 40.0,
        "health": None,
    }  # fmt: skip
    host = {"cpu_percent": 12.5, "memory_used_mib": 300.0, "ranks_cpu_percent": None}
    journal.write(
        "device_sample", sample=number, start=start, node=node, nodes=nodes, devices=[gpu],
        host=host,
    )  # fmt: skip


def _started(folder):
    return events(folder.training("candidate").journal, "start")[-1]["time"]


def test_a_run_becomes_a_parent_with_stages_and_trainings(folder):
    run = Journal(folder.journal)
    run.write("stage", stage="03_train", status="running", seconds=0)
    training = Journal(folder.training("candidate").journal)
    _start(training)
    _steps(training, [1, 2])
    training.write("validation", step=2, loss=4.5)
    training.write("end", status="done", seconds=1.0)
    figure = folder.figures / "loss.svg"
    figure.parent.mkdir(parents=True)
    figure.write_text("<svg/>")
    name = figure.relative_to(folder.root).as_posix()
    run.write("artifact", stage="03_train", path=name)
    run.write("artifact", stage="03_train", path="reports/gone.png")
    run.write("metrics", stage="03_train", values={"eval/a [%]": 0.5, "text": "no"}, step=None)
    run.write("stage", stage="03_train", status="done", seconds=3.5)

    assert sync(folder) == 10
    assert sync(folder) == 0

    runs = _runs(folder)
    (parent,), (stage,), (train,) = runs["parent"], runs["03_train"], runs["03_train-candidate"]
    assert {r.info.status for r in (parent, stage, train)} == {"FINISHED"}
    assert train.data.tags["layout"] == "megatron TP2 PP1 DP1"
    assert train.data.tags["data_sha256"] == "d" * 64
    assert train.data.params["training.lr"] == "0.001"
    assert train.data.params["tokens_per_step"] == "64"
    assert len(train.data.params["generation.prompts"]) < 300
    assert _history(folder, train, "train/loss") == [(1, 4.9), (2, 4.8)]
    assert _history(folder, train, "eval/loss") == [(2, 4.5)]
    assert train.data.metrics["train/loss_max"] == 4.9
    assert train.data.metrics["memory/bytes"] == 2**20
    assert "perf/model_tflops_per_device" not in train.data.metrics
    assert stage.data.metrics == {"eval/a ___": 0.5, "stage/seconds": 3.5}
    assert stage.data.tags["missing/gone.png"] == "reports/gone.png"
    artifacts = _client(folder.root).list_artifacts(stage.info.run_id, "figures")
    assert [a.path for a in artifacts] == ["figures/loss.svg"]
    assert (folder.root / "mlflow" / "artifacts" / stage.info.run_id).is_dir()


def test_what_only_some_trainings_record_arrives_too(folder):
    training = Journal(folder.training("candidate").journal)
    training.write(
        "start", role="candidate", first_step=1, train_iters=2, seed=7, deterministic_mode=True,
        predecessor_decay=False, environment={"OMP_NUM_THREADS": "2", "NCCL_ALGO": None},
    )  # fmt: skip
    for step, skipped in ((1, True), (2, False)):
        training.write(
            "step", step=step, loss=5.0, grad_norm=math.inf if skipped else 1.0, lr=0.0,
            loss_scale=8.0 / step, skipped=skipped, global_batch_size=4 * step, tokens=32 * step,
        )  # fmt: skip
    training.write("test", step=2, loss=4.25)
    training.write("end", status="done", seconds=1.0)
    sync(folder)
    (train,) = _runs(folder)["03_train-candidate"]
    assert _history(folder, train, "train/loss_scale") == [(1, 8.0), (2, 4.0)]
    assert _history(folder, train, "train/skipped") == [(1, 1.0), (2, 0.0)]
    assert _history(folder, train, "train/global_batch_size") == [(1, 4.0), (2, 8.0)]
    assert _history(folder, train, "test/loss") == [(2, 4.25)]
    assert _history(folder, train, "train/grad_norm") == [(2, 1.0)]
    assert (train.data.tags["seed"], train.data.tags["deterministic_mode"]) == ("7", "True")
    assert train.data.tags["environment/OMP_NUM_THREADS"] == "2"
    assert "environment/NCCL_ALGO" not in train.data.tags  # older journals: known, but not set


def test_losing_the_state_sends_no_point_twice(folder):
    training = Journal(folder.training("candidate").journal)
    _start(training)
    _steps(training, range(1, 400), loss=lambda step: math.nan if step == 7 else 1 / step)
    training.write("end", status="failed", seconds=1.0)
    Journal(folder.journal).write("stage", stage="03_train", status="running", seconds=0)
    assert sync(folder) == 402
    before = _runs(folder)
    state_path(folder).unlink()
    # The experiment has been edited since: MLflow refuses to change a parameter.
    _write_experiment(folder, lr=5.0)
    assert sync(folder) == 402
    after = _runs(folder)
    (train,) = after["03_train-candidate"]
    assert {n: len(r) for n, r in after.items()} == {n: len(r) for n, r in before.items()}
    assert [step for step, _ in _history(folder, train, "train/loss")] == list(range(1, 400))
    assert train.info.status == "FAILED"
    assert train.data.params["training.lr"] == "0.001"


def test_infinities_are_tagged_and_left_out(folder):
    training = Journal(folder.training("candidate").journal)
    _start(training)
    _steps(training, [1, 2, 3], loss=lambda step: math.inf if step == 2 else 1.0)
    sync(folder)
    (train,) = _runs(folder)["03_train-candidate"]
    assert [step for step, _ in _history(folder, train, "train/loss")] == [1, 3]
    assert train.data.tags["nonfinite/train/loss"] == "inf at step 2"
    assert train.info.status == "RUNNING"


def test_a_training_begun_again_at_step_1_is_a_new_run(folder):
    training = Journal(folder.training("candidate").journal)
    _start(training)
    _steps(training, [1, 2, 3])
    sync(folder)
    _start(training)
    _steps(training, [1, 2], loss=lambda step: 9.0)
    sync(folder)
    old, new = _runs(folder)["03_train-candidate"]
    assert (old.info.status, new.info.status) == ("KILLED", "RUNNING")
    assert old.data.metrics["train/loss_last"] == 4.7
    assert _history(folder, new, "train/loss") == [(1, 9.0), (2, 9.0)]


def test_a_resumed_training_shows_each_step_once(folder):
    training = Journal(folder.training("candidate").journal)
    _start(training)
    _steps(training, [1, 2, 3])
    sync(folder)
    _start(training, first_step=4)  # from the checkpoint of step 3: nothing is repeated
    _steps(training, [4, 5])
    sync(folder)
    (only,) = _runs(folder)["03_train-candidate"]
    assert [step for step, _ in _history(folder, only, "train/loss")] == [1, 2, 3, 4, 5]
    _start(training, first_step=3)  # from an older checkpoint: steps 3 to 5 are taken again
    _steps(training, [3, 4, 5, 6], loss=lambda step: 1.0)
    sync(folder)
    old, new = _runs(folder)["03_train-candidate"]
    assert old.info.status == "KILLED"
    assert _history(folder, new, "train/loss") == [
        (1, 4.9), (2, 4.8), (3, 1.0), (4, 1.0), (5, 1.0), (6, 1.0),
    ]  # fmt: skip


def test_device_samples_are_metrics_of_their_training(folder):
    files = folder.training("candidate")
    training, devices = Journal(files.journal), Journal(files.devices())
    devices.write("device_sampling", device="cuda", seconds=10, node=0, nodes=1)
    _sample(devices, 1, None)  # before there was a training
    _start(training)
    _sample(devices, 2, _started(folder))
    devices.write("device_sample_failed", reason="no answer", node=0, nodes=1)
    devices.write(
        "device_sample", sample=3, start=_started(folder), node=0, nodes=1, devices=[], host=None
    )  # fmt: skip
    assert sync(folder) == 6
    _sample(devices, 4, _started(folder), utilization=75.0)
    assert (sync(folder), sync(folder)) == (1, 0)
    (train,) = _runs(folder)["03_train-candidate"]
    assert _history(folder, train, "device/3/utilization_percent") == [(2, 50.0), (4, 75.0)]
    assert _history(folder, train, "device/3/memory_used_mib") == [(2, 1000.0), (4, 1000.0)]
    assert _history(folder, train, "device/3/temperature_celsius") == [(2, 40.0), (4, 40.0)]
    assert _history(folder, train, "node/cpu_percent") == [(2, 12.5), (4, 12.5)]
    assert _history(folder, train, "node/memory_used_mib") == [(2, 300.0), (4, 300.0)]
    unknown = {"device/3/power_watts", "node/ranks_cpu_percent", "node/ranks_memory_mib"}
    assert not unknown & train.data.metrics.keys()


def test_nodes_are_told_apart(folder):
    files = folder.training("candidate")
    _start(Journal(files.journal))
    for node in (0, 1):
        for number in (1, 2):
            journal = Journal(files.devices(node))
            _sample(journal, number, _started(folder), node=node, nodes=2, utilization=node)
    assert sync(folder) == 5
    (train,) = _runs(folder)["03_train-candidate"]
    for node in (0, 1):
        name = f"node{node}/device/3/utilization_percent"
        assert _history(folder, train, name) == [(1, node), (2, node)]
        assert _history(folder, train, f"node{node}/cpu_percent") == [(1, 12.5), (2, 12.5)]


def test_each_sample_goes_once_to_the_attempt_it_is_of(folder):
    """Also if the replica comes late, or has forgotten everything."""
    files = folder.training("candidate")
    training, devices = Journal(files.journal), Journal(files.devices())
    for number, first_step in enumerate((1, 1, 3), start=1):  # begun anew; resumed
        _sample(devices, 10 * number, None)
        _start(training, first_step)
        _sample(devices, 10 * number + 1, _started(folder))
        if number != 2:
            sync(folder)
        _steps(training, [first_step, first_step + 1])
        _sample(devices, 10 * number + 2, _started(folder))
    name = "device/3/utilization_percent"
    for _ in range(2):
        sync(folder)
        old, new = _runs(folder)["03_train-candidate"]
        assert [step for step, _ in _history(folder, old, name)] == [11, 12]
        assert [step for step, _ in _history(folder, new, name)] == [21, 22, 31, 32]
        state_path(folder).unlink()


def test_a_sample_waits_for_the_start_of_its_attempt(folder):
    """A pass may read the training's journal before, and the devices' after, a training starts."""
    files = folder.training("candidate")
    training, devices = Journal(files.journal), Journal(files.devices())
    _start(training)
    sync(folder)
    _sample(devices, 1, _started(folder) + 5.0)
    assert sync(folder) == 0
    training.write("start", role="candidate", first_step=1, time=_started(folder) + 5.0)
    assert sync(folder) == 2
    old, new = _runs(folder)["03_train-candidate"]
    assert "node/cpu_percent" not in old.data.metrics
    assert _history(folder, new, "node/cpu_percent") == [(1, 12.5)]


def test_many_samples_go_in_full_requests(folder, monkeypatch):
    files = folder.training("candidate")
    _start(Journal(files.journal))
    journal = Journal(files.devices())
    for number in range(1, 501):
        _sample(journal, number, _started(folder))
    sizes, log = [], mlflow_store.ExperimentStore.log
    monkeypatch.setattr(
        mlflow_store.ExperimentStore, "log",
        lambda self, run_id, metrics=(), **rest: (
            sizes.append(len(metrics)), log(self, run_id, metrics, **rest)
        ),
    )  # fmt: skip
    assert sync(folder) == 501
    assert sum(sizes) == 500 * 5 and len([size for size in sizes if size]) == 3
    (train,) = _runs(folder)["03_train-candidate"]
    assert len(_history(folder, train, "node/cpu_percent")) == 500


def test_what_was_killed_is_closed_when_the_next_stage_begins(folder):
    run = Journal(folder.journal)
    run.write("stage", stage="03_train", status="running", seconds=0)
    training = Journal(folder.training("candidate").journal)
    _start(training)
    _steps(training, [1])
    sync(folder)
    assert _runs(folder)["parent"][0].info.status == "RUNNING"
    run.write("stage", stage="04_compare", status="running", seconds=0)
    run.write("stage", stage="04_compare", status="failed", seconds=1)
    sync(folder)
    runs = _runs(folder)
    status = {name: run.info.status for name, (run,) in runs.items()}
    assert status == {
        "parent": "FAILED",
        "03_train": "KILLED",
        "03_train-candidate": "KILLED",
        "04_compare": "FAILED",
    }
    assert runs["03_train-candidate"][0].data.metrics["train/loss_last"] == 4.9


def test_an_unreachable_store_loses_nothing(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    Journal(folder.journal).write("metrics", stage="05_infer", values={"a": 1.0}, step=3)
    _write_experiment(folder, uri="http://127.0.0.1:9")
    with pytest.raises(KitError, match=f"internlm sync {folder.name}"):
        sync(folder)
    _write_experiment(folder)
    assert sync(folder) == 1
    (stage,) = _runs(folder)["05_infer"]
    assert _history(folder, stage, "a") == [(3, 1.0)]


def test_a_run_removed_from_the_store_is_sent_again(folder):
    Journal(folder.journal).write("metrics", stage="05_infer", values={"a": 1.0}, step=1)
    sync(folder)
    runs = _runs(folder)
    for run in (*runs["parent"], *runs["05_infer"]):
        _client(folder.root).delete_run(run.info.run_id)
    Journal(folder.journal).write("metrics", stage="05_infer", values={"a": 2.0}, step=2)
    assert sync(folder) == 2
    assert _history(folder, _runs(folder)["05_infer"][0], "a") == [(1, 1.0), (2, 2.0)]


def test_a_run_that_does_not_exist_is_named(root):
    with pytest.raises(InputError, match="nobody: no such run"):
        sync(RunFolder.of("nobody", root))
