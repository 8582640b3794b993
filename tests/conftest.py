"""What all tests share: a project root of their own, so that no test writes into the checkout."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Ranks that tests start find this folder's modules by their names from the checkout's root.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
)


@pytest.fixture
def repository() -> Path:
    """The checkout under test; only to be read."""
    return REPOSITORY


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project root with this checkout's params files, where the kit looks for it."""
    shutil.copytree(REPOSITORY / "params", tmp_path / "params")
    monkeypatch.setenv("INTERNLM_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def heed_interrupts() -> None:
    """For `Popen(preexec_fn=…)`: a shell lets its background jobs, and theirs, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


CLUSTER_VARIABLES = re.compile(
    "(SLURM|VC|VK|MA|PET|MINDX)_.*|RANK_TABLE_FILE|NNODES|NODE_RANK|NPROC_PER_NODE|MASTER_.*"
)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may themselves run in a job of a cluster, whose nodes are not theirs."""
    for name in filter(CLUSTER_VARIABLES.fullmatch, list(os.environ)):
        monkeypatch.delenv(name)
