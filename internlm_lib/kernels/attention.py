"""Causal attention: torch's fused operator, which has a kernel on every device."""

import torch
from torch import Tensor

from internlm_lib.kernels import meta


def causal_attention(query_SBNH: Tensor, key_SBNH: Tensor, value_SBNH: Tensor) -> Tensor:
    """Causal softmax(q kᵀ / √head_dim) v.

    Args:
        query_SBNH, key_SBNH, value_SBNH: [sequence, batch, heads, head_dim], one floating dtype.
    Returns:
        [sequence, batch, heads × head_dim], same dtype.
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query_SBNH, key_SBNH, value_SBNH))
    if q.is_meta:
        out_BNSH = meta.flash_attention(q, k, v)
    else:
        out_BNSH = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out_BNSH.permute(2, 0, 1, 3).flatten(2)
