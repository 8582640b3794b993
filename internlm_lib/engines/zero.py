"""DeepSpeed ZeRO 1, 2 and 3 as an engine, around the same GPTModel; tensor parallelism through mpu.

Import only after `Device.adapt_megatron()`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.grad_scaler import (
    ConstantGradScaler,
    DynamicGradScaler,
    MegatronGradScaler,
)
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
from internlm_lib.engines.stopwatch import Stopwatch
from internlm_lib.engines.zero_state import fragments, torch_optimizer
from internlm_lib.experiment.schema import Layout, OptimizerSection, TrainingSection


class ZeroEngine:
    def __init__(
        self,
        gpt: GPTModel,
        layout: Layout,
        training: TrainingSection,
        optimizer: OptimizerSection,
    ) -> None:
        self._gpt = gpt
        self._stage = layout.zero_stage
        self._batch_unit = training.micro_batch_size * layout.data_parallel_size
        self._grad_scaler = _grad_scaler(optimizer) if training.precision == "fp16" else None
        _sum_sequence_parallel_gradients(gpt)
        deepspeed = _deepspeed_without_compiler()
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=gpt,
            optimizer=torch.optim.AdamW(
                _parameter_groups(gpt, optimizer, layout),
                lr=training.lr,
                betas=(optimizer.adam_beta1, optimizer.adam_beta2),
                eps=optimizer.adam_eps,
                fused=True,  # on every device: torch_npu brings a kernel, too
            ),
            config=_deepspeed_config(layout, training, optimizer, gpt.config.hidden_size),
            mpu=_Topology(),
        )

    def train_step(
        self, batches: Iterator[Batch], num_micro_batches: int, lr: float, accept: Accept = always
    ) -> StepResult:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        scale = self._set_loss_scale()
        self._engine.set_train_batch_size(num_micro_batches * self._batch_unit)
        losses: list[Tensor] = []
        mean, accepted, watch = math.nan, True, Stopwatch()
        with watch.part("forward_backward"):
            step = list(islice(watch.data(batches), num_micro_batches))
            tokens = trained_tokens(step)
        for index, batch in enumerate(step):
            # DeepSpeed counts micro-batches from the first step on, as if all had equally many.
            self._engine.set_gradient_accumulation_boundary(index == num_micro_batches - 1)
            with watch.part("forward_backward"):
                loss = self._loss(batch, tokens)
                losses.append(loss.detach().clone())
                if index == num_micro_batches - 1:
                    mean = _mean_over_job(losses)
                    accepted = accept(mean)
                    if not accepted:
                        # DeepSpeed cannot be told to leave out an update, except by a gradient that
                        # is not finite, which it drops on every rank.
                        loss = loss * math.nan
                self._engine.backward(loss)
            with watch.part("optimizer"):
                self._engine.step()
        overflow = bool(self._engine.optimizer.overflow)
        if self._grad_scaler:
            self._grad_scaler.update(overflow and accepted)
        norm = float(self._engine.get_global_grad_norm())
        return StepResult(mean, norm, overflow, scale, watch.seconds())

    def _set_loss_scale(self) -> float | None:
        """Megatron's scaler decides, so that both engines scale alike.

        DeepSpeed's own doubles the scale between measuring a gradient and dividing it by the scale,
        doubles it one step later, and raises where Megatron stays at the minimum.
        """
        if self._grad_scaler is None:
            return None
        scale = float(self._grad_scaler.scale)
        self._engine.optimizer.override_loss_scale(scale)
        return scale

    def validation_loss(self, batches: Iterator[Batch], num_micro_batches: int) -> float:
        self._engine.eval()
        step = list(islice(batches, num_micro_batches))
        tokens = trained_tokens(step)
        with torch.no_grad():
            losses = [self._loss(batch, tokens) for batch in step]
        self._engine.train()
        return _mean_over_job(losses)

    @contextmanager
    def whole_weights(self) -> Iterator[list[GPTModel]]:
        import deepspeed

        partitioned = list(self._gpt.parameters()) if self._stage == 3 else []
        with deepspeed.zero.GatheredParameters(partitioned):
            yield [self._gpt]

    def fragments(self) -> Iterator[Fragment]:
        return fragments(self._optimizer, list(self._gpt.parameters()), self._stage)

    def counters(self) -> dict[str, Any]:
        step = adam_step([torch_optimizer(self._optimizer)])
        return {"adam_step": step, **scaler_counters(self._grad_scaler)}

    def set_counters(self, counters: Mapping[str, Any]) -> None:
        set_adam_step([torch_optimizer(self._optimizer)], counters["adam_step"])
        set_scaler_counters(self._grad_scaler, counters)

    def _loss(self, batch: Batch, tokens: Tensor) -> Tensor:
        losses = self._engine(batch.tokens, batch.position_ids, None, labels=batch.labels)
        return masked_mean(losses, batch.loss_mask, tokens)


def _deepspeed_without_compiler() -> Any:
    """DeepSpeed, without the shared-memory collectives it would compile on first use on a CPU."""
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if get_accelerator().device_name() == "cpu":
        # It refuses fp16 where oneDNN is not fast at it; torch's own kernels do compute it.
        get_accelerator().is_fp16_supported = lambda: True
    return deepspeed


def _parameter_groups(
    gpt: GPTModel, optimizer: OptimizerSection, layout: Layout
) -> list[dict[str, Any]]:
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in gpt.named_parameters():
        groups[decays(name, parameter, optimizer, layout)].append(parameter)
    return [
        {"params": groups[True], "weight_decay": optimizer.weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def _grad_scaler(optimizer: OptimizerSection) -> MegatronGradScaler:
    """As `get_megatron_optimizer` makes it for fp16."""
    if optimizer.loss_scale is not None:
        return ConstantGradScaler(optimizer.loss_scale)
    return DynamicGradScaler(
        initial_scale=optimizer.initial_loss_scale,
        min_scale=optimizer.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=optimizer.loss_scale_window,
        hysteresis=optimizer.hysteresis,
    )


def _deepspeed_config(
    layout: Layout, training: TrainingSection, optimizer: OptimizerSection, hidden_size: int
) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.num_micro_batches(layout),
        # The predecessor's config lacked this key, so its --clip-grad did nothing.
        "gradient_clipping": optimizer.clip_grad,
        "bf16": {"enabled": training.precision == "bf16", "check_grad_overflow": True},
        # A static scale of 1: the engine overrides it step by step.
        "fp16": {"enabled": training.precision == "fp16", "loss_scale": 1.0},
        "data_types": {"grad_accum_dtype": "fp32"},
        # Else gradients are summed over ranks in the precision of the model.
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": layout.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            # As Hugging Face chooses it: norms and biases stay whole, matrices of any size do not.
            "stage3_param_persistence_threshold": 10 * hidden_size,
        },
        "steps_per_print": 10**9,
    }


def _sum_sequence_parallel_gradients(gpt: GPTModel) -> None:
    """Sum gradients of norms and o biases over tensor parallel ranks, which each saw a part of the
    sequence; DeepSpeed knows nothing of that. The hooks run before its own reduction."""
    group = parallel_state.get_tensor_model_parallel_group()

    def add_up(gradient: Tensor) -> Tensor:
        torch.distributed.all_reduce(gradient, group=group)
        return gradient

    for parameter in gpt.parameters():
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(add_up)


def _mean_over_job(losses: list[Tensor]) -> float:
    mean = torch.stack(losses).mean()
    torch.distributed.all_reduce(mean, group=parallel_state.get_data_parallel_group())
    return float(mean) / parallel_state.get_data_parallel_world_size()


class _Topology:
    """megatron-core's process groups under the names DeepSpeed asks an `mpu` for."""

    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
