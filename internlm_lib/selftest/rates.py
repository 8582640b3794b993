"""How fast this rank's device multiplies and copies, and whether what comes out is right."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor

from internlm_lib.devices import Device
from internlm_lib.published.peaks import Precision, peak_of
from internlm_lib.selftest.checks import Check, Outcome
from internlm_lib.selftest.kernels import TOLERANCES
from internlm_lib.selftest.sizes import Sizes, dtype_name

_REPEATS = 5
_ROWS = 8
"""Of a product, how many are computed again in float64."""
_PRECISIONS: dict[torch.dtype, Precision] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


def rate_checks(device: Device, sizes: Sizes) -> Iterator[Check]:
    """Matrix products in every dtype, and copies of memory.

    Where the device's peak is known, a share above it would be an error: of the clock, of the
    table, or of the name. float32 has no such check, since devices may compute it as tf32.
    """
    for dtype in sizes.dtypes:
        name = f"matrix product, {dtype_name(dtype)}"
        yield Check(
            "rates", name, "error ÷ largest element", TOLERANCES[dtype],
            partial(_product, device, sizes.matrix, dtype),
        )  # fmt: skip
        peak = peak_of(device.description(), _PRECISIONS[dtype])
        if peak is not None and dtype != torch.float32:
            yield Check(
                "rates", f"{name}, share of the peak", "of the peak", 1.0,
                partial(_share, device, sizes.matrix, dtype, peak.tflops),
            )  # fmt: skip
    yield Check(
        "rates", "copy of device memory", "bytes that differ", 0.0,
        partial(_copy, device, sizes.copied_bytes),
    )  # fmt: skip
    if device.name != "cpu":
        yield Check(
            "rates", "copy to the device and back", "bytes that differ", 0.0,
            partial(_round_trip, device, sizes.copied_bytes),
        )  # fmt: skip


def _product(device: Device, size: int, dtype: torch.dtype) -> Outcome:
    left, right = _matrices(device, size, dtype)
    found = (left @ right)[:_ROWS].cpu().double()
    exact = left[:_ROWS].cpu().double() @ right.cpu().double()
    error = float((found - exact).abs().max() / exact.abs().max())
    return Outcome(error, {"TFLOPs": _tflops(device, left, right)})


def _share(device: Device, size: int, dtype: torch.dtype, peak: float) -> Outcome:
    tflops = _tflops(device, *_matrices(device, size, dtype))
    return Outcome(tflops / peak, {"peak TFLOPs": peak})


def _copy(device: Device, size: int) -> Outcome:
    source = torch.arange(size // 4, dtype=torch.int32, device=device.current())
    target = torch.empty_like(source)
    seconds = _seconds(device, lambda: target.copy_(source))
    # Read once and written once.
    return Outcome(_differing(source, target), {"GB/s": 2 * source.nbytes / seconds / 1e9})


def _round_trip(device: Device, size: int) -> Outcome:
    source = torch.arange(size // 4, dtype=torch.int32)
    there = torch.empty_like(source, device=device.current())
    back = torch.empty_like(source)
    to_device = _seconds(device, lambda: there.copy_(source))
    to_host = _seconds(device, lambda: back.copy_(there))
    return Outcome(
        _differing(source, back),
        {"GB/s to it": source.nbytes / to_device / 1e9, "GB/s back": source.nbytes / to_host / 1e9},
    )


def _differing(one: Tensor, other: Tensor) -> float:
    return float((one != other).sum()) * one.itemsize


def _matrices(device: Device, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(2))
    return left.to(device.current()), right.to(device.current())


def _tflops(device: Device, left: Tensor, right: Tensor) -> float:
    return 2 * len(left) ** 3 / _seconds(device, lambda: left @ right) / 1e12


def _seconds(device: Device, work: Callable[[], object]) -> float:
    """Median of some executions, after one that warms up."""
    times = []
    for _ in range(_REPEATS + 1):
        device.synchronize()
        begin = time.perf_counter()
        work()
        device.synchronize()
        times.append(time.perf_counter() - begin)
    return median(times[1:])
