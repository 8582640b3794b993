"""Where DeepSpeed's ZeRO optimizers keep the state of each parameter. Source: DeepSpeed 0.19.8."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import Parameter

from internlm_lib.engines.fragments import Fragment, pieces_of


def fragments(optimizer: Any, parameters: list[Parameter], stage: int) -> Iterator[Fragment]:
    """Args: optimizer: DeepSpeed's, of ZeRO 1, 2 or 3 or for bf16; parameters: the model's."""
    inner = torch_optimizer(optimizer)
    if stage == 3:
        return _of_stage_three(optimizer, inner, parameters)
    flat = getattr(optimizer, "single_partition_of_fp32_groups", None)
    if flat is None:  # ZeRO 1 with bf16 is another class
        flat = optimizer.fp32_groups_flat_partition
    return _of_flat_groups(flat, inner, parameters)


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that updates tensors, inside of DeepSpeed's."""
    inner: torch.optim.Optimizer = optimizer.optimizer
    return inner


def _of_flat_groups(
    flat: list[torch.Tensor], inner: torch.optim.Optimizer, parameters: list[Parameter]
) -> Iterator[Fragment]:
    """A group's parameters lie one after the other, cut into a partition per rank."""
    for parameter in parameters:
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:  # some of its elements are in this rank's partition
            own, here = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield from pieces_of(
                inner, parameter, flat[mapping.param_group_index],
                start=own.start, where=slice(here.start, here.start + here.numel),
            )  # fmt: skip


def _of_stage_three(
    optimizer: Any, inner: torch.optim.Optimizer, parameters: list[Parameter]
) -> Iterator[Fragment]:
    """Each parameter is cut into equal parts, the last of them filled up."""
    for parameter in parameters:
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = size * optimizer._get_param_partition_rank(parameter)
        count = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if count > 0:
            yield from pieces_of(
                inner, parameter, optimizer.fp32_partitioned_groups_flat[group],
                start=start, where=slice(offset, offset + count),
            )  # fmt: skip
