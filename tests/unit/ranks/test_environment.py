"""What ranks have in their environment: whose value wins, and which values are refused."""

import os
from pathlib import Path

import pytest

from internlm_lib.errors import InputError
from internlm_lib.experiment.variables import variables, variables_of
from internlm_lib.ranks.environment import rank_environment

PACKAGES = {"TORCH_DEVICE_BACKEND_AUTOLOAD", "DS_ACCELERATOR", "TOKENIZERS_PARALLELISM"}


@pytest.fixture(autouse=True)
def a_shell_without_any_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*variables(), *PACKAGES):
        monkeypatch.delenv(name, raising=False)


def test_the_shell_wins_over_the_params_file_and_that_over_the_kit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(**chosen: str) -> str:
        return rank_environment("npu", 8, chosen=chosen)["HCCL_CONNECT_TIMEOUT"]

    assert found() == variables()["HCCL_CONNECT_TIMEOUT"].default == "1200"
    assert found(HCCL_CONNECT_TIMEOUT="1800") == "1800"
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "600")
    assert found(HCCL_CONNECT_TIMEOUT="1800") == "600"


@pytest.mark.parametrize("device", ["npu", "cuda", "cpu"])
def test_a_device_gets_its_own_variables_only(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_BUFFSIZE", "400")  # the kit does not set it, all nodes shall have it
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    chosen = {"TASK_QUEUE_ENABLE": "2", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    found = rank_environment(device, 2, "ib0", chosen)
    own = {v.name for v in variables_of(device)}
    assert found.keys() <= own | PACKAGES
    expected = {
        "npu": {"HCCL_BUFFSIZE": "400", "TASK_QUEUE_ENABLE": "2", "HCCL_SOCKET_IFNAME": "=ib0"},
        "cuda": {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "NCCL_SOCKET_IFNAME": "=ib0",
                 "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        "cpu": {},
    }  # fmt: skip
    shared = {"GLOO_SOCKET_IFNAME": "ib0", "DS_ACCELERATOR": device}
    assert (expected[device] | shared).items() <= found.items()


def test_without_an_interface_none_is_named() -> None:
    assert not any("IFNAME" in name for name in rank_environment("npu", 8))


def test_threads_are_shared_by_the_ranks_unless_someone_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert rank_environment("cpu", 5)["OMP_NUM_THREADS"] == "2"
    assert rank_environment("cpu", 24)["OMP_NUM_THREADS"] == "1"
    assert rank_environment("cpu", 5, chosen={"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"


def test_packages_do_not_choose_a_device_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = rank_environment(None, 1)
    assert unknown["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0" and "DS_ACCELERATOR" not in unknown
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    assert rank_environment("cpu", 1)["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "1"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("HCCL_CONNECT_TIMEOUT", "119", "whole numbers, 120 to 7200 (s)"),
        ("HCCL_DETERMINISTIC", "True", "false, true, strict"),
        ("PYTORCH_NPU_ALLOC_CONF", "expandable_segments", "name:value, with commas between"),
    ],
)
def test_a_value_of_the_shell_that_is_not_allowed_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as refusal:
        rank_environment("npu", 8)
    for word in (f"{name} = {value!r}", allowed, variables()[name].source):
        assert word in str(refusal.value)
    assert name not in rank_environment("cuda", 8)  # nobody there reads it


def test_two_names_of_the_allocators_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch_npu would end every rank for it."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    chosen = {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    with pytest.raises(InputError, match="PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF: set only"):
        rank_environment("npu", 8, chosen=chosen)
    assert rank_environment("cuda", 8, chosen=chosen)["PYTORCH_ALLOC_CONF"]


def test_the_readme_explains_each_variable_that_the_kit_sets_on_an_npu(repository: Path) -> None:
    readme = (repository / "README.md").read_text(encoding="utf-8")
    deterministic = [v.name for v in variables_of("npu") if v.deterministic]
    for name in (*rank_environment("npu", 8, "eth0"), *deterministic):
        assert f"`{name}`" in readme, name
