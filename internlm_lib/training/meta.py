"""Any rank of any layout in one process: on the meta device, with collectives that do nothing.

What comes out are parameters and bytes, not numbers or times. Import only after
`MetaDevice().adapt_megatron()`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel

from internlm_lib.devices.meta import MetaDevice, pretend_to_be
from internlm_lib.experiment.schema import Experiment, Layout
from internlm_lib.model.arithmetic import rank_state_bytes
from internlm_lib.model.build import build_gpt_model
from internlm_lib.training.activations import (
    counted,
    forward_pass,
    measure_layer,
    measure_rank,
)
from internlm_lib.training.recompute import LayerCost, RankMemory, kept_bytes


@dataclass(frozen=True)
class RankBuild:
    """One rank, built, and taken through one forward and backward pass of a micro-batch."""

    rank: int
    stage: int
    """Pipeline stage."""
    parameters: int
    parameter_bytes: int
    state_bytes: dict[str, int]
    """`model.arithmetic.rank_state_bytes`."""
    activation_bytes: int
    """Kept for the backward pass of one micro-batch under `training.recompute_granularity`."""
    predicted_activation_bytes: int
    """The same from one layer and what lies around the layers."""
    layer: LayerCost
    memory: RankMemory
    seconds: float
    """Build, measurements, forward and backward pass."""


def build_stages(experiment: Experiment, layout: Layout) -> list[RankBuild]:
    """The first rank of every pipeline stage; the others of a stage hold as much."""
    in_stage = layout.tensor_model_parallel_size * layout.data_parallel_size
    stages = range(layout.pipeline_model_parallel_size)
    return [build_rank(experiment, layout, stage * in_stage) for stage in stages]


def build_rank(
    experiment: Experiment, layout: Layout, rank: int, device: MetaDevice | None = None
) -> RankBuild:
    begin = time.perf_counter()
    device, training = device or MetaDevice(), experiment.training
    with rank_on_meta(experiment, layout, rank, device) as gpt:
        layer = measure_layer(gpt, training, device)
        memory = measure_rank([gpt], training, layout, device)
        output, kept = counted(forward_pass(gpt, training, device), gpt.parameters())
        torch.autograd.backward(output, torch.empty_like(output))
        without = [name for name, weight in gpt.named_parameters() if weight.grad is None]
        if without:
            raise RuntimeError(f"no gradient reached {without}")
        weights = list(gpt.parameters())
        parameters = sum(weight.numel() for weight in weights)
        return RankBuild(
            rank=rank,
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            parameters=parameters,
            parameter_bytes=sum(weight.nbytes for weight in weights),
            state_bytes=rank_state_bytes(parameters, layout, training.precision),
            activation_bytes=kept,
            predicted_activation_bytes=kept_bytes(layer, memory, training),
            layer=layer,
            memory=memory,
            seconds=time.perf_counter() - begin,
        )


@contextmanager
def rank_on_meta(
    experiment: Experiment, layout: Layout, rank: int, device: MetaDevice
) -> Iterator[GPTModel]:
    """The part of the model that `rank` of the layout has."""
    with pretend_to_be(rank, layout.world_size):
        parallel_state.initialize_model_parallel(
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            # gloo groups would want to meet the other ranks.
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(experiment.training.seed)
        try:
            yield build_gpt_model(experiment.model, layout, experiment.training, device)
        finally:
            parallel_state.destroy_model_parallel()
