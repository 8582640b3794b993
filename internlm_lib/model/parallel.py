"""Process groups of a layout. Import only after `Device.adapt_megatron()`."""

import contextlib
import gc
import os
import random
from datetime import timedelta

import numpy
import torch
from megatron.core import parallel_state, tensor_parallel

from internlm_lib.devices import Device
from internlm_lib.experiment.schema import Layout
from internlm_lib.ranks.environment import on_one_node


def initialize_parallel(
    layout: Layout, device: Device, *, timeout_minutes: float = 30.0, seed: int = 1234
) -> None:
    """Join the job that torchrun started and split it as `layout` says.

    Reads torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR …).
    """
    device.bind(int(os.environ.get("LOCAL_RANK", 0)))
    if device.name == "cpu" and on_one_node():
        # Works where the host's name resolves to nothing. Nodes need a network between them, which
        # the launch plan names.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(device.backend, timeout=timedelta(minutes=timeout_minutes))
    split_ranks(layout, timeout_minutes=timeout_minutes, seed=seed)


def split_ranks(layout: Layout, *, timeout_minutes: float = 30.0, seed: int = 1234) -> None:
    """Split the ranks of a job that was joined, anew if they were split; every rank calls it.

    Seeds every random number generator, as Megatron-LM: Python's, numpy's and torch's by pipeline
    stage, and the tensor parallel ones. InternLM's training draws from none: it has no dropout.
    """
    if parallel_state.model_parallel_is_initialized():
        _leave_groups()
    parallel_state.initialize_model_parallel(
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
    )
    of_stage = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(of_stage)
    numpy.random.seed(of_stage % 2**32)
    torch.manual_seed(of_stage)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _leave_groups() -> None:
    """Megatron only forgets its groups; gloo's would keep threads that spin on closed sockets."""
    groups = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    gc.collect()  # engines that are used no more refer to them
    for group in filter(None, groups):
        with contextlib.suppress(ValueError):  # megatron has ended its gloo copies itself
            torch.distributed.destroy_process_group(group)


def shutdown() -> None:
    """Leave the job; every rank calls it."""
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def is_rank_zero() -> bool:
    return torch.distributed.get_rank() == 0


def data_parallel_rank() -> int:
    """Which slice of every batch is this rank's."""
    rank: int = parallel_state.get_data_parallel_rank()
    return rank
