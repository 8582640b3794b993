"""The kernels against their formulas as autograd computes them: values and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from internlm_lib.kernels.rmsnorm import rms_norm
from internlm_lib.kernels.rotary import rotary
from internlm_lib.kernels.swiglu import swiglu

TOLERANCE = 1e-6
"""Largest difference, relative to the largest element: sums and products in another order."""
ANGLES = torch.arange(6.0).view(6, 1, 1, 1) * torch.tensor([1.0, 0.3, 0.1, 0.01] * 2)


def values_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return [value.detach(), *torch.autograd.grad(value, leaves, weights.to(value.dtype))]


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        assert (mine - other).abs().max() <= tolerance * other.abs().max()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def spelled_out_rotary(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * ANGLES.cos() + torch.cat([-second, first], dim=-1) * ANGLES.sin()


def test_swiglu_is_silu_of_the_first_half_times_the_second() -> None:
    def formula(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    x = random(5, 3, 22)
    assert_same(values_and_gradients(swiglu, x), values_and_gradients(formula, x))


def test_rotary_turns_halves_also_of_a_view_into_the_mixed_projection() -> None:
    mixed = random(6, 2, 4, 24)

    def of_view(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x[..., 8:16])

    ours = values_and_gradients(of_view(lambda x: rotary(x, ANGLES)), mixed)
    assert_same(ours, values_and_gradients(of_view(spelled_out_rotary), mixed))


@pytest.mark.parametrize("wrong", [{"interleaved": True}, {"angles": ANGLES[..., :4]}], ids=str)
def test_rotary_refuses_what_it_does_not_compute(wrong: dict[str, object]) -> None:
    with pytest.raises(NotImplementedError, match="halves"):
        rotary(random(6, 1, 1, 8), **{"angles": ANGLES, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_fused_rms_norm_is_llamas_formula(scale: float) -> None:
    x, weight = scale * random(7, 3, 20), 1 + 0.1 * random(20)

    def norm(fused: bool) -> list[Tensor]:
        return values_and_gradients(lambda a, w: rms_norm(a, w, 1e-6, fused=fused), x, weight)

    assert_same(norm(True), norm(False))


@pytest.mark.parametrize(
    "function", [swiglu, lambda x: rms_norm(x, torch.ones(24), 1e-6, fused=True)]
)
def test_little_is_kept_for_the_backward_pass(function: Callable[[Tensor], Tensor]) -> None:
    """What recomputation would save, and what memory a layer needs, rests on it."""
    x, kept = random(50, 24).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        function(x)
    assert sum(kept) <= x.numel() + 50 + 24
