"""Parts of a step are timed without each other, and collectives only where that is honest."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from internlm_lib.devices import select_device

PAUSE = 0.05


@pytest.fixture(scope="module")
def stopwatch() -> Any:
    select_device("cpu").adapt_megatron()
    from internlm_lib.engines import stopwatch

    return stopwatch


@pytest.fixture
def clock(stopwatch: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The clock of collectives as another process has it, and the methods that feed it."""
    monkeypatch.setattr(stopwatch._clock, "seconds", None)
    monkeypatch.setattr(stopwatch.Work, "wait", stopwatch.Work.wait)
    for name in stopwatch._COLLECTIVES:
        method = getattr(stopwatch.ProcessGroup, name)
        monkeypatch.setattr(stopwatch.ProcessGroup, name, method)
    return stopwatch._clock


def slow(numbers: list[int]) -> Iterator[Any]:
    for number in numbers:
        time.sleep(PAUSE)
        yield number


def test_parts_do_not_overlap(stopwatch: Any, clock: Any) -> None:
    clock.seconds = 1.0
    begin = time.perf_counter()
    watch = stopwatch.Stopwatch()
    batches = watch.data(slow([1, 2]))
    with watch.part("forward_backward"):
        assert next(batches) == 1
        time.sleep(2 * PAUSE)
        clock.seconds += PAUSE  # half of that was spent in a collective
    with watch.part("optimizer"):
        time.sleep(PAUSE)
    seconds = watch.seconds()
    whole = time.perf_counter() - begin
    assert seconds["communication_seconds"] == pytest.approx(PAUSE)
    assert PAUSE <= seconds["data_seconds"] and PAUSE <= seconds["optimizer_seconds"]
    assert seconds["forward_backward_seconds"] >= PAUSE * 0.99
    assert sum(seconds.values()) <= whole
    assert list(batches) == [2]


def test_without_a_clock_communication_is_left_out(stopwatch: Any, clock: Any) -> None:
    assert set(stopwatch.Stopwatch().seconds()) == {
        "data_seconds", "forward_backward_seconds", "optimizer_seconds"
    }  # fmt: skip


def test_every_collective_of_a_rank_is_timed(stopwatch: Any, clock: Any, tmp_path: Any) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        stopwatch.time_collectives()
        wrapped = stopwatch.Work.wait
        stopwatch.time_collectives()
        assert stopwatch.Work.wait is wrapped
        calls = (
            lambda x: dist.all_reduce(x),
            lambda x: dist.broadcast(x, 0),
            lambda x: dist.all_gather_into_tensor(torch.empty(4), x),
            lambda x: dist.reduce_scatter_tensor(torch.empty(4), x),
            lambda x: dist.all_reduce(x, async_op=True).wait(),
            lambda x: dist.barrier(),
        )
        for call in calls:
            before = clock.seconds
            call(torch.ones(4))
            assert clock.seconds > before
    finally:
        dist.destroy_process_group()
