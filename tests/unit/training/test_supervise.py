"""Which trainings of an experiment are still to be done, by their journals."""

import time
from pathlib import Path
from typing import Any

import pytest

from internlm_lib import provenance
from internlm_lib.experiment.load import load_experiment
from internlm_lib.journal import Journal
from internlm_lib.run_folder import RunFolder
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
