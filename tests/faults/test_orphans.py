"""Nothing outlives papermill, however it ends while ranks are training."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from internlm_lib.experiment.schema import Layout
from internlm_lib.journal import events
from internlm_lib.run_folder import RunFolder
from tests.conftest import heed_interrupts
from tests.parity.make_run import make_run

SECONDS_TO_DIE = 30.0  # asked to stop, ranks finish their step and save
SECONDS_TO_START = 180.0
MARK = "INTERNLM_TEST_FAMILY"
TWO_RANKS = Layout(tensor_model_parallel_size=2, sequence_parallel=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose training would go on for hours."""
    root = tmp_path_factory.mktemp("faults")
    return make_run(root, TWO_RANKS, **{"training.train_iters": 100_000})


@pytest.fixture
def papermill(run: RunFolder, repository: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """papermill on 03_train, once its ranks have taken a step."""
    run.training("candidate").journal.unlink(missing_ok=True)
    process = subprocess.Popen(
        [
            sys.executable, "-m", "papermill", "-f", str(run.experiment),
            str(repository / "notebooks" / "03_train.ipynb"), str(run.root / "out.ipynb"),
        ],
        env={**os.environ, "INTERNLM_HOME": str(run.root), MARK: str(run.root)},
        cwd=run.root,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )  # fmt: skip
    deadline = time.monotonic() + SECONDS_TO_START
    while not events(run.training("candidate").journal, "step"):
        assert process.poll() is None, "papermill ended before the first step"
        assert time.monotonic() < deadline, "no step in time"
        time.sleep(0.2)
    yield process
    for left in family(run):
        left.kill()
    process.wait()


def family(run: RunFolder) -> list[psutil.Process]:
    """Every living process that papermill started, at any remove."""
    found = []
    for process in psutil.process_iter():
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get(MARK) == str(run.root):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_papermill(
    how: signal.Signals, papermill: "subprocess.Popen[bytes]", run: RunFolder
) -> None:
    commands = [" ".join(process.cmdline()) for process in family(run)]
    # papermill, its kernel, torchrun, two ranks and the tail that feeds MLflow.
    assert sum("internlm_lib.training.worker" in c for c in commands) >= 3, commands
    assert any("ipykernel" in c for c in commands), commands
    papermill.send_signal(how)
    deadline = time.monotonic() + SECONDS_TO_DIE
    while (left := family(run)) and time.monotonic() < deadline:
        papermill.poll()
        time.sleep(0.2)
    assert [process.cmdline() for process in left] == []
