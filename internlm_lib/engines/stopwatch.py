"""Where the time of a training step goes, seen from one rank."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal

from torch.distributed import ProcessGroup, Work

from internlm_lib.data.batches import Batch

Part = Literal["forward_backward", "optimizer"]

_COLLECTIVES = (
    "_allgather_base", "_reduce_scatter_base", "all_gather_single", "all_gather_single_coalesced",
    "all_to_all_single", "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced",
    "allreduce", "allreduce_coalesced", "alltoall", "alltoall_base", "barrier", "broadcast",
    "gather", "recv", "recv_anysource", "reduce", "reduce_scatter", "reduce_scatter_single",
    "reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced", "scatter", "send",
)  # fmt: skip
"""Methods of a process group that every torch.distributed function ends in."""


class Stopwatch:
    """Times one step's parts, which do not overlap: what is left of the step is none of them.

    On an accelerator a part ends when its last kernel is queued, unless it reads a number from the
    device: both engines read the loss at the end of the forward and backward passes.
    """

    def __init__(self) -> None:
        self._data = 0.0
        self._parts: dict[Part, float] = {"forward_backward": 0.0, "optimizer": 0.0}
        self._begin = _clock.seconds

    def data(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each is there counts as `data`."""
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self._data += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """What is done in the block counts as `name`, but for data and communication in it."""
        begin, others = time.perf_counter(), self._others()
        yield
        self._parts[name] += time.perf_counter() - begin - (self._others() - others)

    def seconds(self) -> dict[str, float]:
        """Fields of the journal's `step` event, in seconds of this rank.

        `data_seconds`: waiting for batches. `forward_backward_seconds`, `optimizer_seconds`:
        computing, clipping and the gradient norm belonging to the latter.
        `communication_seconds`: inside torch.distributed's calls and their `wait`, which includes
        waiting for slower ranks and the bubbles of a pipeline; what goes on behind the back of
        computation is not in it. Left out unless `time_collectives` was called: then it is part
        of the other two.
        """
        found = {"data_seconds": self._data}
        found |= {f"{name}_seconds": value for name, value in self._parts.items()}
        if self._begin is not None and _clock.seconds is not None:
            found["communication_seconds"] = _clock.seconds - self._begin
        return found

    def _others(self) -> float:
        return self._data + (_clock.seconds or 0.0)


class _Clock:
    seconds: float | None = None
    """Time in collectives since they are timed; None before."""


_clock = _Clock()


def time_collectives() -> None:
    """Time every collective of this process from now on; a second call does nothing.

    Only where a collective is done when its call or its `wait` returns, as with gloo on a CPU:
    nccl and hccl queue theirs, and a clock around the call would measure the queueing.
    """
    if _clock.seconds is not None:
        return
    _clock.seconds = 0.0
    Work.wait = _timed(Work.wait)  # type: ignore[method-assign]
    for name in _COLLECTIVES:
        setattr(ProcessGroup, name, _timed(getattr(ProcessGroup, name)))


def _timed(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return method(*arguments, **options)
        finally:
            _clock.seconds = (_clock.seconds or 0.0) + time.perf_counter() - begin

    return call
