"""Weights of one rank's GPTModel: from Hugging Face, and to and from a distributed checkpoint.

Import only after `Device.adapt_megatron()`. Saving starts processes by `spawn`: the main module of
the ranks must be guarded by `if __name__ == "__main__"`, or it runs again in each of them.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn import Module, Parameter

from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.files import atomic_path
from internlm_lib.model.build import padded_vocab_size
from internlm_lib.model.parallel import is_rank_zero
from internlm_lib.weights.huggingface import HuggingFaceFolder
from internlm_lib.weights.layout import local_tensor, rules

_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")


def load_huggingface(gpt: Module, folder: HuggingFaceFolder, model: ModelSection) -> None:
    """Fill this rank's parameters, reading only its own slices.

    Raises InputError if the folder does not hold this model.
    """
    folder.check_shape(model)
    with torch.no_grad():
        for _, parameter, value in _pairs(gpt, folder, model):
            parameter.copy_(value)


def differing_parameters(gpt: Module, folder: HuggingFaceFolder, model: ModelSection) -> list[str]:
    """Names of this rank's parameters that are not, bit by bit, what the folder says."""
    return [
        name
        for name, parameter, value in _pairs(gpt, folder, model)
        if not torch.equal(parameter.detach().cpu(), value.to(parameter.dtype))
    ]


def named_parameters(gpt: Module) -> dict[str, Parameter]:
    """This rank's parameters, with layers counted over the whole model."""
    module = unwrap(gpt)
    numbers = [layer.layer_number - 1 for layer in module.decoder.layers]
    return {
        _LAYER.sub(lambda local: str(numbers[int(local[0])]), name): parameter
        for name, parameter in module.named_parameters()
    }


def save_weights(gpt: Module, path: Path) -> None:
    """Write a Megatron distributed checkpoint that any TP and PP can load; every rank calls it.

    The folder is whole or absent. Ranks on several nodes need it on a shared file system.
    """
    # Not atomic_path alone: all ranks write into one folder, whose name each must know.
    shared = path.with_name(f".{path.name}.saving")
    if is_rank_zero():
        shutil.rmtree(shared, ignore_errors=True)
        shared.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(unwrap(gpt).sharded_state_dict(), str(shared))
    torch.distributed.barrier()
    if is_rank_zero():
        with atomic_path(path) as temporary:
            shared.replace(temporary)
    torch.distributed.barrier()


def load_weights(gpt: Module, path: Path) -> None:
    """Fill this rank's parameters from what `save_weights` wrote; every rank calls it.

    Raises InputError if `path` is no distributed checkpoint.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        raise InputError(
            f"{path} is no Megatron distributed checkpoint; run notebooks/02_convert.ipynb for the "
            "weights that training starts from, notebooks/03_train.ipynb for trained ones"
        )
    module = unwrap(gpt)
    state = dist_checkpointing.load(module.sharded_state_dict(), str(path))
    module.load_state_dict(state)


def unwrap(gpt: Module) -> GPTModel:
    """The GPTModel inside of Float16Module, DistributedDataParallel or a DeepSpeed engine."""
    module: Any = gpt
    while not isinstance(module, GPTModel):
        module = module.module
    return module


def _pairs(
    gpt: Module, folder: HuggingFaceFolder, model: ModelSection
) -> Iterator[tuple[str, Parameter, Tensor]]:
    """Name, parameter of this rank, and the folder's value for it."""
    parameters = named_parameters(gpt)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    padded = padded_vocab_size(model, size)
    for rule in rules(model):
        if rule.megatron in parameters:
            value = local_tensor(rule, folder.read, rank, size, padded)
            yield rule.megatron, parameters[rule.megatron], value
