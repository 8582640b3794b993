"""InternLM as a megatron-core ModuleSpec: LLaMA with a bias on q, k, v and o, and none in the MLP.

Import only after `Device.adapt_megatron()`.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from torch import Tensor

from internlm_lib.kernels import Kernels
from internlm_lib.model.layer import RecomputingLayer


def layer_spec(kernels: Kernels, *, attention_bias: bool) -> ModuleSpec:
    """Spec of one transformer layer, which computes with `kernels`.

    Of these, rotary is not part of a spec: see `use_rotary`. megatron-core gives q, k, v their bias
    by `add_qkv_bias`; the bias on o has no switch there without one in the MLP too, hence
    `RowParallelLinearWithBias`.
    """
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.module = RecomputingLayer
    norm = norm_spec(kernels)
    spec.submodules.input_layernorm = norm
    spec.submodules.pre_mlp_layernorm = norm
    # Stands where TransformerEngine's would; the configuration asks for it.
    spec.submodules.mlp.submodules.activation_func = kernels.swiglu
    attention = spec.submodules.self_attention.submodules
    if attention_bias:
        attention.linear_proj = RowParallelLinearWithBias
    attention.core_attention = ModuleSpec(
        module=CausalAttention, params={"attend": kernels.attention}
    )
    return spec


def use_rotary(kernels: Kernels) -> None:
    """Give megatron-core `kernels.rotary` where it would take TransformerEngine's fused one.

    Call before a TransformerConfig with `apply_rope_fusion` is made. It holds for all models of the
    process.
    """
    rope_utils.fused_apply_rotary_pos_emb = kernels.rotary


def norm_spec(kernels: Kernels) -> ModuleSpec:
    return ModuleSpec(module=RMSNorm, params={"normalise": kernels.rms_norm})


class RowParallelLinearWithBias(RowParallelLinear):
    """Adds the bias once, after the reduction over tensor parallel ranks: it is not split."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


class RMSNorm(torch.nn.Module):
    """megatron-core's own torch norm refuses sequence parallelism; this one marks its weight."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        normalise: Callable[[Tensor, Tensor, float], Tensor],
    ) -> None:
        super().__init__()
        self.eps = eps
        self.normalise = normalise
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads sums the gradients of marked parameters over tensor parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        # An alias, on which the norm's own gradients are summed before the residual's is added: the
        # same order, and so the same bits, as when the norm is recomputed (`model/layer.py`).
        return self.normalise(x.view_as(x), self.weight, self.eps)


class CausalAttention(torch.nn.Module):
    """Core attention through a kernel; stands where DotProductAttention would."""

    def __init__(
        self,
        config: TransformerConfig,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        **megatron_arguments: Any,
    ) -> None:
        super().__init__()
        self.attend = attend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **megatron_arguments: Any,
    ) -> Tensor:
        """[s, b, heads, head_dim] and, twice, [t, b, heads, head_dim] with t ≥ s → [s, b, heads ×
        head_dim]; always causal, whatever mask megatron gives."""
        return self.attend(query, key, value)
