"""Root mean square normalisation. Arguments and result: `kernels.Kernels.rms_norm`."""

from typing import Any

import torch
from torch import Tensor

from internlm_lib.errors import InputError


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula of LlamaRMSNorm: statistics in float32 (or float64 for float64), cast back to x's
    dtype before the weight is applied."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)


def torch_operator(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch's own, a fused kernel on a GPU."""
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def on_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In float32 one of our own: torch's is no kernel there but some ten passes over memory."""
    if not x.dtype == weight.dtype == torch.float32:
        return torch_operator(x, weight, eps)
    result: Tensor = _RmsNormOnCpu.apply(x, weight, eps)
    return result


def on_npu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """CANN's. Raises InputError for a weight of another dtype than x, or of another shape than x's
    last dimension: the operator's meta kernel takes any."""
    import torch_npu

    if weight.dtype != x.dtype or weight.shape != x.shape[-1:]:
        raise InputError(
            f"RMSNorm on an NPU: x is {list(x.shape)} {x.dtype}, the weight {list(weight.shape)} "
            f"{weight.dtype}; it must be [{x.shape[-1]}] {x.dtype}: set training.precision to the "
            "weights' dtype, or training.use_fused_rmsnorm: false"
        )
    out: Tensor = torch_npu.npu_rms_norm(x, weight, epsilon=eps)[0]
    return out


def on_meta(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """No numbers, but what a fused operator keeps: torch itself would keep fp32 copies there."""
    out: Tensor = _RmsNormOnMeta.apply(x, weight)
    return out


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


class _RmsNormOnMeta(torch.autograd.Function):
    """Keeps its input, its weight, and 1 / √(mean(x²) + eps), [..., 1] in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
