"""Process groups of a layout. Import only after `Device.adapt_megatron()`."""

import os
from datetime import timedelta

import torch
from megatron.core import parallel_state, tensor_parallel

from internlm_lib.devices import Device
from internlm_lib.experiment.schema import Layout
from internlm_lib.ranks.environment import on_one_node


def initialize_parallel(
    layout: Layout, device: Device, *, timeout_minutes: float = 30.0, seed: int = 1234
) -> None:
    """Join the job that torchrun started and split it as `layout` says.

    Reads torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR …). Seeds the tensor parallel random
    number generators.
    """
    device.bind(int(os.environ.get("LOCAL_RANK", 0)))
    if device.name == "cpu" and on_one_node():
        # Works where the host's name resolves to nothing. Nodes need a network between them, which
        # the launch plan names.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(device.backend, timeout=timedelta(minutes=timeout_minutes))
    parallel_state.initialize_model_parallel(
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Leave the job; every rank calls it."""
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def is_rank_zero() -> bool:
    return torch.distributed.get_rank() == 0
