"""What a rank holds: on a CPU measured, of an allocator its own figures."""

import time

import pytest

from internlm_lib.devices import Memory, select_device
from internlm_lib.devices.meta import MetaDevice

MIB = 2**20


def test_a_cpu_s_memory_is_the_process_s() -> None:
    device = select_device("cpu")
    before = device.memory()
    block = bytearray(b"x" * (64 * MIB))
    during = device.memory()
    del block
    after = device.memory()
    assert during.allocated_bytes - before.allocated_bytes == pytest.approx(64 * MIB, rel=0.1)
    assert after.allocated_bytes < during.allocated_bytes - 32 * MIB
    assert during.peak_bytes >= during.allocated_bytes
    assert after.peak_bytes >= during.allocated_bytes - MIB
    assert before.reserved_bytes is None


def test_it_may_be_asked_at_every_step() -> None:
    device = select_device("cpu")

    def microseconds() -> float:
        begin = time.perf_counter()
        for _ in range(200):
            device.memory()
        return (time.perf_counter() - begin) / 200 * 1e6

    assert min(microseconds() for _ in range(5)) < 50


def test_an_allocator_s_figures_are_those_of_all_its_pools() -> None:
    """Shape of `torch.cuda.memory_stats_as_nested_dict()`, and torch_npu's."""
    pools = {"small_pool": {"current": 1, "peak": 1}, "large_pool": {"current": 2, "peak": 8}}
    stats = {
        "allocated_bytes": {"all": {"current": 3, "peak": 9, "allocated": 50}, **pools},
        "reserved_bytes": {"all": {"current": 16, "peak": 32, "allocated": 64}, **pools},
        "num_ooms": 0,
    }
    assert Memory.of_allocator(stats) == Memory(3, 16, 9)


def test_the_meta_device_holds_nothing() -> None:
    assert MetaDevice().memory() == Memory(0, None, 0)
