"""The one table of what each weight is called, and how tensor parallel ranks share it.

Hugging Face names are those of InternLM's own checkpoints (LLaMA's); Megatron names are GPTModel's,
with the layer counted over the whole model, not over a pipeline stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from internlm_lib.experiment.schema import ModelSection

Split = Literal["replicated", "columns", "vocabulary", "heads", "gate_up"]
"""How a rank's part is cut:

replicated: whole on every rank · columns: an equal part of the second dimension ·
vocabulary: rows, after zero rows up to the padded vocabulary · heads: whole heads, and within a
head the rows of q, k and v in this order · gate_up: the rank's rows of gate, then those of up.
"""


@dataclass(frozen=True)
class TensorRule:
    """One Megatron tensor and the Hugging Face tensors it is made of."""

    megatron: str
    huggingface: tuple[str, ...]
    """q, k, v for `heads`; gate, up for `gate_up`; else a single name."""
    split: Split
    shape: tuple[int, ...]
    """Of each of the Hugging Face tensors."""
    heads: int = 1
    """Attention heads; read only by `heads`."""


class Read(Protocol):
    def __call__(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> Tensor:
        """A part of a Hugging Face tensor; one-dimensional tensors have rows only."""


def rules(model: ModelSection) -> list[TensorRule]:
    """Every tensor of a model, in the order they are computed with."""
    embedding = (model.vocab_size, model.hidden_size)
    return [
        TensorRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",),
                   "vocabulary", embedding),
        *(rule for layer in range(model.num_layers) for rule in _layer_rules(model, layer)),
        TensorRule("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated",
                   (model.hidden_size,)),
        TensorRule("output_layer.weight", ("lm_head.weight",), "vocabulary", embedding),
    ]  # fmt: skip


def huggingface_shapes(model: ModelSection) -> dict[str, tuple[int, ...]]:
    """Hugging Face name → shape, of every tensor of a model."""
    return {name: rule.shape for rule in rules(model) for name in rule.huggingface}


def local_tensor(
    rule: TensorRule, read: Read, tp_rank: int, tp_size: int, padded_vocab_size: int
) -> Tensor:
    """A rank's part of a Megatron tensor, made of slices only, in the dtype they are stored in.

    Args:
        padded_vocab_size: rows of embedding and output layer over all ranks; see `model.build`.
    """
    if rule.split == "replicated":
        return read(rule.huggingface[0])
    if rule.split == "vocabulary":
        return _vocabulary_rows(rule, read, tp_rank, padded_vocab_size // tp_size)
    axis = 1 if rule.split == "columns" else 0
    size = rule.shape[axis] // tp_size
    part = slice(tp_rank * size, (tp_rank + 1) * size)
    if rule.split == "columns":
        return read(rule.huggingface[0], columns=part)
    parts = [read(name, rows=part) for name in rule.huggingface]
    if rule.split == "heads":
        return _interleave_heads(parts, rule.heads // tp_size)
    return torch.cat(parts)


def _layer_rules(model: ModelSection, layer: int) -> Iterator[TensorRule]:
    ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
    h, f, heads = model.hidden_size, model.ffn_hidden_size, model.num_attention_heads
    qkv = tuple(f"{theirs}.self_attn.{name}_proj" for name in "qkv")
    qkv_weight = tuple(f"{name}.weight" for name in qkv)
    qkv_bias = tuple(f"{name}.bias" for name in qkv)
    out = f"{theirs}.self_attn.o_proj"
    attention = f"{ours}.self_attention"
    gate_up = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")

    yield TensorRule(f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",),
                     "replicated", (h,))  # fmt: skip
    yield TensorRule(f"{attention}.linear_qkv.weight", qkv_weight, "heads", (h, h), heads)
    if model.attention_bias:
        yield TensorRule(f"{attention}.linear_qkv.bias", qkv_bias, "heads", (h,), heads)
    yield TensorRule(f"{attention}.linear_proj.weight", (f"{out}.weight",), "columns", (h, h))
    if model.attention_bias:
        # Added after the sum over ranks, so that each rank holds all of it.
        yield TensorRule(f"{attention}.linear_proj.bias", (f"{out}.bias",), "replicated", (h,))
    yield TensorRule(f"{ours}.pre_mlp_layernorm.weight",
                     (f"{theirs}.post_attention_layernorm.weight",), "replicated",
                     (h,))  # fmt: skip
    yield TensorRule(f"{ours}.mlp.linear_fc1.weight", gate_up, "gate_up", (f, h))
    yield TensorRule(f"{ours}.mlp.linear_fc2.weight", (f"{theirs}.mlp.down_proj.weight",),
                     "columns", (h, f))  # fmt: skip


def _vocabulary_rows(rule: TensorRule, read: Read, tp_rank: int, size: int) -> Tensor:
    vocab, columns = rule.shape
    start = min(tp_rank * size, vocab)
    stop = min(start + size, vocab)
    rows = read(rule.huggingface[0], rows=slice(start, stop))
    padding = rows.new_zeros(size - (stop - start), columns)
    return torch.cat([rows, padding])


def _interleave_heads(parts: list[Tensor], heads: int) -> Tensor:
    """q, k, v [heads × head_dim, …] → [heads × 3 × head_dim, …]."""
    rest = parts[0].shape[1:]
    per_head = [part.reshape(heads, -1, *rest) for part in parts]
    return torch.cat(per_head, dim=1).reshape(-1, *rest)
