"""The pipeline on small stand-in notebooks: skip, resume, failures, signals."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from internlm_lib import pipeline
from internlm_lib.errors import InputError, KitError
from internlm_lib.experiment.load import NOTEBOOK_PARAMETERS, load_experiment
from internlm_lib.files import read_json
from internlm_lib.progress import RunProgress, print_summary
from internlm_lib.run_folder import RunFolder
from internlm_lib.stages import inputs
from internlm_lib.stages.stage import STAGES, begin_stage, inputs_path, status_path

RUN = "tiny"
SECONDS_TO_DIE = 15.0


@pytest.fixture(autouse=True)
def no_mirroring(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a parent mirrored the run already; MLflow has its own tests."""
    monkeypatch.setenv("INTERNLM_TAIL", RUN)


def write_notebook(home: Path, stage: str, body: str, end: str = "stage.finish({})") -> None:
    parameters = new_code_cell("\n".join(f"{name} = None" for name in NOTEBOOK_PARAMETERS))
    parameters.metadata["tags"] = ["parameters"]
    opening = (
        "from pathlib import Path\nfrom internlm_lib.stages.stage import open_stage\n"
        "from internlm_lib import errors\n"
        f"stage = open_stage('{stage}', globals())"
    )
    cells = [parameters, *(new_code_cell(text) for text in (opening, body, end) if text)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = home / "notebooks" / f"{stage}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def run(home: Path, *stages: str, **options) -> dict:
    return pipeline.run_pipeline(home / "params/tiny.yaml", only=stages, **options)


def statuses(summary: dict) -> dict[str, str]:
    return {stage: values["status"] for stage, values in summary["stages"].items()}


def test_resumes_at_the_failed_stage_and_skips_what_has_not_changed(home: Path) -> None:
    write_notebook(home, "01_prepare", "", "stage.finish({'documents': 3})")
    trained = {"engine": "megatron", "layout": "TP2", "loss_first": 6.2, "loss_last": 0.5}
    write_notebook(
        home,
        "03_train",
        "log = stage.folder.training('candidate').logs / 'rank1.error'\n"
        "log.parent.mkdir(parents=True, exist_ok=True)\n"
        "log.write_text('trace')\n"
        "if Path('broken').exists():\n    raise errors.WorkerError('rank 1 ran out of luck')",
        f"stage.finish({{'reference': None, 'candidate': {trained}}})",
    )
    stages = ("01_prepare", "03_train")

    (home / "broken").touch()
    first = run(home, *stages)
    assert statuses(first) == {"01_prepare": "done", "03_train": "failed"}
    assert first["candidate"] is None
    error = first["error"]
    assert (error["stage"], error["kind"], error["exit_code"]) == ("03_train", "WorkerError", 1)
    assert error["message"] == "rank 1 ran out of luck"
    assert error["log"] == "runs/tiny/training/candidate/logs/rank1.error"
    assert error["notebook"] == "reports/tiny/notebooks/03_train.ipynb"
    status = read_json(status_path(RunFolder.of(RUN), "03_train"))
    assert (status["status"], status["result"]["error"]) == ("failed", "rank 1 ran out of luck")
    assert "failed" in (home / first["report"]).read_text()

    (home / "broken").unlink()
    second = run(home, *stages)
    assert statuses(second) == {"01_prepare": "unchanged", "03_train": "done"}
    assert second["candidate"] == trained and "error" not in second
    report = home / "reports/tiny/notebooks"
    assert (report / "03_train.html").stat().st_mtime >= (
        report / "01_prepare.html"
    ).stat().st_mtime

    events: list[pipeline.Event] = []
    third = run(home, *stages, on_event=events.append)
    assert statuses(third) == {"01_prepare": "unchanged", "03_train": "unchanged"}
    assert third["candidate"] == trained
    assert [event.status for event in events] == ["unchanged", "unchanged"]

    (report / "01_prepare.ipynb").unlink()
    fourth = run(home, *stages, on_event=events.append)
    assert statuses(fourth) == {"01_prepare": "done", "03_train": "done"}
    assert "changed: 01_prepare" in [event.detail for event in events]


def test_a_failed_verdict_lets_the_later_stages_run_and_sets_the_exit_code(home: Path) -> None:
    statistics = "{'mean_relative_error': 0.5, 'verdict': 'fail'}"
    check = "raise errors.VerdictError('verdict: fail; 0.5 exceeds 0.02')"
    write_notebook(home, "04_compare", f"stage.finish({statistics})", check)
    write_notebook(
        home, "06_evaluate", "", "stage.finish({'accuracy': {'before': .2, 'after': .9}})"
    )
    summary = run(home, "04_compare", "06_evaluate")
    assert statuses(summary) == {"04_compare": "failed", "06_evaluate": "done"}
    assert summary["error"]["exit_code"] == 3
    assert summary["compare"]["mean_relative_error"] == 0.5
    assert summary["compare"]["verdict"] == "fail"
    assert summary["accuracy"] == {"before": 0.2, "after": 0.9}


@pytest.mark.parametrize(
    ("body", "end", "kind", "message"),
    [
        ("", "", "KitError", "without stage.finish"),
        ("import os\nos._exit(1)", "stage.finish({})", "DeadKernelError", "Kernel died"),
        ("1 / 0", "stage.finish({})", "ZeroDivisionError", "ZeroDivisionError: division by zero"),
    ],
)
def test_ways_to_fail(home: Path, body: str, end: str, kind: str, message: str) -> None:
    write_notebook(home, "01_prepare", body, end)
    write_notebook(home, "02_convert", "")
    summary = run(home, "01_prepare", "02_convert")
    assert statuses(summary) == {"01_prepare": "failed"}
    assert summary["error"]["kind"] == kind
    assert message in summary["error"]["message"]
    assert summary["error"]["exit_code"] == 1
    assert read_json(status_path(RunFolder.of(RUN), "01_prepare"))["status"] == "failed"


def test_missing_notebook_is_bad_input(home: Path) -> None:
    error = run(home, "01_prepare")["error"]
    assert error["exit_code"] == 2 and "01_prepare.ipynb" in error["message"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_signals_leave_no_process_behind(home: Path, how: signal.Signals) -> None:
    write_notebook(
        home,
        "01_prepare",
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "Path('pids.tmp').write_text(f'{os.getpid()} {child.pid}')\n"
        "Path('pids.tmp').rename('pids')\n"
        "time.sleep(600)",
    )
    command = [sys.executable, "-m", "internlm_lib.cli", "run", "params/tiny.yaml", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_for((home / "pids").exists)
    kernel, child = (psutil.Process(int(pid)) for pid in (home / "pids").read_text().split())
    process.send_signal(how)
    output, _ = process.communicate(timeout=SECONDS_TO_DIE)
    wait_for(lambda: not kernel.is_running())
    if how is signal.SIGKILL:
        child.kill()  # a bare child outlives a killed kernel; ranks have a watchdog of their own
        return
    wait_for(lambda: not child.is_running())
    assert process.returncode == 1
    assert json.loads(output)["error"]["kind"] == "Interrupted"
    assert read_json(status_path(RunFolder.of(RUN), "01_prepare"))["status"] == "failed"


def wait_for(condition) -> None:
    deadline = time.monotonic() + SECONDS_TO_DIE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_one_pipeline_per_run(home: Path) -> None:
    folder = RunFolder.of(RUN)
    folder.path.mkdir(parents=True)
    with (folder.path / "pipeline.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(KitError, match="another `internlm run`"):
            run(home, "01_prepare")


def test_stage_names_are_checked(home: Path) -> None:
    with pytest.raises(InputError, match="did you mean 03_train"):
        run(home, "train")
    with pytest.raises(InputError, match="leave no stage"):
        run(home, "01_prepare", start_from="03_train")
    assert pipeline._choose((), "05_infer") == ["05_infer", "06_evaluate"]
    assert pipeline._choose(("06_evaluate", "04_compare"), None) == ["04_compare", "06_evaluate"]


def done(stage: str, params: Path, **overrides) -> None:
    """Do a stage as the pipeline does, without a notebook."""
    _, experiment = load_experiment(params, overrides)
    folder = RunFolder.of(RUN)
    read = inputs.inputs_of(stage, folder, experiment)
    begin_stage(stage, folder, experiment).finish({})
    inputs.record_inputs(stage, folder, read)


def changed(params: Path, overrides: dict) -> dict[str, list[str]]:
    _, experiment = load_experiment(params, overrides)
    folder = RunFolder.of(RUN)
    found = {
        stage: inputs.what_changed(stage, folder, inputs.inputs_of(stage, folder, experiment))
        for stage in STAGES
    }
    return {stage: names for stage, names in found.items() if names}


def test_a_stage_depends_on_what_it_reads_and_on_nothing_else(home: Path) -> None:
    params = home / "params/tiny.yaml"
    for stage in STAGES:
        done(stage, params)
    assert changed(params, {}) == {}
    assert changed(params, {"training.lr": 1e-3}) == {"03_train": ["params"]}
    assert changed(params, {"evaluation.loss_tolerance": 0.5}) == {"04_compare": ["params"]}
    assert changed(params, {"evaluation.num_fewshot": 0}) == {"06_evaluate": ["params"]}
    assert changed(params, {"generation.max_new_tokens": 3}) == {"05_infer": ["params"]}
    assert changed(params, {"tracking.experiment": "other"}) == {}
    assert set(changed(params, {"data.pocket_seed": 7})) == {"01_prepare"}

    done("03_train", params)
    later = ("04_compare", "05_infer", "06_evaluate")
    assert changed(params, {}) == {stage: ["03_train"] for stage in later}


def test_files_named_by_the_experiment_are_inputs(home: Path) -> None:
    params = home / "params/tiny.yaml"
    (home / "records.json").write_text("[]")
    named = {"data.train_path": "records.json"}
    done("01_prepare", params, **named)
    assert "01_prepare" not in changed(params, named)
    (home / "records.json").write_text("[{}]")
    assert changed(params, named)["01_prepare"] == ["files"]


def test_a_stage_done_by_hand_is_not_trusted(home: Path) -> None:
    params = home / "params/tiny.yaml"
    done("01_prepare", params)
    _, experiment = load_experiment(params, {"data.pocket_seed": 7})
    begin_stage("01_prepare", RunFolder.of(RUN), experiment).finish({})
    assert not inputs_path(RunFolder.of(RUN), "01_prepare").exists()
    assert changed(params, {})["01_prepare"] == ["not done yet"]


def test_terminal_shows_stages_and_the_closing_table(home: Path) -> None:
    from rich.console import Console

    console = Console(record=True, file=open(os.devnull, "w"), width=100)
    show = RunProgress(console).show
    folder = RunFolder.of(RUN)
    show(pipeline.Event(folder, "01_prepare", "unchanged"))
    show(pipeline.Event(folder, "03_train", "running", detail="changed: params"))
    show(pipeline.Event(folder, "03_train", "done", 12.5))
    training = {"engine": "megatron", "layout": "megatron TP2", "loss_first": 6.2,
                "loss_last": 0.5, "tokens_per_second": 23456.0}  # fmt: skip
    print_summary(
        {
            "run": RUN,
            "stages": {},
            "reference": None,
            "candidate": training,
            "compare": {"mean_relative_error": 3e-7, "max_relative_error": 1e-6,
                        "max_absolute_error": 2e-6, "verdict": "pass"},
            "accuracy": {"before": 0.25, "after": 0.714},
            "report": "reports/tiny/index.html",
        },
        console,
    )  # fmt: skip
    text = console.export_text()
    for expected in (
        "01_prepare   unchanged", "runs again, changed: params", "12.5 s", "6.2 → 0.5", "23,456",
        "mean 3e-07, max 1e-06", "25.0% → 71.4%", "reports/tiny/index.html", "make ui",
    ):  # fmt: skip
        assert expected in text
