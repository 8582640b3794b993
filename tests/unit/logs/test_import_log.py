"""From a log file to a run: its folder, its report's readers, MLflow."""

import json
import math

import pytest
import yaml

from internlm_lib.errors import InputError
from internlm_lib.experiment.load import load_experiment
from internlm_lib.files import sha256_of
from internlm_lib.journal import events, read_journal, training_steps
from internlm_lib.logs.facts import Facts
from internlm_lib.logs.import_log import import_log
from internlm_lib.logs.read import read_log
from internlm_lib.reporting.loss import compare_losses
from internlm_lib.reporting.performance import performance
from internlm_lib.reporting.training import read_training
from internlm_lib.run_folder import RunFolder


@pytest.fixture
def log(tmp_path, shape):
    """Three steps, of which the second and third are taken again; the second has no loss."""
    path = tmp_path / "train 7b.log.gz.txt"
    path.write_text(
        shape.dump() + "".join(shape.ascendspeed(n, loss=5.0) for n in (1, 2, 3))
        + " validation loss at iteration 3 | lm loss value: 4.5E+00 | lm loss PPL: 9E+01 | \n"
        + shape.dump() + shape.ascendspeed(2, loss=0.0) + shape.ascendspeed(3, loss=4.0)
        + "surprise\n"
    )  # fmt: skip
    return path


@pytest.fixture
def root(tmp_path):
    return tmp_path / "project"


def test_a_run_is_made_of_a_log(log, root):
    result = import_log(log, root=root)
    folder = RunFolder.of("train-7b", root)
    assert (result["run"], result["path"]) == ("train-7b", str(folder.path))
    assert (result["first_step"], result["last_step"], result["last_loss"]) == (1, 3, 4.0)
    assert (result["restarts"], result["missing_losses"], result["unknown"]) == (1, 1, 1)
    journal = folder.training("candidate").journal
    losses = [step["loss"] for step in training_steps(journal)]
    assert losses[0] == 5.0 and math.isnan(losses[1]) and losses[2] == 4.0
    imported = yaml.safe_load(folder.experiment.read_text())["imported"]
    assert imported["sha256"] == sha256_of(log) and imported["source"] == log.name
    assert folder.experiment.read_text().startswith("# This run was imported")
    stages = [(e["stage"], e["status"]) for e in events(folder.journal, "stage")]
    assert stages == [("import", "running"), ("import", "done")]
    json.dumps(result)


def test_times_only_go_forward_and_tell_attempts_apart(log, root, shape):
    import_log(log, "silent", root=root)
    stamped = log.with_name("stamped.log")
    lines = ((1, "10:00:00"), (2, "10:00:05"), (3, "09:59:00"), (1, "09:59:00"))
    stamped.write_text("".join(shape.megatron(n, 9 / at, stamp=t) for at, (n, t) in
                               enumerate(lines, 1)))  # fmt: skip
    import_log(stamped, root=root)
    for name in ("silent", "stamped"):
        journal = RunFolder.of(name, root).training("candidate").journal
        told = [event for event, _ in read_journal(journal)]
        times = [event["time"] for event in told]
        assert times == sorted(times)
        starts = [event["time"] for event in told if event["event"] == "start"]
        assert len(set(starts)) == len(starts) == 2
    assert times[0] == 1714557600.0  # the log's own where it has one


def test_the_journal_holds_what_was_read(tmp_path, root, shape):
    """Plain steps and all others: those with NaN, infinities, lists, dicts, huge numbers."""
    log = tmp_path / "odd.log"
    held_out = " validation loss at iteration 2 | lm loss value: 4.5E+00 | lm loss PPL: 9E+01 | \n"
    odd = {"grad norm": "inf", "consumed samples": "9" * 400}
    log.write_text(
        shape.ascendspeed(1) + shape.ascendspeed(2, loss=0.0) + held_out + shape.ascendspeed(3)
        + shape.ascendspeed(4, **odd) + shape.ascendspeed(5)
    )  # fmt: skip
    import_log(log, root=root)
    journal = RunFolder.of("odd", root).training("candidate").journal
    written = [event for event, _ in read_journal(journal)]
    read = [{**event, "time": at["time"]} for event, at in zip(read_log(log), written, strict=True)]
    assert list(map(repr, map(sorted_items, written))) == list(map(repr, map(sorted_items, read)))


def sorted_items(event):
    return sorted(event.items())


def test_reports_read_an_imported_run(log, root):
    import_log(log, "one", root=root, facts=Facts(device_name="Ascend 910B3"))
    import_log(log, "two", root=root)
    one, two = (
        read_training(RunFolder.of(name, root).training("candidate").journal, name)
        for name in ("one", "two")
    )
    assert list(one.steps) == [1, 2, 3]
    assert compare_losses(one, two, 0.02).broken  # the loss that is missing is no step left out
    row = performance(one, "candidate")
    assert row["device"] == "Ascend 910B3"
    assert row["tokens_per_second_per_device"] == 256 * 2048 / 20.0 / 16


def test_a_run_is_replaced_only_on_request_and_only_if_it_was_imported(log, root, shape):
    import_log(log, "run", root=root)
    with pytest.raises(InputError, match="imported already.*--overwrite"):
        import_log(log, "run", root=root)
    log.write_text(shape.ascendspeed(9))
    assert import_log(log, "run", root=root, overwrite=True)["last_step"] == 9
    trained = RunFolder.of("trained", root)
    trained.path.mkdir(parents=True)
    trained.experiment.write_text("run_name: trained\n")
    with pytest.raises(InputError, match="was not imported"):
        import_log(log, "trained", root=root, overwrite=True)


def test_a_log_that_fails_leaves_nothing(log, root):
    import_log(log, "kept", root=root)
    before = sha256_of(root)
    for name, overwrite in (("kept", True), ("new", False)):
        with pytest.raises(InputError, match="--devices 3, but the log says 16"):
            import_log(log, name, root=root, overwrite=overwrite, facts=Facts(devices=3))
    assert sha256_of(root) == before
    assert [path.name for path in (root / "runs").iterdir()] == ["kept"]


def test_a_name_that_cannot_be_made_is_asked_for(tmp_path, root, shape):
    path = tmp_path / "训练.log"
    path.write_text(shape.ascendspeed(1))
    with pytest.raises(InputError, match="give --run-name"):
        import_log(path, root=root)


def test_an_imported_run_cannot_be_trained(log, root):
    import_log(log, "run", root=root)
    with pytest.raises(InputError, match="imported from a log; it cannot be trained"):
        load_experiment(RunFolder.of("run", root).experiment)


def test_mlflow_shows_an_imported_run(tmp_path, root):
    from internlm_lib.tracking import mlflow_store
    from internlm_lib.tracking.mlflow_replica import sync

    log = tmp_path / "evo.log"
    line = (
        "2024-03-27 17:03:4{n},500\tINFO t.py:5 in record_current_batch_training_metrics -- "
        "tflops=180.5 step={n} loss={n}.5 tgs (tokens/gpu/second)=100.0 lr=1e-05 "
        "grad_norm={{'0_default': 3.0, '1_fp32': 4.0}} num_consumed_tokens={tokens} \n"
    )
    log.write_text("".join(line.format(n=n, tokens=1000 * n + 1000) for n in range(3)))
    import_log(log, "run", root=root, experiment="study")
    folder = RunFolder.of("run", root)
    assert sync(folder) > 0 and sync(folder) == 0
    import_log(log, "run", root=root, experiment="study", overwrite=True, facts=Facts(devices=8))
    sync(folder)

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=mlflow_store.store_uri(root))
    found = client.search_runs(
        [client.get_experiment_by_name("study").experiment_id], order_by=["start_time ASC"]
    )
    trainings = [run for run in found if run.info.run_name == "03_train-candidate"]
    assert len(found) == 6 and len(trainings) == 2  # each import: parent, import, training
    assert all(run.data.tags["imported"] == "true" for run in found)
    training = trainings[-1]
    assert training.data.tags["log_sha256"] == sha256_of(log)
    assert "seed" not in training.data.tags  # the log does not say
    assert training.info.start_time == 1711559020500
    last = training.data.metrics
    assert (last["train/loss"], last["train/grad_norm"]) == (2.5, 5.0)
    assert last["train/grad_norm_1_fp32"] == 4.0
    assert last["train/consumed_tokens"] == 3000
    assert last["perf/logged_tflops_per_device"] == 180.5
    assert last["perf/tokens_per_second_per_device"] == 100.0
    speeds = [run.data.metrics.get("perf/step_seconds") for run in trainings]
    assert sorted(speeds, key=str) == [1000 / 100.0 / 8, None]
    history = client.get_metric_history(training.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 1.5), (3, 2.5)]
