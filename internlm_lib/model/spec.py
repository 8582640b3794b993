"""InternLM as a megatron-core ModuleSpec: LLaMA with a bias on q, k, v and o, and none in the MLP.

Import only after `Device.adapt_megatron()`.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from torch import Tensor

from internlm_lib.kernels.attention import causal_attention
from internlm_lib.kernels.rmsnorm import rms_norm
from internlm_lib.kernels.rotary import rotary
from internlm_lib.kernels.swiglu import swiglu
from internlm_lib.model.layer import RecomputingLayer


def layer_spec(
    *, attention_bias: bool, use_flash_attn: bool, use_fused_rmsnorm: bool
) -> ModuleSpec:
    """Spec of one transformer layer.

    megatron-core gives q, k, v their bias by `add_qkv_bias`; the bias on o has no switch there
    without one in the MLP too, hence `RowParallelLinearWithBias`.
    """
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.module = RecomputingLayer
    norm = norm_spec(use_fused_rmsnorm)
    spec.submodules.input_layernorm = norm
    spec.submodules.pre_mlp_layernorm = norm
    # Stands where TransformerEngine's would; the configuration asks for it.
    spec.submodules.mlp.submodules.activation_func = swiglu
    attention = spec.submodules.self_attention.submodules
    if attention_bias:
        attention.linear_proj = RowParallelLinearWithBias
    if use_flash_attn:
        attention.core_attention = FusedCausalAttention
    return spec


def use_fused_rotary() -> None:
    """Give megatron-core `kernels.rotary` where TransformerEngine's fused one is not installed.

    Call before a TransformerConfig with `apply_rope_fusion` is made.
    """
    if rope_utils.fused_apply_rotary_pos_emb is None:
        rope_utils.fused_apply_rotary_pos_emb = rotary


def norm_spec(fused: bool) -> ModuleSpec:
    return ModuleSpec(module=RMSNorm, params={"fused": fused})


class RowParallelLinearWithBias(RowParallelLinear):
    """Adds the bias once, after the reduction over tensor parallel ranks: it is not split."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


class RMSNorm(torch.nn.Module):
    """megatron-core's own torch norm refuses sequence parallelism; this one marks its weight."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, fused: bool = True
    ) -> None:
        super().__init__()
        self.eps = eps
        self.fused = fused
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads sums the gradients of marked parameters over tensor parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        # An alias, on which the norm's own gradients are summed before the residual's is added: the
        # same order, and so the same bits, as when the norm is recomputed (`model/layer.py`).
        return rms_norm(x.view_as(x), self.weight, self.eps, fused=self.fused)


class FusedCausalAttention(torch.nn.Module):
    """Core attention through `kernels.attention`; stands where DotProductAttention would."""

    def __init__(self, config: TransformerConfig, **megatron_arguments: Any) -> None:
        super().__init__()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **megatron_arguments: Any,
    ) -> Tensor:
        """[s, b, heads, head_dim] three times → [s, b, heads × head_dim]; always causal."""
        return causal_attention(query, key, value)
