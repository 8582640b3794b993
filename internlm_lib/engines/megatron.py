"""megatron-core as an engine: TP, PP (1F1B, interleaved), sequence parallelism, DP with a
distributed optimizer.

Import only after `Device.adapt_megatron()`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
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
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from internlm_lib.data.batches import Batch
from internlm_lib.engines.base import (
    Accept,
    StepResult,
    always,
    decays,
    masked_mean,
    trained_tokens,
)
from internlm_lib.engines.fragments import Fragment, adam_step, set_adam_step
from internlm_lib.engines.loss_scale import scaler_counters, set_scaler_counters
from internlm_lib.engines.megatron_state import fragments, grad_scaler, torch_optimizers
from internlm_lib.engines.stopwatch import Stopwatch
from internlm_lib.experiment.schema import Layout, OptimizerSection, TrainingSection
from internlm_lib.model.precision import DTYPES


class MegatronEngine:
    def __init__(
        self,
        chunks: list[GPTModel],
        layout: Layout,
        training: TrainingSection,
        optimizer: OptimizerSection,
    ) -> None:
        self._training = training
        self._fp16 = training.precision == "fp16"
        self._optimizer_section = optimizer
        self._chunks = chunks
        self._overlaps_gather = layout.overlap_param_gather
        self._model = [
            _data_parallel(chunk, layout, training, first=number == 0)
            for number, chunk in enumerate(chunks)
        ]
        self._optimizer = get_megatron_optimizer(
            _optimizer_config(layout, training, optimizer),
            self._model,
            config_overrides=_decay_groups(layout, optimizer),
        )
        # The schedules read the first chunk's configuration alone.
        config = chunks[0].config
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self._optimizer.scale_loss
        config.no_sync_func = [chunk.no_sync for chunk in self._model]
        if len(chunks) == 1:
            (config.no_sync_func,) = config.no_sync_func

    def train_step(
        self, batches: Iterator[Batch], num_micro_batches: int, lr: float, accept: Accept = always
    ) -> StepResult:
        for chunk in self._model:
            chunk.zero_grad_buffer()
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
        scale = float(self._optimizer.get_loss_scale()) if self._fp16 else None
        with watch.part("optimizer"):
            grad_norm, applied = self._update(loss, accept)
        return StepResult(loss, grad_norm, not applied, scale, watch.seconds())

    def _update(self, loss: float, accept: Accept) -> tuple[float, bool]:
        """Clip and apply the gradient; returns its norm, and whether it was applied.

        Megatron's own step measures no norm of an overflow, and without fp16 applies what is not
        finite.
        """
        if self._optimizer.prepare_grads():  # unscales; the loss scale follows what it finds
            return math.inf, False
        grad_norm = float(self._optimizer.get_grad_norm())
        if not math.isfinite(grad_norm) or not accept(loss):
            return grad_norm, False
        if clip_grad := self._optimizer_section.clip_grad:
            parameters = self._optimizer.get_parameters()
            clip_grad_by_total_norm_fp32(parameters, clip_grad, grad_norm)
        self._optimizer.step_with_ready_grads()
        return grad_norm, True

    def validation_loss(self, batches: Iterator[Batch], num_micro_batches: int) -> float:
        with self._parameters_gathered():
            for chunk in self._model:
                chunk.eval()
            loss = self._forward_backward(batches, num_micro_batches, forward_only=True)
            for chunk in self._model:
                chunk.train()
        return loss

    @contextmanager
    def whole_weights(self) -> Iterator[list[GPTModel]]:
        with self._parameters_gathered():
            yield self._chunks

    @contextmanager
    def _parameters_gathered(self) -> Iterator[None]:
        """For the block, parameters are up to date; between steps of an overlapped gather only the
        next step's forward pass would make them so."""
        for chunk in self._model if self._overlaps_gather else []:
            chunk.disable_forward_pre_hook(param_sync=True)
        try:
            yield
        finally:
            for chunk in self._model if self._overlaps_gather else []:
                chunk.enable_forward_pre_hook()

    def fragments(self) -> Iterator[Fragment]:
        return fragments(self._optimizer)

    def counters(self) -> dict[str, Any]:
        step = adam_step(torch_optimizers(self._optimizer))
        return {"adam_step": step, **scaler_counters(grad_scaler(self._optimizer))}

    def set_counters(self, counters: Mapping[str, Any]) -> None:
        set_adam_step(torch_optimizers(self._optimizer), counters["adam_step"])
        set_scaler_counters(grad_scaler(self._optimizer), counters)

    def _forward_backward(
        self, batches: Iterator[Batch], num_micro_batches: int, *, forward_only: bool
    ) -> float:
        step = list(islice(batches, num_micro_batches))
        reports: list[dict[str, Tensor]] = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, trained_tokens(step)),
            data_iterator=[iter(step) for _ in self._model],  # every chunk asks for all of them
            model=self._model,
            num_microbatches=num_micro_batches,
            seq_length=self._training.seq_length,
            micro_batch_size=self._training.micro_batch_size,
            forward_only=forward_only,
        )
        losses = [report["loss"] for report in reports]
        return _mean_over_job(losses, next(self._chunks[0].parameters()).device)


def _data_parallel(
    chunk: GPTModel, layout: Layout, training: TrainingSection, *, first: bool
) -> DistributedDataParallel:
    _accumulate_gradients_in_products(chunk)
    return DistributedDataParallel(
        config=chunk.config,
        # One per chunk: megatron writes the bucket size it chooses into it.
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=layout.use_distributed_optimizer,
            overlap_grad_reduce=layout.overlap_grad_reduce,
            overlap_param_gather=layout.overlap_param_gather,
        ),
        module=chunk if training.precision == "fp32" else Float16Module(chunk.config, chunk),
        # Of later chunks communication is hidden as a whole, as Megatron-LM has it.
        disable_bucketing=not first,
    )


def _accumulate_gradients_in_products(chunk: GPTModel) -> None:
    """Where there is a kernel for it (Apex's, the CPU's stand-in): saves a pass over each weight.

    Not by the model's configuration: megatron's DistributedDataParallel gives weights the
    `main_grad` that is added to, DeepSpeed does not.
    """
    for module in chunk.modules():
        if hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = layers._grad_accum_fusion_available


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
        fp16=training.precision == "fp16",
        params_dtype=DTYPES[training.precision],
        loss_scale=optimizer.loss_scale,
        initial_loss_scale=optimizer.initial_loss_scale,
        min_loss_scale=optimizer.min_loss_scale,
        loss_scale_window=optimizer.loss_scale_window,
        hysteresis=optimizer.hysteresis,
        use_distributed_optimizer=layout.use_distributed_optimizer,
        overlap_param_gather=layout.overlap_param_gather,
    )


def _decay_groups(layout: Layout, optimizer: OptimizerSection) -> dict[ParamKey, Any]:
    """What megatron-core makes a group without decay of, instead of its own choice."""

    def spared(parameter: torch.nn.Parameter, name: str) -> bool:
        return not decays(name, parameter, optimizer, layout)

    key = ParamKey(with_name_predicate=ParamWithNamePredicate("without_decay", spared))
    return {key: {"wd_mult": 0.0}}


def _forward_step(
    tokens: Tensor, batches: Iterator[Batch], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Any]]]]:
    batch = next(batches)
    output = model(batch.tokens, batch.position_ids, None, labels=batch.labels)
    return output, partial(_loss, batch.loss_mask, tokens)


def _loss(loss_mask: Tensor, tokens: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = masked_mean(losses, loss_mask, tokens)
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
