"""DeepSpeed ZeRO 1, 2 and 3 as an engine, around the same GPTModel; tensor parallelism through mpu.

Import only after `Device.adapt_megatron()`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from internlm_lib.data.batches import Batch
from internlm_lib.engines.base import StepResult, decays, masked_mean
from internlm_lib.engines.stopwatch import Stopwatch
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
        _sum_sequence_parallel_gradients(gpt)
        deepspeed = _deepspeed_without_compiler()
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=gpt,
            optimizer=torch.optim.AdamW(
                _parameter_groups(gpt, optimizer),
                lr=training.lr,
                betas=(optimizer.adam_beta1, optimizer.adam_beta2),
                eps=optimizer.adam_eps,
                # What torch has a fused kernel for; on an NPU it has none.
                fused=next(gpt.parameters()).device.type in ("cpu", "cuda"),
            ),
            config=_deepspeed_config(layout, training, optimizer, gpt.config.hidden_size),
            mpu=_Topology(),
        )

    def train_step(self, batches: Iterator[Batch], num_micro_batches: int, lr: float) -> StepResult:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        losses, watch = [], Stopwatch()
        batches = watch.data(batches)
        for _ in range(num_micro_batches):
            with watch.part("forward_backward"):
                loss = self._loss(next(batches))
                self._engine.backward(loss)
            with watch.part("optimizer"):
                self._engine.step()
            losses.append(loss.detach().clone())
        mean = _mean_over_job(losses)
        return StepResult(mean, float(self._engine.get_global_grad_norm()), watch.seconds())

    def validation_loss(self, batches: Iterator[Batch], num_micro_batches: int) -> float:
        self._engine.eval()
        with torch.no_grad():
            losses = [self._loss(next(batches)) for _ in range(num_micro_batches)]
        self._engine.train()
        return _mean_over_job(losses)

    @contextmanager
    def whole_weights(self) -> Iterator[GPTModel]:
        import deepspeed

        partitioned = list(self._gpt.parameters()) if self._stage == 3 else []
        with deepspeed.zero.GatheredParameters(partitioned):
            yield self._gpt

    def _loss(self, batch: Batch) -> Tensor:
        losses = self._engine(batch.tokens, batch.position_ids, None, labels=batch.labels)
        return masked_mean(losses, batch.loss_mask)


def _deepspeed_without_compiler() -> Any:
    """DeepSpeed, without the shared-memory collectives it would compile on first use on a CPU."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _parameter_groups(gpt: GPTModel, optimizer: OptimizerSection) -> list[dict[str, Any]]:
    named = list(gpt.named_parameters())
    return [
        {
            "params": [p for name, p in named if decays(name, p)],
            "weight_decay": optimizer.weight_decay,
        },
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]


def _deepspeed_config(
    layout: Layout, training: TrainingSection, optimizer: OptimizerSection, hidden_size: int
) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.num_micro_batches(layout),
        # The predecessor's config lacked this key, so its --clip-grad did nothing.
        "gradient_clipping": optimizer.clip_grad,
        "bf16": {"enabled": training.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
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
