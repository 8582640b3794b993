"""megatron-core as an engine: TP, PP (1F1B), sequence parallelism, DP with a distributed optimizer.

Import only after `Device.adapt_megatron()`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from internlm_lib.data.batches import Batch
from internlm_lib.engines.base import StepResult, masked_mean
from internlm_lib.engines.stopwatch import Stopwatch
from internlm_lib.experiment.schema import Layout, OptimizerSection, TrainingSection


class MegatronEngine:
    def __init__(
        self,
        gpt: GPTModel,
        layout: Layout,
        training: TrainingSection,
        optimizer: OptimizerSection,
    ) -> None:
        self._training = training
        self._optimizer_section = optimizer
        self._gpt = gpt
        module = Float16Module(gpt.config, gpt) if training.precision == "bf16" else gpt
        self._model = DistributedDataParallel(
            config=gpt.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=layout.use_distributed_optimizer,
            ),
            module=module,
        )
        self._optimizer = get_megatron_optimizer(
            _optimizer_config(layout, training, optimizer), [self._model]
        )
        gpt.config.finalize_model_grads_func = finalize_model_grads
        gpt.config.grad_scale_func = self._optimizer.scale_loss
        gpt.config.no_sync_func = self._model.no_sync

    def train_step(self, batches: Iterator[Batch], num_micro_batches: int, lr: float) -> StepResult:
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
            # Megatron leaves a group's own decay to its scheduler, which this loop replaces.
            group["weight_decay"] = self._optimizer_section.weight_decay * group["wd_mult"]
        watch = Stopwatch()
        with watch.part("forward_backward"):
            loss = self._forward_backward(
                watch.data(batches), num_micro_batches, forward_only=False
            )
        with watch.part("optimizer"):
            _, grad_norm, _ = self._optimizer.step()
        return StepResult(loss, float(grad_norm), watch.seconds())

    def validation_loss(self, batches: Iterator[Batch], num_micro_batches: int) -> float:
        self._model.eval()
        loss = self._forward_backward(batches, num_micro_batches, forward_only=True)
        self._model.train()
        return loss

    @contextmanager
    def whole_weights(self) -> Iterator[GPTModel]:
        yield self._gpt

    def _forward_backward(
        self, batches: Iterator[Batch], num_micro_batches: int, *, forward_only: bool
    ) -> float:
        reports: list[dict[str, Tensor]] = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=batches,
            model=[self._model],
            num_microbatches=num_micro_batches,
            seq_length=self._training.seq_length,
            micro_batch_size=self._training.micro_batch_size,
            forward_only=forward_only,
        )
        losses = [report["loss"] for report in reports]
        return _mean_over_job(losses, next(self._gpt.parameters()).device)


def _optimizer_config(
    layout: Layout, training: TrainingSection, optimizer: OptimizerSection
) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=training.precision == "bf16",
        params_dtype=torch.bfloat16 if training.precision == "bf16" else torch.float32,
        use_distributed_optimizer=layout.use_distributed_optimizer,
    )


def _forward_step(
    batches: Iterator[Batch], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Any]]]]:
    batch = next(batches)
    output = model(batch.tokens, batch.position_ids, None, labels=batch.labels)
    return output, partial(_loss, batch.loss_mask)


def _loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = masked_mean(losses, loss_mask)
    # A clone: the schedule divides the returned tensor in place, and detach() shares its storage.
    return loss, {"loss": loss.detach().clone()}


def _mean_over_job(losses: list[Tensor], device: torch.device) -> float:
    """Mean over micro-batches and data parallel ranks, known to the last stage, told to all."""
    if parallel_state.is_pipeline_last_stage():
        mean = torch.stack(losses).mean()
        group = parallel_state.get_data_parallel_group()
        torch.distributed.all_reduce(mean, group=group)
        mean /= parallel_state.get_data_parallel_world_size()
    else:
        mean = torch.zeros((), device=device)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            mean,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return float(mean)
