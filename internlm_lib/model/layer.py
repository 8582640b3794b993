"""A transformer layer whose parts can be recomputed one by one in the backward pass.

megatron-core's own selective recomputation has one setting for all layers, keeps the output of what
it recomputes, and its `layernorm` needs TransformerEngine. Here a part's output is dropped as soon
as the next part has run (megatron's `CheckpointWithoutOutput`), and every layer has its own set.

Import only after `Device.adapt_megatron()`.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from internlm_lib.model.parts import WHOLE_LAYER

RunPart = Callable[..., Any]
"""`run(name, function, *tensors)` returns what `function(*tensors)` does."""


class RecomputingLayer(TransformerLayer):
    recompute: frozenset[str] = frozenset()
    """Of `parts.PARTS`, or `parts.WHOLE_LAYER` alone; empty: nothing, megatron's own forward."""

    def forward(self, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] → [s, b, h]; the same numbers, bit by bit, whatever is recomputed."""
        if not self.recompute or not torch.is_grad_enabled():
            outputs: tuple[Tensor, Tensor | None] = super().forward(hidden_states, **arguments)
            return outputs
        if WHOLE_LAYER in self.recompute:
            whole = super().forward
            return tensor_parallel.checkpoint(
                lambda x: whole(x, **arguments)[0], False, hidden_states
            ), None
        return self.in_parts(
            hidden_states,
            arguments["rotary_pos_emb"],
            arguments["attention_mask"],
            _Recomputation(self.recompute),
        ), None

    def in_parts(
        self, x: Tensor, rotary: Tensor, attention_mask: Tensor | None, run: RunPart
    ) -> Tensor:
        """megatron's forward pass of an InternLM layer, each part through `run`."""
        attention, mlp = self.self_attention, self.mlp
        core_attention = partial(self._core_attention, attention_mask)
        normed = run("input_layernorm", self.input_layernorm, x)
        heads = run("qkv", partial(self._heads, rotary), normed)
        context = run("core_attention", core_attention, *heads)
        x = self._add(run("linear_proj", attention.linear_proj, context), x)
        normed = run("pre_mlp_layernorm", self.pre_mlp_layernorm, x)
        wide = run("linear_fc1", lambda tensor: mlp.linear_fc1(tensor)[0], normed)
        narrow = run("activation", self._activate, wide)
        return self._add(run("linear_fc2", mlp.linear_fc2, narrow), x)

    def _heads(self, rotary: Tensor, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned by the rotary embedding, and values: [s, b, heads, head_dim]."""
        query, key, value = self.self_attention.get_query_key_value_tensors(normed)
        turn = partial(apply_rotary_pos_emb, freqs=rotary, config=self.config)
        return turn(query), turn(key), value

    def _core_attention(self, mask: Tensor | None, *heads: Tensor) -> Tensor:
        attention = self.self_attention
        out: Tensor = attention.core_attention(
            *heads, mask, attn_mask_type=attention.attn_mask_type,
            attention_bias=None, packed_seq_params=None,
        )  # fmt: skip
        return out

    def _activate(self, wide: Tensor) -> Tensor:
        """What the MLP does between its two projections: its own code, with these left out."""
        between = SimpleNamespace(
            **{name: getattr(self.mlp, name) for name in ("config", "activation_func")},
            linear_fc1=_pass_on,
            linear_fc2=_pass_on,
        )
        narrow: Tensor = type(self.mlp).forward(between, wide)[0]
        return narrow

    def _add(self, with_bias: tuple[Tensor, Tensor | None], residual: Tensor) -> Tensor:
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        total: Tensor = add(with_bias, residual, self.hidden_dropout)
        return total


def _pass_on(tensor: Tensor) -> tuple[Tensor, None]:
    return tensor, None


class _Recomputation:
    """Runs the parts of one layer in one forward pass, dropping the outputs of some."""

    def __init__(self, parts: frozenset[str]) -> None:
        self._parts = parts
        self._previous: _Dropped | None = None

    def __call__(self, part: str, function: Callable[..., Any], *tensors: Tensor) -> Any:
        dropped = _Dropped(self._previous) if part in self._parts else None
        outputs = dropped.checkpoint(function, *tensors) if dropped else function(*tensors)
        if self._previous:
            # The gradient of what was just computed arrives before its backward pass needs inputs.
            self._previous.discard_output_and_register_recompute(
                outputs[0] if isinstance(outputs, tuple) else outputs
            )
        self._previous = dropped
        return outputs


class _Dropped(tensor_parallel.random.CheckpointWithoutOutput):
    """A part whose output is dropped, and whose input may be the dropped output of the one before.

    fp8=None, as megatron takes False for FP8, which needs TransformerEngine.
    """

    def __init__(self, before: "_Dropped | None") -> None:
        super().__init__(fp8=None)
        self._before = before

    def _recompute(self, gradient: Tensor) -> None:
        if self._before:
            self._before._recompute(gradient)
            self._before = None
        super()._recompute(gradient)
