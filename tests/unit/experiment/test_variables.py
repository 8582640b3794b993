"""The table of environment variables: complete, consistent, and what a value may be."""

import pytest
from pydantic import ValidationError

from internlm_lib.experiment.variables import (
    Variable,
    mistakes,
    those_of,
    variables,
    variables_of,
)

ROW = {"name": "A_B", "devices": ["npu"], "meaning": "m", "unset": "u", "source": "s"}

ALLOWED = {
    "HCCL_CONNECT_TIMEOUT": (["120", "7200", "1200"], ["119", "7201", "600 ", "-120", "1e3", ""]),
    "HCCL_EXEC_TIMEOUT": (["0", "1836", "2147483647"], ["2147483648", "0.05"]),
    "HCCL_BUFFSIZE": (["1", "100000"], ["0", "200MB"]),
    "HCCL_DETERMINISTIC": (["false", "true", "strict"], ["True", "1"]),
    "TASK_QUEUE_ENABLE": (["0", "1", "2"], ["3", "true"]),
    "CPU_AFFINITY_CONF": (
        ["0", "1", "2", "1,npu0:0-1,npu1:2-5,npu1:7-8,npu3:9-9", "1,npu_affine:1",
         "2,force:1,npu0:0-3", "mode:1"],
        ["3", "1,", "1,npu0", "npu0:0-1", "1,force:2"],
    ),
    "PYTORCH_NPU_ALLOC_CONF": (
        ["max_split_size_mb:32,garbage_collection_threshold:0.6", "page_size:1g",
         "expandable_segments:True,base_addr_aligned_kb:16",
         "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]"],
        ["expandable_segments", "a:", "a:1,", "a:1 ,b:2", "a:[1", ""],
    ),
    "HCCL_SOCKET_IFNAME": (
        ["eth", "eth,enp", "^eth,enp", "=eth0,enp0", "^=eth0", "=bond0.100"], ["", "=", "eth 0"],
    ),
    "NCCL_ALGO": (["Ring", "^NVLS", "allreduce:tree,collnetdirect"], ["", "Ring, Tree"]),
    "CUBLAS_WORKSPACE_CONFIG": ([":4096:8", ":16:8", ":4096:2:16:8"], ["4096:8", ":4096"]),
    "OMP_NUM_THREADS": (["1", "16", "4,2"], ["0", "-1", "all"]),
}  # fmt: skip
"""Values from the vendors' own examples, and some that they would refuse or misread."""


@pytest.mark.parametrize("name", ALLOWED)
def test_a_variable_permits_what_its_vendor_does(name: str) -> None:
    good, bad = ALLOWED[name]
    assert [value for value in good if not variables()[name].permits(value)] == []
    assert [value for value in bad if variables()[name].permits(value)] == []


def test_every_device_has_its_rows_and_each_row_says_what_holds_without_it() -> None:
    names = {device: {v.name for v in variables_of(device)} for device in ("npu", "cuda", "cpu")}
    assert {
        "HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT", "HCCL_DETERMINISTIC", "PYTORCH_NPU_ALLOC_CONF",
        "TASK_QUEUE_ENABLE", "COMBINED_ENABLE", "INF_NAN_MODE_ENABLE", "CPU_AFFINITY_CONF",
        "HCCL_SOCKET_IFNAME", "ASCEND_LAUNCH_BLOCKING", "ACL_DEVICE_SYNC_TIMEOUT",
    } <= names["npu"]  # fmt: skip
    assert {"CUDA_DEVICE_MAX_CONNECTIONS", "TORCH_NCCL_ASYNC_ERROR_HANDLING"} <= names["cuda"]
    assert names["cpu"] == {"GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"}
    assert all(v.name not in v.meaning and len(v.meaning) > 20 for v in variables().values())
    assert all(v.excludes in variables() for v in variables().values() if v.excludes)


@pytest.mark.parametrize("variable", variables().values(), ids=variables())
def test_what_holds_without_it_is_allowed_where_it_is_a_value(variable: Variable) -> None:
    assert variable.permits(variable.unset) or " " in variable.unset


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"values": ["0"], "between": [0, 1]},
        {"pattern": "x"},
        {"values": ["0", "1"], "default": "2", "why": "w"},
        {"values": ["0", "1"], "default": "1"},
        {"values": ["0", "1"], "deterministic": ["2"]},
        {"values": ["0", "1"], "devices": ["tpu"]},
        {"values": ["0", "1"], "source": ""},
        {"values": ["0", "1"], "range": [0, 1]},
    ],
)
def test_a_row_that_contradicts_itself_is_refused(row: dict[str, object]) -> None:
    Variable.model_validate({**ROW, "values": ["0", "1"]})
    with pytest.raises(ValidationError):
        Variable.model_validate({**ROW, **row})


def test_mistakes_are_all_told_and_the_rest_is_not() -> None:
    values = {"HCCL_BUFFSIZE": "0", "TASK_QUEUE_ENABLE": "2", "COMBINED_ENABLE": "yes"}
    buffer, combined = mistakes(values)
    assert buffer.startswith("HCCL_BUFFSIZE = '0': allowed is whole numbers, 1 or more (MB)")
    assert combined.startswith("COMBINED_ENABLE = 'yes': allowed is 0, 1 (fuses pairs")


def test_those_of_a_device_leave_out_what_is_not_known_or_not_its_own() -> None:
    values = {"PATH": "/bin", "HCCL_BUFFSIZE": "1", "NCCL_ALGO": "Ring", "OMP_NUM_THREADS": "2"}
    assert those_of("cuda", values) == {"NCCL_ALGO": "Ring", "OMP_NUM_THREADS": "2"}
