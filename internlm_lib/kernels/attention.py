"""Causal attention, softmax(q kᵀ / √d) v. Arguments and result: `kernels.Kernels.attention`."""

import functools

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from internlm_lib.errors import InputError

NPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NPU_MAX_HEADS = 256
NPU_MAX_HEAD_DIM = 768
NPU_MASK_SIZE = 2048
"""Limits of `npu_fusion_attention`, and the one size of its compressed mask. Source: torch_npu's
documentation of that operator. Its meta kernel checks none of them."""

_CAUSAL_FROM_THE_END = 3
"""`sparse_mode` rightDownCausal: the last query sees the last key. Mode 2, leftUpCausal, is the
same for as many queries as keys, and wrong for fewer."""


def reference(query_SBND: Tensor, key_TBND: Tensor, value_TBND: Tensor) -> Tensor:
    """With explicit scores; softmax in float32, or in float64 for float64."""
    _check_shapes(query_SBND, key_TBND, value_TBND)
    (s, _, _, d), t = query_SBND.shape, key_TBND.shape[0]
    scores = torch.einsum("sbnd,tbnd->bnst", query_SBND, key_TBND) * d**-0.5
    hidden = torch.ones(s, t, dtype=torch.bool, device=scores.device).triu(1 + t - s)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.to(wide).masked_fill(hidden, -torch.inf).softmax(-1).to(scores.dtype)
    return torch.einsum("bnst,tbnd->sbnd", weights, value_TBND).flatten(2)


def sdpa(query_SBND: Tensor, key_TBND: Tensor, value_TBND: Tensor) -> Tensor:
    """torch's fused operator: FlashAttention on a GPU, its own tiled kernel on a CPU."""
    _check_shapes(query_SBND, key_TBND, value_TBND)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_TBND, value_TBND))
    s, t = q.shape[2], k.shape[2]
    # Its own `is_causal` lets the first query see the first key only, whatever t is.
    mask = None if s in (1, t) else causal_lower_right(s, t)
    out_BNSD = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=s == t
    )
    return out_BNSD.permute(2, 0, 1, 3).flatten(2)


def on_npu(query_SBND: Tensor, key_TBND: Tensor, value_TBND: Tensor) -> Tensor:
    """CANN's FlashAttention, in Megatron's own layout: [s, b, n × d] is its `SBH`, without a copy.

    Raises InputError where the operator is not documented to work.
    """
    import torch_npu

    _check_shapes(query_SBND, key_TBND, value_TBND)
    _check_npu_limits(query_SBND)
    heads, head_dim = query_SBND.shape[2:]
    q, k, v = (x.flatten(2) for x in (query_SBND, key_TBND, value_TBND))
    # Without a mask it attends to everything, whatever sparse_mode says; its scale would be 1.
    out: Tensor = torch_npu.npu_fusion_attention(
        q,
        k,
        v,
        heads,
        "SBH",
        atten_mask=_compressed_mask(q.device),
        scale=head_dim**-0.5,
        keep_prob=1.0,
        pre_tockens=65536,
        next_tockens=0,
        sparse_mode=_CAUSAL_FROM_THE_END,
    )[0]
    return out


def on_meta(query_SBND: Tensor, key_TBND: Tensor, value_TBND: Tensor) -> Tensor:
    """No numbers, but what a fused operator keeps for backward: its inputs, its output, and the
    logarithm of the softmax's sum, [b, n, s] in fp32.

    torch itself would fall back to explicit scores there. Counted as torch's derivative saves; an
    NPU, which keeps two statistics of the softmax eightfold, takes some more.
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_TBND, value_TBND))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out_BNSD: Tensor = attend(q, k, v, 0.0, True)[0]
    return out_BNSD.permute(2, 0, 1, 3).flatten(2)


@functools.cache
def _compressed_mask(device: torch.device) -> Tensor:
    """True is masked. Of this size for any number of queries and keys."""
    size = (NPU_MASK_SIZE, NPU_MASK_SIZE)
    return torch.ones(size, dtype=torch.bool, device=device).triu(1)


def _check_shapes(query_SBND: Tensor, key_TBND: Tensor, value_TBND: Tensor) -> None:
    q, k, v = query_SBND, key_TBND, value_TBND
    alike = k.shape == v.shape and q.shape[1:] == k.shape[1:] and q.dtype == k.dtype == v.dtype
    if not alike or q.ndim != 4 or q.shape[0] > k.shape[0]:
        found = ", ".join(f"{list(x.shape)} {x.dtype}" for x in (q, k, v))
        raise InputError(
            f"attention: queries, keys and values are {found}; they must be [s, b, n, d] and twice "
            "[t, b, n, d] with t ≥ s, of one dtype"
        )


def _check_npu_limits(query_SBND: Tensor) -> None:
    heads, head_dim = query_SBND.shape[2:]
    if query_SBND.dtype not in NPU_DTYPES:
        raise InputError(
            f"attention on an NPU: {query_SBND.dtype}; it takes float16, bfloat16 or float32: set "
            "training.precision, or training.use_flash_attn: false"
        )
    if heads > NPU_MAX_HEADS or head_dim > NPU_MAX_HEAD_DIM:
        raise InputError(
            f"attention on an NPU: {heads} heads of {head_dim} on this rank; it takes at most "
            f"{NPU_MAX_HEADS} of at most {NPU_MAX_HEAD_DIM}: raise tensor_model_parallel_size or "
            "num_attention_heads, or set training.use_flash_attn: false"
        )
