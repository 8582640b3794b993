"""Devices that a variable hides are told from those that are not there."""

import pytest

from internlm_lib.devices.base import check_world_size
from internlm_lib.devices.cpu import CpuDevice
from internlm_lib.devices.visible import visible_devices
from internlm_lib.errors import InputError


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ("0", 1),
        ("0,1, 2,3", 4),
        ("0-3", 4),
        ("0-3,6,7", 6),
        ("Ascend910-0,Ascend910-1", 2),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 1),
        ("MIG-GPU-8932f937/1/0,1", 2),
        ("0,-1,1", 1),
        ("-1", 0),
        ("", None),
        ("all", None),
        ("0,,1", None),
    ],
)
def test_lists_of_devices_are_counted(value: str, count: int | None) -> None:
    for name in ("ASCEND_RT_VISIBLE_DEVICES", "ASCEND_VISIBLE_DEVICES"):
        shown = visible_devices("npu", {name: value})
        assert (shown and shown.count) == count
        assert shown is None or shown.said == f"{name}={value}"
    assert visible_devices("cpu", {"CUDA_VISIBLE_DEVICES": value}) is None


def test_the_variable_that_shows_the_fewest_counts() -> None:
    environ = {"ASCEND_VISIBLE_DEVICES": "0-7", "ASCEND_RT_VISIBLE_DEVICES": "2,3"}
    shown = visible_devices("npu", environ)
    assert shown and (shown.count, shown.said) == (2, "ASCEND_RT_VISIBLE_DEVICES=2,3")
    assert visible_devices("cuda", environ) is None


class Eight(CpuDevice):
    name = "npu"

    def count(self) -> int:  # type: ignore[override]
        return 8


def test_ranks_beyond_the_visible_devices_are_refused_by_the_variables_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1,2,3")
    with pytest.raises(InputError) as refusal:
        check_world_size(Eight(), 8, "--nproc-per-node")
    assert "this node has 4 (ASCEND_RT_VISIBLE_DEVICES=0,1,2,3)" in str(refusal.value)
    check_world_size(Eight(), 4, "--nproc-per-node")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0-15")
    with pytest.raises(InputError, match="this node has 8; "):
        check_world_size(Eight(), 9, "--nproc-per-node")
