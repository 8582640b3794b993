import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from internlm_lib.journal import Journal
from internlm_lib.run_folder import RunFolder
from internlm_lib.tracking import tail
from internlm_lib.tracking.tail import Tail


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder.of("r", tmp_path)
    folder.path.mkdir(parents=True)
    values = {"run_name": "r", "tracking": {"uri": None, "experiment": "e"}}
    folder.experiment.write_text(yaml.safe_dump(values))
    return folder


def test_stop_sends_everything_that_was_written(folder):
    mirror = Tail.start(folder)
    assert Tail.start(folder) is mirror
    Journal(folder.journal).write("metrics", stage="05_infer", values={"a": 2.5}, step=0)
    mirror.stop()
    assert not mirror.alive
    mirror.stop()
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder.root}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("e")
    runs = client.search_runs([experiment.experiment_id], "metrics.a = 2.5")
    assert [run.info.run_name for run in runs] == ["05_infer"]


def test_a_store_that_refuses_is_a_warning_and_a_log(folder):
    values = {"run_name": "r", "tracking": {"uri": "http://127.0.0.1:9", "experiment": "e"}}
    folder.experiment.write_text(yaml.safe_dump(values))
    Journal(folder.journal).write("metrics", stage="05_infer", values={"a": 2.5}, step=0)
    mirror = Tail.start(folder)
    with pytest.warns(RuntimeWarning, match="internlm sync r"):
        mirror.stop()
    assert "KitError" in tail.log_path(folder).read_text()


def test_a_stuck_pass_does_not_hold_up_the_stage(folder, monkeypatch):
    mirror = Tail.start(folder)
    process = mirror.process
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(tail, "_STOP_SECONDS", 0.2)
    with pytest.warns(RuntimeWarning, match="did not get everything"):
        mirror.stop()
    assert process.returncode == -signal.SIGKILL


def test_the_run_of_a_parent_s_tail_is_left_to_it(folder, monkeypatch):
    monkeypatch.setenv(tail.OWNER_VARIABLE, "r")
    mirror = Tail.start(folder)
    mirror.stop()
    assert not mirror.alive and not tail.log_path(folder).exists()
    monkeypatch.setenv(tail.OWNER_VARIABLE, "another")
    other = Tail.start(folder)
    assert other.alive
    other.process.kill()
    other.process.communicate()


def test_it_dies_with_its_parent(folder):
    code = (
        "import sys, os, pathlib\n"
        "from internlm_lib.run_folder import RunFolder\n"
        "from internlm_lib.tracking.tail import Tail\n"
        "assert 'mlflow' not in sys.modules\n"
        f"tail = Tail.start(RunFolder.of('r', pathlib.Path({str(folder.root)!r})))\n"
        "print(tail.process.pid, flush=True)\n"
        "os._exit(9)\n"
    )
    parent = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    child = int(parent.stdout)
    deadline = time.monotonic() + 30  # a machine may be busy
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"
