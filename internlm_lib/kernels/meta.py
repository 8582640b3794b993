"""Attention and RMSNorm on the meta device: no numbers, but what fused operators keep for backward.

On that device torch falls back to formulas spelled out, which keep scores and fp32 copies that an
accelerator's fused operators do not. Counted as torch's derivatives of these save; on an NPU, whose
attention keeps two statistics of the softmax eightfold, it is some more.
"""

from typing import Any

import torch
from torch import Tensor


def flash_attention(query_BNSH: Tensor, key_BNSH: Tensor, value_BNSH: Tensor) -> Tensor:
    """Keeps its inputs, its output, and the logarithm of the softmax's sum, [b, n, s] in fp32."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = attend(query_BNSH, key_BNSH, value_BNSH, 0.0, True)[0]
    return out


class FusedRMSNorm(torch.autograd.Function):
    """Keeps its input, its weight, and 1 / √(mean(x²) + eps), [..., 1] in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
