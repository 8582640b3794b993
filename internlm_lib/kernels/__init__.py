"""The four operators of an InternLM layer that have a faster form than their formula.

One function each, with an implementation per device; `kernels_of` chooses. All are held against
`REFERENCE`, forward and backward, in tests and by `internlm selftest`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from internlm_lib.kernels import attention, rmsnorm, rotary, swiglu


@dataclass(frozen=True)
class Kernels:
    """All keep the dtype of their first argument; s is the sequence, b the batch, n heads."""

    attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Queries [s, b, n, d], keys and values [t, b, n, d] with t ≥ s → [s, b, n × d]. Causal: the
    queries are those of the last s of t positions, so that it also decodes with a KV cache."""
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """x [..., h], weight [h], eps → x / √(mean(x²) + eps) · weight, [..., h]."""
    rotary: Callable[..., Tensor]
    """x [s, b, n, d], angles [s, 1, 1, d] in radians → x with each pair (x_i, x_{i + d/2}) turned
    by its position's angle. A third argument `interleaved` must be false (`rotary.check`)."""
    swiglu: Callable[[Tensor], Tensor]
    """[..., 2f], gate first → silu(gate) · up, [..., f]."""


REFERENCE = Kernels(
    attention.reference,
    rmsnorm.reference,
    rotary.reference,
    swiglu.reference,
)
"""The formulas, spelled out in torch; they run on any device."""

_OF_DEVICE: Mapping[str, Kernels] = {
    "cpu": Kernels(attention.sdpa, rmsnorm.on_cpu, rotary.in_place, swiglu.in_place),
    "cuda": Kernels(attention.sdpa, rmsnorm.torch_operator, rotary.in_place, swiglu.in_place),
    "npu": Kernels(attention.on_npu, rmsnorm.on_npu, rotary.on_npu, swiglu.on_npu),
    "meta": Kernels(attention.on_meta, rmsnorm.on_meta, rotary.in_place, swiglu.in_place),
}


def kernels_of(
    device: str,
    *,
    use_flash_attn: bool = True,
    use_fused_rmsnorm: bool = True,
    use_fused_rotary_pos_emb: bool = True,
    use_fused_swiglu: bool = True,
) -> Kernels:
    """The implementations of a device: `npu`, `cuda`, `cpu` or `meta` (see `Device.kernels`).

    What is switched off is `REFERENCE`'s. Raises KeyError for another device.
    """
    fast = _OF_DEVICE[device]
    return Kernels(
        attention=(fast if use_flash_attn else REFERENCE).attention,
        rms_norm=(fast if use_fused_rmsnorm else REFERENCE).rms_norm,
        rotary=(fast if use_fused_rotary_pos_emb else REFERENCE).rotary,
        swiglu=(fast if use_fused_swiglu else REFERENCE).swiglu,
    )
