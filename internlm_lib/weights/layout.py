"""The one table of what each weight is called, and how ranks share it.

Logical tensors are those of InternLM's own checkpoints, under their Hugging Face names (LLaMA's).
What a format stores are tensors made of rows of them: `rules` and `classic_rules` name these,
`pieces` says which rows lie where. Reading and writing are one walk over the same pieces.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from internlm_lib.experiment.schema import ModelSection

Split = Literal["replicated", "columns", "vocabulary", "heads", "rows"]
"""How a tensor parallel rank's part is cut:

replicated: whole on every rank · columns: an equal part of the second dimension ·
vocabulary: rows, after padding up to the padded vocabulary · heads: whole heads, and within a
head the rows of q, k and v in this order · rows: an equal part of the rows of each tensor, one
below the other (gate, then up).
"""

LAYER = re.compile(r"(?<=\blayers\.)\d+")
"""The number of the layer in any format's name."""


@dataclass(frozen=True)
class TensorRule:
    """One tensor of a format and the logical tensors it is made of."""

    name: str
    """As the format calls it, with the layer counted over the whole model."""
    huggingface: tuple[str, ...]
    """q, k, v for `heads`; gate, up for `rows`; else a single name."""
    split: Split
    shape: tuple[int, ...]
    """Of each of the logical tensors."""
    heads: int = 1
    """Attention heads; read only by `heads`."""


@dataclass(frozen=True)
class Piece:
    """Rows of a stored tensor that are rows of a logical one."""

    name: str
    """Of the logical tensor."""
    rows: slice
    columns: slice
    """`slice(None)` for all of them; one-dimensional tensors have rows only."""
    start: int
    """First of the rows in the stored tensor."""
    role: Literal["data", "copy", "padding"] = "data"
    """copy: another rank holds the same rows; padding: rows past the vocabulary, which repeat its
    last ones, as AscendSpeed's converter pads. Neither is read."""


class Read(Protocol):
    def __call__(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> Tensor:
        """A part of a logical tensor; one-dimensional tensors have rows only."""


def rules(model: ModelSection) -> list[TensorRule]:
    """Every tensor of a model under GPTModel's names, in the order they are computed with."""
    embedding = (model.vocab_size, model.hidden_size)
    return [
        TensorRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",),
                   "vocabulary", embedding),
        *(rule for layer in range(model.num_layers) for rule in _layer_rules(model, layer)),
        TensorRule("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated",
                   (model.hidden_size,)),
        TensorRule("output_layer.weight", ("lm_head.weight",), "vocabulary", embedding),
    ]  # fmt: skip


def classic_rules(model: ModelSection, merge_mlp: bool) -> list[TensorRule]:
    """Every tensor of a model under the names of AscendSpeed and the old Megatron-LM.

    Args:
        merge_mlp: gate and up as one tensor (`--mlp-layer-fusion`), not as two.
    """
    return [named for rule in rules(model) for named in _classic(rule, merge_mlp)]


def huggingface_shapes(model: ModelSection) -> dict[str, tuple[int, ...]]:
    """Logical name → shape, of every tensor of a model."""
    return {name: rule.shape for rule in rules(model) for name in rule.huggingface}


def distributed_key(name: str) -> tuple[str, int | None]:
    """Key of a GPTModel tensor in a distributed checkpoint, and its layer.

    There all layers make one tensor, with the layer as its first dimension, and norms are called as
    if they were fused with the linear layer after them. Source: megatron-core 0.16.1,
    `GPTModel.sharded_state_dict`.
    """
    layer = LAYER.search(name)
    key = name.replace(f"layers.{layer[0]}.", "layers.") if layer else name
    for norm, linear in (("input_layernorm", "self_attention.linear_qkv"),
                         ("pre_mlp_layernorm", "mlp.linear_fc1")):  # fmt: skip
        key = key.replace(f"{norm}.weight", f"{linear}.layer_norm_weight")
    return key, int(layer[0]) if layer else None


def rules_of_stage(
    table: Sequence[TensorRule], layers_per_stage: Sequence[int], stage: int
) -> list[TensorRule]:
    """A pipeline stage's rules, with layers counted from its own first one, as ranks store them."""
    first, last = sum(layers_per_stage[:stage]), len(layers_per_stage) - 1
    own = range(first, first + layers_per_stage[stage])
    chosen = []
    for rule in table:
        if layer := LAYER.search(rule.name):
            if int(layer[0]) in own:
                local = LAYER.sub(str(int(layer[0]) - first), rule.name)
                chosen.append(replace(rule, name=local))
        elif stage == (0 if "embedding" in rule.name else last):
            chosen.append(rule)
    return chosen


def pieces(rule: TensorRule, tp_rank: int, tp_size: int, padded_vocab_size: int) -> list[Piece]:
    """What a rank's part of a tensor is made of, in the order of its rows."""
    everything = slice(None)
    if rule.split == "replicated":
        whole = slice(0, rule.shape[0])
        role: Literal["data", "copy"] = "copy" if tp_rank else "data"
        return [Piece(rule.huggingface[0], whole, everything, 0, role)]
    if rule.split == "columns":
        size = rule.shape[1] // tp_size
        part = slice(tp_rank * size, (tp_rank + 1) * size)
        return [Piece(rule.huggingface[0], slice(0, rule.shape[0]), part, 0)]
    if rule.split == "vocabulary":
        return _vocabulary_pieces(rule, tp_rank, padded_vocab_size // tp_size, padded_vocab_size)
    blocks = rule.heads // tp_size if rule.split == "heads" else 1
    size = rule.shape[0] // tp_size // blocks
    first = tp_rank * blocks
    names = [(block, name) for block in range(blocks) for name in rule.huggingface]
    return [
        Piece(name, slice((first + block) * size, (first + block + 1) * size), everything, i * size)
        for i, (block, name) in enumerate(names)
    ]


def local_shape(rule: TensorRule, tp_size: int, padded_vocab_size: int) -> tuple[int, ...]:
    """Shape of a rank's part of a tensor."""
    rows, *rest = rule.shape
    if rule.split == "replicated":
        return rule.shape
    if rule.split == "columns":
        return (rows, rest[0] // tp_size)
    if rule.split == "vocabulary":
        return (padded_vocab_size // tp_size, *rest)
    return (len(rule.huggingface) * rows // tp_size, *rest)


def local_tensor(
    rule: TensorRule, read: Read, tp_rank: int, tp_size: int, padded_vocab_size: int
) -> Tensor:
    """A rank's part of a tensor, made of slices only, in the dtype they are stored in.

    Rows past the vocabulary are zero.

    Args:
        padded_vocab_size: rows of embedding and output layer over all ranks; see `model.build`.
    """
    made_of = pieces(rule, tp_rank, tp_size, padded_vocab_size)
    parts = [read(p.name, p.rows, p.columns) for p in made_of if p.role != "padding"]
    if not parts:
        parts = [read(rule.huggingface[0], slice(0, 0))]
    missing = local_shape(rule, tp_size, padded_vocab_size)[0] - sum(len(part) for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(missing, *parts[0].shape[1:])])


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
    yield TensorRule(f"{ours}.mlp.linear_fc1.weight", gate_up, "rows", (f, h))
    yield TensorRule(f"{ours}.mlp.linear_fc2.weight", (f"{theirs}.mlp.down_proj.weight",),
                     "columns", (h, f))  # fmt: skip


_CLASSIC_NAMES = {
    "decoder.": "encoder.",
    "linear_qkv": "query_key_value",
    "linear_proj": "dense",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "linear_fc1": "proj",
    "linear_fc2": "dense_4h_to_h",
}


def _classic(rule: TensorRule, merge_mlp: bool) -> Iterator[TensorRule]:
    name = rule.name
    for ours, theirs in _CLASSIC_NAMES.items():
        name = name.replace(ours, theirs)
    if rule.split != "rows" or merge_mlp:
        yield replace(rule, name=name)
        return
    for part, half in zip(("gate_proj", "dense_h_to_4h"), rule.huggingface, strict=True):
        yield replace(rule, name=name.replace("mlp.proj", f"mlp.{part}"), huggingface=(half,))


def _vocabulary_pieces(rule: TensorRule, tp_rank: int, size: int, padded: int) -> list[Piece]:
    vocab, added = rule.shape[0], padded - rule.shape[0]
    name, everything = rule.huggingface[0], slice(None)
    start, stop = tp_rank * size, (tp_rank + 1) * size
    real, fill = min(stop, vocab), max(start, vocab)
    data = [Piece(name, slice(start, real), everything, 0)] if start < real else []
    if fill >= stop:
        return data
    rows = slice(fill - added, stop - added)
    return [*data, Piece(name, rows, everything, fill - start, "padding")]
