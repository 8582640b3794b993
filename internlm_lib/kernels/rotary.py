"""Rotary position embedding of queries and keys, in as few passes over memory as torch allows."""

from typing import Any

import torch
from torch import Tensor


def rotary(x_SBNH: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Turn each pair (x_i, x_{i + head_dim/2}) by its position's angle, as LLaMA and Megatron.

    Args:
        x_SBNH: [sequence, batch, heads, head_dim], any floating dtype.
        angles: [sequence, 1, 1, head_dim] in radians, float32; both halves are equal.
        interleaved: pairs of neighbours instead, which no InternLM has; refused.
    Returns:
        Same shape and dtype as x_SBNH, contiguous.
    Raises:
        NotImplementedError: `interleaved`, or angles of another width than head_dim.
    """
    if interleaved or angles.shape[-1] != x_SBNH.shape[-1]:
        raise NotImplementedError("rotary turns halves of the whole head; others are not InternLM")
    half = angles[..., : angles.shape[-1] // 2]
    result: Tensor = _Rotary.apply(x_SBNH, half.cos().to(x_SBNH.dtype), half.sin().to(x_SBNH.dtype))
    return result


class _Rotary(torch.autograd.Function):
    """The gradient is turned back: nothing but the angles is kept."""

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
