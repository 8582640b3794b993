"""Which trainings of an experiment are still to be done, by their journals."""

import time
from pathlib import Path
from typing import Any

import pytest

from internlm_lib import provenance
from internlm_lib.experiment.load import load_experiment
from internlm_lib.journal import Journal, events
from internlm_lib.ranks.plan import LaunchPlan, plan_ranks
from internlm_lib.run_folder import RunFolder
from internlm_lib.training import supervise
from internlm_lib.training.supervise import is_unfinished, trainings_left

BOTH = ("reference", "candidate")


@pytest.fixture
def experiment(repository: Path) -> Any:
    return load_experiment(repository / "params" / "tiny.yaml")[1]


def begin(folder: RunFolder, role: str, experiment: Any) -> Journal:
    files = folder.training(role)
    files.checkpoints.mkdir(parents=True, exist_ok=True)
    journal = Journal(files.journal)
    time.sleep(0.01)
    tags = {"config_sha256": provenance.sha256_of_experiment(experiment)}
    journal.write("start", first_step=1, tags=tags)
    return journal


def finish(folder: RunFolder, role: str, experiment: Any, status: str = "done") -> None:
    journal = begin(folder, role, experiment)
    folder.training(role).checkpoint.mkdir(exist_ok=True)
    time.sleep(0.01)
    journal.write("end", status=status)


def test_what_an_interruption_has_left_is_done_and_no_more(tmp_path: Path, experiment: Any) -> None:
    folder = RunFolder.of("r", tmp_path)
    assert trainings_left(folder, experiment) == BOTH
    begin(folder, "reference", experiment)
    assert trainings_left(folder, experiment) == BOTH
    finish(folder, "reference", experiment)
    assert trainings_left(folder, experiment) == ("candidate",)
    begin(folder, "candidate", experiment)
    assert trainings_left(folder, experiment) == ("candidate",)
    finish(folder, "candidate", experiment, "stopped")
    assert trainings_left(folder, experiment) == ("candidate",)
    finish(folder, "candidate", experiment)
    assert trainings_left(folder, experiment) == BOTH
    finish(folder, "reference", experiment)  # the candidate is now the older one
    assert trainings_left(folder, experiment) == ("candidate",)


def test_another_experiment_begins_anew(tmp_path: Path, experiment: Any, repository: Path) -> None:
    folder = RunFolder.of("r", tmp_path)
    other = load_experiment(repository / "params" / "tiny.yaml", {"training.lr": 1e-4})[1]
    finish(folder, "reference", other)
    begin(folder, "candidate", other)
    assert trainings_left(folder, experiment) == BOTH
    assert not is_unfinished(folder.training("candidate"), experiment)
    assert is_unfinished(folder.training("candidate"), other)


def follow(
    folder: RunFolder, experiment: Any, monkeypatch: pytest.MonkeyPatch, node: int = 0
) -> None:
    """`follow_ranks`, with ranks that write a start, are seen by a tick, and end."""

    def launch_node(plan: LaunchPlan, node_rank: int, on_tick: Any) -> None:
        begin(folder, "candidate", experiment)
        on_tick()

    monkeypatch.setattr(supervise, "launch_node", launch_node)
    plan = plan_ranks(
        "some.worker", folder, "candidate", world_size=4, nnodes=2, device="cpu",
        logs=folder.training("candidate").logs,
    )  # fmt: skip
    supervise.follow_ranks(plan, experiment, "candidate", lambda text: None, node)


def test_a_node_s_devices_are_sampled_while_its_ranks_run(
    tmp_path: Path, experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.of("r", tmp_path)
    files = folder.training("candidate")
    for node in (0, 1):
        follow(folder, experiment, monkeypatch, node)
        (first,) = events(files.devices(node), "device_sampling")
        seconds = experiment.tracking.device_sample_seconds
        assert (first["device"], first["seconds"]) == ("cpu", seconds) and seconds > 1
        sample = events(files.devices(node), "device_sample")[-1]
        assert (sample["node"], sample["nodes"]) == (node, 2)
        assert sample["start"] == events(files.journal, "start")[-1]["time"]
    names = ["devices-node1.jsonl", "devices.jsonl"]
    assert [path.name for path in files.device_journals()] == names


def test_a_node_s_devices_are_left_alone_if_that_is_wished(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.of("r", tmp_path)
    settings = {"tracking.device_sample_seconds": None}
    experiment = load_experiment(repository / "params" / "tiny.yaml", settings)[1]
    follow(folder, experiment, monkeypatch)
    assert folder.training("candidate").device_journals() == []


def test_only_an_attempt_that_did_not_end_is_gone_on_with(tmp_path: Path, experiment: Any) -> None:
    folder = RunFolder.of("r", tmp_path)
    files = folder.training("candidate")
    assert not is_unfinished(files, experiment)
    begin(folder, "candidate", experiment)
    assert is_unfinished(files, experiment)
    finish(folder, "candidate", experiment)
    assert not is_unfinished(files, experiment)
    finish(folder, "candidate", experiment, "stopped")
    assert is_unfinished(files, experiment)
    files.checkpoints.rmdir()
    assert not is_unfinished(files, experiment)
