"""The gated activation of the MLP, saving its input and nothing else for the backward pass."""

from typing import Any

import torch
from torch import Tensor


def swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) · up.

    Args:
        gate_and_up: [..., 2 × ffn], gate first, any floating dtype.
    Returns:
        [..., ffn], same dtype.
    """
    result: Tensor = _SwiGLU.apply(gate_and_up)
    return result


class _SwiGLU(torch.autograd.Function):
    """Spelled out, autograd would keep silu(gate) as well; computing it again is cheaper."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,), (gate_and_up,) = gradients, ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        of_gate, of_up = result.chunk(2, dim=-1)
        torch.mul(gradient, torch.nn.functional.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return result
