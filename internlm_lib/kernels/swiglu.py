"""The gated activation of the MLP. Argument and result: `kernels.Kernels.swiglu`."""

from typing import Any

import torch
from torch import Tensor

from internlm_lib.errors import InputError


def reference(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def in_place(gate_and_up: Tensor) -> Tensor:
    """Keeps its input and nothing else for the backward pass."""
    result: Tensor = _SwiGLU.apply(gate_and_up)
    return result


def on_npu(gate_and_up: Tensor) -> Tensor:
    """CANN's, which takes the gate first, as Megatron's linear_fc1 gives it. Raises InputError for
    a last dimension that has no two halves: the operator's meta kernel rounds it down."""
    import torch_npu

    if gate_and_up.shape[-1] % 2:
        raise InputError(
            f"SwiGLU on an NPU: the last dimension of {list(gate_and_up.shape)} is not two halves, "
            "gate and up; give both the same width"
        )
    out: Tensor = torch_npu.npu_swiglu(gate_and_up, dim=-1)
    return out


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
