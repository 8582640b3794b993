"""What files a checkpoint consists of, and which rows of which weights lie in them.

A plan is made without any weights: it is what a writer will write and what a reader expects.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.model.arithmetic import padded_vocab_size
from internlm_lib.weights.layout import Piece, TensorRule, local_shape, pieces, rules_of_stage


@dataclass(frozen=True)
class PlannedTensor:
    name: str
    """As the file calls it."""
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class PlannedFile:
    path: str
    """Below the checkpoint's folder."""
    tensors: tuple[PlannedTensor, ...]


@dataclass(frozen=True)
class Partition:
    """How a checkpoint's ranks share the weights."""

    tensor_parallel: int = 1
    layers_per_stage: tuple[int, ...] = ()
    """Of each pipeline stage."""
    padded_vocab_size: int = 0

    @property
    def pipeline_parallel(self) -> int:
        return len(self.layers_per_stage)

    @property
    def label(self) -> str:
        uneven = len(set(self.layers_per_stage)) > 1
        layers = f" (layers {', '.join(map(str, self.layers_per_stage))})" if uneven else ""
        return f"TP{self.tensor_parallel} PP{self.pipeline_parallel}{layers}"


@dataclass(frozen=True)
class Target:
    """What a checkpoint is to be written as."""

    model: ModelSection
    split: Partition
    dtypes: Mapping[str, torch.dtype]
    """Of each logical tensor."""
    merge_mlp: bool = False
    """Gate and up as one tensor; read by the formats classic and deepspeed."""

    def dtype(self, tensor: PlannedTensor) -> torch.dtype:
        """Raises InputError if a tensor would have to hold several dtypes."""
        names = dict.fromkeys(piece.name for piece in tensor.pieces)
        dtypes = {self.dtypes[name] for name in names}
        if len(dtypes) > 1:
            raise InputError(
                f"{tensor.name} is made of {', '.join(names)}, which are stored in different types "
                f"({', '.join(sorted(map(str, dtypes)))}): choose one for all (--dtype)"
            )
        return dtypes.pop()

    def nbytes(self, file: PlannedFile) -> int:
        """Of the tensors in a file."""
        return sum(math.prod(tensor.shape) * self.dtype(tensor).itemsize for tensor in file.tensors)


def partition(
    model: ModelSection,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    *,
    num_layer_list: Sequence[int] | None = None,
) -> Partition:
    """A checked partition of a model.

    Args:
        num_layer_list: layers of each pipeline stage, for stages of different depth.
    Raises:
        InputError: listing everything that does not divide.
    """
    problems = indivisible(model, tensor_parallel)
    if (multiple := model.make_vocab_size_divisible_by) < 1:
        problems.append(f"make_vocab_size_divisible_by is {multiple}; it must be at least 1")
    layers = tuple(num_layer_list or ())
    if layers:
        if len(layers) != pipeline_parallel and pipeline_parallel != 1:
            problems.append(f"{len(layers)} stages in the layer list, not {pipeline_parallel}")
        if sum(layers) != model.num_layers or min(layers) < 1:
            problems.append(
                f"the layer list {', '.join(map(str, layers))} must be positive numbers that sum "
                f"to the model's {model.num_layers} layers"
            )
    elif pipeline_parallel < 1 or model.num_layers % pipeline_parallel:
        problems.append(
            f"pipeline parallel {pipeline_parallel} does not divide num_layers "
            f"{model.num_layers}; give the layers of each stage as a list for an uneven pipeline"
        )
    if problems:
        raise InputError("\n  - ".join(["this layout cannot hold the model:", *problems]))
    padded = padded_vocab_size(model, tensor_parallel)
    if padded > 2 * model.vocab_size:
        raise InputError(
            f"make_vocab_size_divisible_by {multiple} × tensor parallel size {tensor_parallel} "
            f"would more than double the {model.vocab_size} rows of the vocabulary; choose less"
        )
    even = (model.num_layers // pipeline_parallel,) * pipeline_parallel
    return Partition(tensor_parallel, layers or even, padded)


def indivisible(model: ModelSection, tensor_parallel: int) -> list[str]:
    """What of a model cannot be cut into that many equal parts, a text each."""
    return [
        f"tensor parallel size {tensor_parallel} does not divide {what} {getattr(model, what)}"
        for what in ("hidden_size", "ffn_hidden_size", "num_attention_heads")
        if tensor_parallel < 1 or getattr(model, what) % tensor_parallel
    ]


def rank_tensors(
    table: Sequence[TensorRule], split: Partition, tp_rank: int, stage: int
) -> tuple[PlannedTensor, ...]:
    """What one rank holds, under a table's names."""
    size, padded = split.tensor_parallel, split.padded_vocab_size
    return tuple(
        PlannedTensor(
            rule.name,
            local_shape(rule, size, padded),
            tuple(pieces(rule, tp_rank, size, padded)),
        )
        for rule in rules_of_stage(table, split.layers_per_stage, stage)
    )
