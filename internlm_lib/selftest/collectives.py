"""What ranks say to each other arrives, in every way that the engines use, and how fast."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from internlm_lib.devices import Device
from internlm_lib.selftest.checks import Check, Outcome
from internlm_lib.selftest.sizes import Sizes, dtype_name

_REPEATS = 3
_DTYPES = (torch.float32, torch.bfloat16)
"""What gradients and activations travel in."""


@dataclass(frozen=True)
class Collective:
    """One way to exchange [n × m] elements, n being the number of ranks."""

    name: str
    run: Callable[[Tensor], Tensor]
    """From what a rank puts in to what it gets out."""
    expected: Callable[[int, int, int], Tensor]
    """(rank, n, m) → what `run` must give: sums of `_pattern`, exact in every dtype."""
    traffic: Callable[[int], float]
    """(n) → bytes over the busiest link per byte put in, as nccl-tests counts its bus bandwidth
    (doc/PERFORMANCE.md)."""


def collective_checks(device: Device, sizes: Sizes) -> Iterator[Check]:
    """One per collective and dtype; every rank carries them out at the same time."""
    for collective in COLLECTIVES:
        for dtype in _DTYPES:
            name = f"{collective.name}, {dtype_name(dtype)}"
            find = partial(_exchange, collective, dtype, device, sizes.exchanged_bytes)
            yield Check("collectives", name, "largest difference", 0.0, find)


def _exchange(
    collective: Collective, dtype: torch.dtype, device: Device, exchanged_bytes: int
) -> Outcome:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    part = max(1, exchanged_bytes // dtype.itemsize // ranks)
    put_in = _pattern(rank, ranks, part).to(device=device.current(), dtype=dtype)
    got = collective.run(put_in.clone())
    difference = (got.cpu().double() - collective.expected(rank, ranks, part).double()).abs().max()
    traffic = collective.traffic(ranks) * put_in.nbytes
    if not traffic:
        return Outcome(float(difference), {"ranks": ranks})
    seconds = median(_timed(collective, put_in.clone(), device) for _ in range(_REPEATS))
    return Outcome(float(difference), {"ranks": ranks, "bus GB/s": traffic / seconds / 1e9})


def _timed(collective: Collective, put_in: Tensor, device: Device) -> float:
    dist.barrier()
    device.synchronize()
    begin = time.perf_counter()
    collective.run(put_in)
    device.synchronize()
    return time.perf_counter() - begin


def _pattern(rank: int, ranks: int, part: int) -> Tensor:
    """[n × m] small whole numbers, other ones for every rank."""
    return (torch.arange(ranks * part) % 5 + rank % 7).float()


def _all_reduce(put_in: Tensor) -> Tensor:
    dist.all_reduce(put_in)
    return put_in


def _reduce_scatter(put_in: Tensor) -> Tensor:
    out = put_in.new_empty(len(put_in) // dist.get_world_size())
    dist.reduce_scatter_tensor(out, put_in)
    return out


def _all_gather(put_in: Tensor) -> Tensor:
    part = put_in[: len(put_in) // dist.get_world_size()].contiguous()
    out = torch.empty_like(put_in)
    dist.all_gather_into_tensor(out, part)
    return out


def _broadcast(put_in: Tensor) -> Tensor:
    dist.broadcast(put_in, src=dist.get_world_size() - 1)
    return put_in


def _all_to_all(put_in: Tensor) -> Tensor:
    out = torch.empty_like(put_in)
    dist.all_to_all_single(out, put_in)
    return out


def _ring(put_in: Tensor) -> Tensor:
    """To the next rank and from the one before, as pipeline stages."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks == 1:
        return put_in
    out = torch.empty_like(put_in)
    send = dist.P2POp(dist.isend, put_in, (rank + 1) % ranks)
    receive = dist.P2POp(dist.irecv, out, (rank - 1) % ranks)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()
    return out


def _sum(rank: int, ranks: int, part: int) -> Tensor:
    return torch.stack([_pattern(r, ranks, part) for r in range(ranks)]).sum(0)


def _parts(values: Tensor, rank: int, part: int) -> Tensor:
    return values[rank * part : (rank + 1) * part]


COLLECTIVES = (
    Collective("all-reduce", _all_reduce, _sum, lambda n: 2 * (n - 1) / n),
    Collective(
        "reduce-scatter", _reduce_scatter,
        lambda rank, n, part: _parts(_sum(rank, n, part), rank, part), lambda n: (n - 1) / n,
    ),
    Collective(
        "all-gather", _all_gather,
        lambda rank, n, part: torch.cat([_pattern(r, n, part)[:part] for r in range(n)]),
        lambda n: (n - 1) / n,
    ),
    Collective("broadcast", _broadcast, lambda rank, n, part: _pattern(n - 1, n, part),
               lambda n: float(n > 1)),
    Collective(
        "all-to-all", _all_to_all,
        lambda rank, n, part: torch.cat(
            [_parts(_pattern(r, n, part), rank, part) for r in range(n)]
        ),
        lambda n: (n - 1) / n,
    ),
    Collective("send and receive", _ring, lambda rank, n, part: _pattern((rank - 1) % n, n, part),
               lambda n: float(n > 1)),
)  # fmt: skip
