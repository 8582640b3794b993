"""The device's kernels against their formulas in float64, forward and backward.

Import only after `Device.adapt_megatron()`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from internlm_lib.devices import Device
from internlm_lib.devices.megatron_points import FusedAdamW
from internlm_lib.kernels import REFERENCE, Kernels, kernels_of
from internlm_lib.selftest.checks import Check, Outcome
from internlm_lib.selftest.sizes import Sizes, dtype_name

TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float32: 1e-5,
    torch.bfloat16: 2**-6,
    torch.float16: 2**-9,
}
"""Largest error of values and gradients, relative to the largest element. Inputs are rounded to the
dtype before the exact result is computed; on the way to the device's there may be two more
roundings than in the result itself (bfloat16 keeps 8 bits, float16 11), and in float32 long sums
in another order."""

_ADAM_STEPS = 3

Function = Callable[[Kernels], Callable[..., Tensor]]


@dataclass(frozen=True)
class Case:
    """One way to call one kernel; all inputs get gradients."""

    name: str
    function: Function
    inputs: tuple[Tensor, ...]
    """float32, on the CPU."""


def kernel_checks(device: Device, sizes: Sizes) -> Iterator[Check]:
    """One per kernel, way to call it, and dtype that trainings on this device use."""
    fast = kernels_of(device.kernels)
    for case in cases(sizes):
        for dtype in sizes.dtypes:
            name = f"{case.name}, {dtype_name(dtype)}"
            find = partial(compare, case, dtype, fast, device.current())
            yield Check("kernels", name, "error ÷ largest element", TOLERANCES[dtype], find)
    yield Check(
        "kernels", "AdamW, fused, fp32", "error ÷ largest element", TOLERANCES[torch.float32],
        partial(_adam, device.current()),
    )  # fmt: skip


def cases(sizes: Sizes) -> Iterator[Case]:
    """In shapes of an InternLM: s positions, one sample, n heads of d, ffn f."""
    s, n, d, f = sizes.positions, sizes.heads, sizes.head_dim, sizes.ffn
    query, key, value = (_normal(s, 1, n, d, seed=seed) for seed in range(3))
    yield Case("attention, training", lambda k: k.attention, (query, key, value))
    yield Case("attention, chunk after a cache", lambda k: k.attention, (query[-7:], key, value))
    yield Case("attention, decoding", lambda k: k.attention, (query[-1:], key, value))
    x, weight = _normal(s, 1, n * d), 1 + 0.1 * _normal(n * d, seed=1)
    yield Case("RMSNorm", lambda k: lambda x, w: k.rms_norm(x, w, 1e-6), (x, weight))
    # Near the root of epsilon another one, as Megatron's 1e-5, shows in every dtype.
    yield Case(
        "RMSNorm, small inputs", lambda k: lambda x, w: k.rms_norm(x, w, 1e-6), (1e-3 * x, weight)
    )
    angles = _angles(s, d)
    yield Case("rotary", lambda k: lambda x: k.rotary(x, angles.to(x.device)), (query,))
    yield Case("SwiGLU", lambda k: k.swiglu, (_normal(s, 1, 2 * f),))


def compare(case: Case, dtype: torch.dtype, kernels: Kernels, device: torch.device) -> Outcome:
    """Largest error of the result and all gradients; measured beside it, the formula's own in this
    dtype."""
    rounded = tuple(x.to(dtype) for x in case.inputs)
    exact = _run(case.function(REFERENCE), tuple(x.double() for x in rounded))
    there = tuple(x.to(device) for x in rounded)
    ours, formula = (_run(case.function(k), there) for k in (kernels, REFERENCE))
    for mine, other in zip(ours, exact, strict=True):
        if mine.dtype != dtype or mine.shape != other.shape:
            raise TypeError(f"{case.name} gave {list(mine.shape)} {mine.dtype}")
    return Outcome(_error(ours, exact), {"formula's": _error(formula, exact)})


def _run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The value, and the gradient of every input along a fixed direction."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    # A direction that every dtype can write down: else it would be another one for each.
    direction = _normal(*value.shape, seed=9).bfloat16().to(value)
    return [value.detach(), *torch.autograd.grad(value, leaves, direction)]


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    pairs = zip(found, exact, strict=True)
    return max(float((f.cpu().double() - e).abs().max() / e.abs().max()) for f, e in pairs)


def _adam(device: torch.device) -> Outcome:
    """Three steps of the optimizer that trainings use, against Adam's formula in float64."""
    settings: Any = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    # Small weights: of large ones float32 could not hold so small an update.
    start = 0.01 * _normal(1000)
    weight = torch.nn.Parameter(start.clone().to(device))
    exact = torch.nn.Parameter(start.double())
    optimizers = (FusedAdamW([weight], **settings), torch.optim.AdamW([exact], **settings))
    for step in range(_ADAM_STEPS):
        gradient = _normal(1000, seed=step + 1)
        weight.grad, exact.grad = gradient.to(device), gradient.double()
        for optimizer in optimizers:
            optimizer.step()
    moved, expected = (w.detach().cpu().double() - start.double() for w in (weight, exact))
    return Outcome(float((moved - expected).abs().max() / expected.abs().max()))


def _angles(positions: int, head_dim: int) -> Tensor:
    """InternLM's, [s, 1, 1, d] in float32."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    half = torch.arange(positions)[:, None] * frequencies
    return torch.cat((half, half), dim=-1).view(positions, 1, 1, head_dim)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
