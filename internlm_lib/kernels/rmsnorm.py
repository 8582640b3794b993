"""Root mean square normalisation, fused or spelled out."""

from typing import Any

import torch
from torch import Tensor

from internlm_lib.kernels import meta


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, fused: bool) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimension.

    Args:
        x: [..., hidden], any floating dtype.
        weight: [hidden].
        fused: torch's operator, or in float32 on a CPU, where that is no kernel but some ten passes
            over memory, `_RmsNormOnCpu`; otherwise the formula of LlamaRMSNorm: statistics in
            float32, cast back to x's dtype before the weight is applied.
    Returns:
        Same shape and dtype as x.
    """
    if fused and x.is_meta:
        out: Tensor = meta.FusedRMSNorm.apply(x, weight)
        return out
    if fused and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        result: Tensor = _RmsNormOnCpu.apply(x, weight, eps)
        return result
    if fused:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    x32 = x.float()
    normalised = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)


class _RmsNormOnCpu(torch.autograd.Function):
    """Keeps x and one number per row; both sums of the backward pass are matrix-vector products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """With y = x·r·w, r the scale and g the gradient of y: of w it is Σ g·x·r over rows, of x
        it is r·g·w − x·r³·⟨g·x, w⟩ / hidden."""
        x, weight, scale = ctx.saved_tensors
        gradient, hidden = gradients[0], x.shape[-1]
        product = (gradient * x).view(-1, hidden)
        of_weight = torch.mv(product.t(), scale.view(-1))
        along = torch.mv(product, weight).view_as(scale)
        correction = along.mul_(scale.pow(3)).div_(hidden)
        of_x = (gradient * weight).mul_(scale).addcmul_(x, correction, value=-1)
        return of_x, of_weight, None
