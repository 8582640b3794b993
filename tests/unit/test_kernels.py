"""The kernels of a CPU against their formulas: values and gradients."""

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from internlm_lib.errors import InputError
from internlm_lib.kernels import REFERENCE, Kernels, attention, kernels_of

TOLERANCE = 1e-6
"""Largest difference, relative to the largest element: sums and products in another order."""
ANGLES = torch.arange(6.0).view(6, 1, 1, 1) * torch.tensor([1.0, 0.3, 0.1, 0.01] * 2)
CPU = kernels_of("cpu")

SWITCHES = {
    "attention": "use_flash_attn",
    "rms_norm": "use_fused_rmsnorm",
    "rotary": "use_fused_rotary_pos_emb",
    "swiglu": "use_fused_swiglu",
}


def values_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return [value.detach(), *torch.autograd.grad(value, leaves, weights.to(value.dtype))]


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        assert (mine - other).abs().max() <= tolerance * other.abs().max()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spelled_out_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def spelled_out_rotary(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * ANGLES.cos() + torch.cat([-second, first], dim=-1) * ANGLES.sin()


def spelled_out_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query by query: the i-th of s queries sees the keys up to t − s + i."""
    rows = []
    for i, query in enumerate(q):
        seen = k.shape[0] - q.shape[0] + i + 1
        scores = torch.stack([(query * key).sum(-1) for key in k[:seen]]) / q.shape[-1] ** 0.5
        rows.append((scores.softmax(0)[..., None] * v[:seen]).sum(0).flatten(1))
    return torch.stack(rows)


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=["cpu", "reference"])
def test_swiglu_is_silu_of_the_first_half_times_the_second(kernels: Kernels) -> None:
    x = random(5, 3, 22)
    ours = values_and_gradients(kernels.swiglu, x)
    assert_same(ours, values_and_gradients(spelled_out_swiglu, x))


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=["cpu", "reference"])
def test_rotary_turns_halves_also_of_a_view_into_the_mixed_projection(kernels: Kernels) -> None:
    mixed = random(6, 2, 4, 24)

    def of_view(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x[..., 8:16])

    ours = values_and_gradients(of_view(lambda x: kernels.rotary(x, ANGLES)), mixed)
    assert_same(ours, values_and_gradients(of_view(spelled_out_rotary), mixed))


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=["cpu", "reference"])
@pytest.mark.parametrize(
    "wrong",
    [{"interleaved": True}, {"angles": ANGLES[..., :4]}, {"angles": ANGLES[:5]}],
    ids=["interleaved", "half a head", "five positions"],
)
def test_rotary_refuses_what_it_does_not_compute(
    wrong: dict[str, object], kernels: Kernels
) -> None:
    with pytest.raises(InputError, match="halves of a whole, even head"):
        kernels.rotary(random(6, 1, 1, 8), **{"angles": ANGLES, **wrong})


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_rms_norm_is_llamas_formula(scale: float) -> None:
    x, weight = scale * random(7, 3, 20), 1 + 0.1 * random(20)

    def norm(kernels: Kernels) -> list[Tensor]:
        return values_and_gradients(lambda a, w: kernels.rms_norm(a, w, 1e-6), x, weight)

    assert_same(norm(CPU), norm(REFERENCE))


def test_rms_norm_of_another_dtype_is_torchs() -> None:
    x, weight = random(7, 20).bfloat16(), (1 + 0.1 * random(20)).bfloat16()
    ours, reference = (k.rms_norm(x, weight, 1e-6) for k in (CPU, REFERENCE))
    assert ours.dtype == torch.bfloat16
    assert_same([ours.float()], [reference.float()], tolerance=2**-7)


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=["cpu", "reference"])
@pytest.mark.parametrize("queries", [6, 5, 1], ids=["training", "chunk", "decoding"])
def test_attention_lets_a_query_see_what_lies_before_it(queries: int, kernels: Kernels) -> None:
    q, k, v = random(queries, 2, 3, 8), random(6, 2, 3, 8, seed=2), random(6, 2, 3, 8, seed=3)
    ours = values_and_gradients(kernels.attention, q, k, v)
    assert_same(ours, values_and_gradients(spelled_out_attention, q, k, v))


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=["cpu", "reference"])
def test_attention_refuses_more_queries_than_keys_and_mixed_shapes(kernels: Kernels) -> None:
    x = random(4, 1, 2, 8)
    for q, k, v in [(x, x[:3], x[:3]), (x, x, x[:3]), (x[..., :4], x, x), (x.bfloat16(), x, x)]:
        with pytest.raises(InputError, match="t ≥ s, of one dtype"):
            kernels.attention(q, k, v)


@pytest.mark.parametrize("name", [f.name for f in fields(Kernels)])
def test_a_switch_that_is_off_takes_the_formula(name: str) -> None:
    chosen = vars(kernels_of("cpu", **{SWITCHES[name]: False}))
    formulas = {key for key, kernel in vars(REFERENCE).items() if chosen[key] is kernel}
    assert formulas == {name}


def test_every_device_has_its_own_attention() -> None:
    assert kernels_of("cuda").attention is kernels_of("cpu").attention is attention.sdpa
    assert kernels_of("npu").attention is attention.on_npu
    with pytest.raises(KeyError):
        kernels_of("tpu")


@pytest.mark.parametrize(
    "function",
    [CPU.swiglu, lambda x: CPU.rms_norm(x, torch.ones(24), 1e-6)],
    ids=["swiglu", "norm"],
)
def test_little_is_kept_for_the_backward_pass(function: Callable[[Tensor], Tensor]) -> None:
    """What recomputation would save, and what memory a layer needs, rests on it."""
    x, kept = random(50, 24).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        function(x)
    assert sum(kept) <= x.numel() + 50 + 24
