import subprocess
import sys
from pathlib import Path

import pytest

from internlm_lib import provenance
from internlm_lib.experiment.load import load_experiment

TINY = Path(__file__).resolve().parents[2] / "params" / "tiny.yaml"


def _hash(**overrides):
    return provenance.sha256_of_experiment(
        load_experiment(TINY, {key.replace("__", "."): v for key, v in overrides.items()})[1]
    )


@pytest.mark.parametrize(
    "overrides",
    [
        {"parallel__candidate": {"tensor_model_parallel_size": 1}},
        {"parallel__device": "npu"},
        {"training__micro_batch_size": 4},
        {"training__use_flash_attn": False},
        {"training__deterministic_mode": True},
        {"tracking__experiment": "elsewhere"},
        {"evaluation__loss_tolerance": 0.5},
    ],
)
def test_how_an_experiment_is_computed_does_not_change_its_hash(overrides):
    assert _hash(**overrides) == _hash()


@pytest.mark.parametrize(
    "overrides",
    [
        {"training__lr": 1e-3},
        {"training__global_batch_size": 32},
        {"training__precision": "bf16"},
        {"model__hidden_size": 256},
        {"optimizer__weight_decay": 0.1},
        {"optimizer__predecessor_decay": True},
        {"training__rampup_batch_size": [8, 8, 100], "training__micro_batch_size": 4},
        {"data__pocket_seed": 1},
    ],
)
def test_what_is_computed_changes_its_hash(overrides):
    assert _hash(**overrides) != _hash()


def test_record_names_versions_host_and_environment():
    record = provenance.record()
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["megatron-core"].startswith("0.16")
    assert "torch_npu" not in record
    assert record["memory_bytes"] > 2**28 and record["cpu_cores"] >= 1
    assert len(record["environment_sha256"]) == 64
    assert record["environment_sha256"] == provenance.environment_sha256()


def test_git_state_knows_commit_changes_and_the_lack_of_a_repository(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@e"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    nothing = {"git_commit": "unknown", "git_dirty": "unknown"}
    assert provenance.git_state(tmp_path) == nothing
    git("init")
    assert provenance.git_state(tmp_path) == nothing
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert provenance.git_state(tmp_path) == {"git_commit": commit, "git_dirty": False}
    assert provenance.git_state(tmp_path / "inner") == nothing
    (tmp_path / "inner" / "file").write_text("2")
    assert provenance.git_state(tmp_path)["git_dirty"] is True
