"""The six notebooks, end to end, by the command that the README names; small, but nothing faked."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from internlm_lib.experiment.load import load_experiment
from internlm_lib.run_folder import RunFolder
from internlm_lib.stages.stage import STAGES
from internlm_lib.tracking.mlflow_store import store_uri

SMALLER = ("training.train_iters=6", "evaluation.limit=2", "generation.num_prompts=2",
           "generation.max_new_tokens=4")  # fmt: skip
LOSS_TOLERANCE = 1e-5


def run_kit(home: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The JSON object and the progress text of `internlm run` on the reduced tiny experiment."""
    assignments = [text for assignment in SMALLER for text in ("--set", assignment)]
    done = subprocess.run(
        [sys.executable, "-m", "internlm_lib.cli", "run", "params/tiny.yaml", "--json",
         *assignments, *arguments],
        cwd=home, env={**os.environ, "INTERNLM_HOME": str(home)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project root with the kit's notebooks and params files."""
    root = tmp_path_factory.mktemp("end_to_end")
    for name in ("notebooks", "params"):
        shutil.copytree(Path(__file__).resolve().parents[2] / name, root / name)
    yield root


@pytest.fixture(scope="module")
def summary(home: Path) -> dict[str, Any]:
    return run_kit(home)[0]


@pytest.fixture(scope="module")
def folder(home: Path, summary: dict[str, Any]) -> RunFolder:
    return RunFolder.of(summary["run"], home)


def test_the_summary_says_what_came_out(summary: dict[str, Any]) -> None:
    assert list(summary["stages"]) == list(STAGES)
    assert {stage["status"] for stage in summary["stages"].values()} == {"done"}
    assert summary["reference"]["engine"] == "deepspeed"
    assert summary["candidate"]["engine"] == "megatron"
    for role in ("reference", "candidate"):
        assert summary[role]["loss_last"] < summary[role]["loss_first"]
    assert summary["compare"]["verdict"] == "pass"
    assert summary["compare"]["mean_relative_error"] < LOSS_TOLERANCE
    assert 0 <= summary["accuracy"]["before"] <= 1


def test_every_notebook_is_there_executed_and_as_html(folder: RunFolder) -> None:
    for stage in STAGES:
        path = folder.report / "notebooks" / f"{stage}.ipynb"
        cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
        assert all(cell.execution_count for cell in cells)
        assert path.with_suffix(".html").stat().st_size > 10_000


def test_a_training_notebook_stays_small(folder: RunFolder) -> None:
    outputs = [
        output
        for cell in nbformat.read(folder.report / "notebooks" / "03_train.ipynb", 4).cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    lines = [str(o.get("data", {}).get("text/plain")) for o in outputs]
    assert sum("tokens/s" in line for line in lines) == 1


def test_figures_have_their_numbers_beside_them(folder: RunFolder) -> None:
    figures = {path.stem for path in folder.figures.glob("*.png")}
    assert figures == {path.stem for path in folder.figures.glob("*.svg")}
    tables = {path.stem for path in folder.tables.glob("*.csv")}
    renamed = {"training_loss": "loss"}
    assert {renamed.get(name, name) for name in figures} <= tables
    with (folder.tables / "loss.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6


def test_mlflow_holds_a_run_per_stage_and_training_below_one_parent(
    home: Path, folder: RunFolder
) -> None:
    import mlflow

    client = mlflow.MlflowClient(store_uri(home))
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id])
    names = {run.info.run_name: run for run in runs}
    parent = names.pop(folder.name)
    assert set(names) == {*STAGES, "03_train-reference", "03_train-candidate"}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in names.values()} == {parent.info.run_id}
    candidate = names["03_train-candidate"]
    assert len(client.get_metric_history(candidate.info.run_id, "train/loss")) == 6
    reference = names["03_train-reference"]
    for tag in ("config_sha256", "data_sha256", "weights_sha256", "environment_sha256"):
        assert candidate.data.tags[tag] == reference.data.tags[tag]
    assert candidate.data.tags["device"] == "cpu"


def test_a_second_run_skips_everything_and_says_so(home: Path, summary: dict[str, Any]) -> None:
    again, progress = run_kit(home)
    assert {stage["status"] for stage in again["stages"].values()} == {"unchanged"}
    assert progress.count("skipped") == len(STAGES)
    assert {k: v for k, v in again.items() if k != "stages"} == {
        k: v for k, v in summary.items() if k != "stages"
    }


def test_a_changed_setting_runs_its_stage_and_no_other(home: Path, summary: dict[str, Any]) -> None:
    again, progress = run_kit(home, "--set", "evaluation.loss_tolerance=0.5")
    done = [name for name, stage in again["stages"].items() if stage["status"] == "done"]
    assert done == ["04_compare"]
    assert "changed: params" in progress


def test_the_experiment_that_ran_is_written_down(folder: RunFolder) -> None:
    name, experiment = load_experiment(folder.experiment)
    assert (name, experiment.training.train_iters) == ("tiny", 6)
