"""Rotary position embedding of queries and keys. Arguments and result: `kernels.Kernels.rotary`.

Turns halves of the head, as LLaMA and Megatron: x · cos + (−x₂, x₁) · sin.
"""

from typing import Any

import torch
from torch import Tensor

from internlm_lib.errors import InputError

NPU_MAX_HEAD_DIM = 895
NPU_MAX_BATCH_OR_HEADS = 999
"""Limits of `npu_rotary_mul`, whose head must also be even. Source: torch_npu's documentation of
that operator. Its meta kernel checks none of them."""


def reference(x_SBND: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    check(x_SBND, angles, interleaved)
    first, second = x_SBND.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x_SBND.dtype), angles.sin().to(x_SBND.dtype)
    return x_SBND * cos + torch.cat((-second, first), dim=-1) * sin


def in_place(x_SBND: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """In as few passes over memory as torch allows; nothing but the angles is kept."""
    check(x_SBND, angles, interleaved)
    half = angles[..., : angles.shape[-1] // 2]
    result: Tensor = _Rotary.apply(x_SBND, half.cos().to(x_SBND.dtype), half.sin().to(x_SBND.dtype))
    return result


def on_npu(x_SBND: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """CANN's, with cos and sin [s, 1, 1, d]: what it takes for x in Megatron's layout.

    Raises InputError where the operator is not documented to work.
    """
    import torch_npu

    check(x_SBND, angles, interleaved)
    _, batch, heads, head_dim = x_SBND.shape
    if head_dim > NPU_MAX_HEAD_DIM or max(batch, heads) > NPU_MAX_BATCH_OR_HEADS:
        raise InputError(
            f"rotary embedding on an NPU: x is {list(x_SBND.shape)}; head_dim may be at most "
            f"{NPU_MAX_HEAD_DIM}, batch and heads {NPU_MAX_BATCH_OR_HEADS} each: lower "
            "training.micro_batch_size, or set training.use_fused_rotary_pos_emb: false"
        )
    cos, sin = angles.cos().to(x_SBND.dtype), angles.sin().to(x_SBND.dtype)
    out: Tensor = torch_npu.npu_rotary_mul(x_SBND, cos, sin, rotary_mode="half")
    return out


def check(x_SBND: Tensor, angles: Tensor, interleaved: bool) -> None:
    """Raises InputError for what no InternLM has, and no implementation here computes."""
    s, _, _, d = x_SBND.shape
    if interleaved or d % 2 or tuple(angles.shape) != (s, 1, 1, d):
        raise InputError(
            f"rotary embedding: x is {list(x_SBND.shape)}, angles are {list(angles.shape)}, "
            f"interleaved = {interleaved}; halves of a whole, even head are turned, by angles "
            "[s, 1, 1, d]"
        )


class _Rotary(torch.autograd.Function):
    """The gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradients[0], cos, sin, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    left, right = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=right).addcmul_(first, sin, value=direction)
    return turned
