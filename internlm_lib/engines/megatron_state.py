"""Where megatron-core's optimizers keep the state of each parameter. Source: megatron-core 0.16.1.

Import only after `Device.adapt_megatron()`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import MegatronGradScaler
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)

from internlm_lib.engines.fragments import Fragment, pieces_of


def fragments(optimizer: MegatronOptimizer) -> Iterator[Fragment]:
    for single in single_optimizers(optimizer):
        if isinstance(single, DistributedOptimizer):
            yield from _of_distributed(single)
        elif isinstance(single, Float16OptimizerWithFloat16Params):
            yield from _of_main_copies(single)
        else:
            for group in single.optimizer.param_groups:
                for parameter in group["params"]:
                    yield from pieces_of(single.optimizer, parameter, parameter, shared=True)


def torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that update tensors, inside of megatron's."""
    return [single.optimizer for single in single_optimizers(optimizer)]


def grad_scaler(optimizer: MegatronOptimizer) -> MegatronGradScaler | None:
    """The loss scaling that all optimizers share; None in fp32."""
    return getattr(single_optimizers(optimizer)[0], "grad_scaler", None)


def single_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    if isinstance(optimizer, ChainedOptimizer):
        return list(optimizer.chained_optimizers)
    return [optimizer]


def _of_distributed(optimizer: DistributedOptimizer) -> Iterator[Fragment]:
    """A data parallel rank's share of the gradient buffer, cut at the parameters' borders."""
    groups = optimizer.optimizer.param_groups
    for parameter, (group, order) in optimizer.model_param_group_index_map.items():
        own = optimizer._get_model_param_range_map(parameter)["param"]
        tensor = groups[group]["params"][order]
        yield from pieces_of(optimizer.optimizer, parameter, tensor, start=own.start)


def _of_main_copies(optimizer: Float16OptimizerWithFloat16Params) -> Iterator[Fragment]:
    pairs = [
        *zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True),
        *((group, group) for group in optimizer.fp32_from_fp32_groups),
    ]
    for parameters, tensors in pairs:
        for parameter, tensor in zip(parameters, tensors, strict=True):
            yield from pieces_of(optimizer.optimizer, parameter, tensor, shared=True)
