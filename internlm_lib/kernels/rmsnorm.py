"""Root mean square normalisation, fused or spelled out."""

import torch
from torch import Tensor

from internlm_lib.kernels import meta


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, fused: bool) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimension.

    Args:
        x: [..., hidden], any floating dtype.
        weight: [hidden].
        fused: torch's operator; otherwise the formula of LlamaRMSNorm: statistics in float32, cast
            back to x's dtype before the weight is applied.
    Returns:
        Same shape and dtype as x.
    """
    if fused and x.is_meta:
        out: Tensor = meta.FusedRMSNorm.apply(x, weight)
        return out
    if fused:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    x32 = x.float()
    normalised = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)
