"""Weights of one rank's GPTModel: from any checkpoint, and to a distributed one.

Import only after `Device.adapt_megatron()`. Saving starts processes by `spawn`: the main module of
the ranks must be guarded by `if __name__ == "__main__"`, or it runs again in each of them.
"""

import shutil
from collections.abc import Iterator, Sequence
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
from internlm_lib.model.arithmetic import padded_vocab_size
from internlm_lib.model.parallel import is_rank_zero
from internlm_lib.weights.checkpoint import Checkpoint
from internlm_lib.weights.formats import open_checkpoint
from internlm_lib.weights.layout import LAYER, local_tensor, rules
from internlm_lib.weights.manifest import tensor_hash
from internlm_lib.weights.model_config import write_model
from internlm_lib.weights.verify import hash_tensors

GPT = Module | Sequence[Module]
"""One rank's part of a model: a GPTModel, wrapped or not, or the chunks of an interleaved one."""


def load_weights(gpt: GPT, path: Path, model: ModelSection) -> None:
    """Fill this rank's parameters from a checkpoint of any format, reading only its own slices.

    Raises InputError if it does not hold this model, or values that fp16 cannot hold.
    """
    with open_checkpoint(path, model) as weights, torch.no_grad():
        for name, parameter, value in _pairs(gpt, weights, model):
            parameter.copy_(value)
            if parameter.dtype == torch.float16 and value.isfinite().all():
                _check_fits(name, parameter, value)


def differing_parameters(gpt: GPT, weights: Checkpoint, model: ModelSection) -> list[str]:
    """Names of this rank's parameters that are not, bit by bit, what the checkpoint says."""
    return [
        name
        for name, parameter, value in _pairs(gpt, weights, model)
        if not torch.equal(parameter.detach().cpu(), value.to(parameter.dtype))
    ]


def named_parameters(gpt: GPT) -> dict[str, Parameter]:
    """This rank's parameters, with layers counted over the whole model."""
    return {
        name: parameter
        for module in unwrap(gpt)
        for name, parameter in _named_parameters(module).items()
    }


def _named_parameters(module: GPTModel) -> dict[str, Parameter]:
    numbers = [layer.layer_number - 1 for layer in module.decoder.layers]
    return {
        LAYER.sub(lambda local: str(numbers[int(local[0])]), name): parameter
        for name, parameter in module.named_parameters()
    }


def save_weights(gpt: GPT, path: Path, model: ModelSection) -> None:
    """Write a Megatron distributed checkpoint that any TP and PP can load; every rank calls it.

    The folder is whole or absent. Ranks on several nodes need it on a shared file system.
    """
    # Not atomic_path alone: all ranks write into one folder, whose name each must know.
    shared = path.with_name(f".{path.name}.saving")
    if is_rank_zero():
        shutil.rmtree(shared, ignore_errors=True)
        shared.mkdir(parents=True)
    torch.distributed.barrier()
    modules = unwrap(gpt)
    # What a tensor is called in the file does not depend on where it stands in this dictionary.
    state = {f"chunk{number}": m.sharded_state_dict() for number, m in enumerate(modules)}
    dist_checkpointing.save(state, str(shared))
    torch.distributed.barrier()
    if is_rank_zero():
        dtype = next(modules[0].parameters()).dtype
        write_model(shared, model, str(dtype).removeprefix("torch."))
        with atomic_path(path) as temporary:
            shared.replace(temporary)
    torch.distributed.barrier()


def hash_over_ranks(path: Path, model: ModelSection) -> str:
    """The `tensor_hash` of a checkpoint, each rank reading its share; every rank calls it."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with open_checkpoint(path, model) as weights:
        own = hash_tensors(weights, weights.names()[rank::size])
    gathered: list[dict[str, Any]] = [{} for _ in range(size)]
    torch.distributed.all_gather_object(gathered, own)
    return tensor_hash({name: entry for part in gathered for name, entry in part.items()})


def _check_fits(name: str, parameter: Parameter, value: Tensor) -> None:
    if not parameter.isfinite().all():
        raise InputError(
            f"{name} has values up to {value.abs().max().item():.3g}, more than fp16 can hold "
            f"({torch.finfo(torch.float16).max:.3g}); train with training.precision bf16 or fp32"
        )


def unwrap(gpt: GPT) -> list[GPTModel]:
    """The GPTModels inside of Float16Module, DistributedDataParallel or a DeepSpeed engine."""
    return [_unwrap(gpt)] if isinstance(gpt, Module) else [_unwrap(chunk) for chunk in gpt]


def _unwrap(module: Any) -> GPTModel:
    while not isinstance(module, GPTModel):
        module = module.module
    return module


def _pairs(
    gpt: GPT, weights: Checkpoint, model: ModelSection
) -> Iterator[tuple[str, Parameter, Tensor]]:
    """Name, parameter of this rank, and the checkpoint's value for it."""
    parameters = named_parameters(gpt)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    padded = padded_vocab_size(model, size)
    for rule in rules(model):
        if rule.name in parameters:
            value = local_tensor(rule, weights.read, rank, size, padded)
            yield rule.name, parameters[rule.name], value
