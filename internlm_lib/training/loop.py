"""The training loop: the same for every engine, device and layout."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from internlm_lib.data.batches import BatchStream
from internlm_lib.devices import Device
from internlm_lib.engines.base import Engine, StepResult
from internlm_lib.errors import KitError
from internlm_lib.experiment.schema import Layout, OptimizerSection, TrainingSection
from internlm_lib.training.schedule import learning_rate

Record = Callable[..., None]
"""`Journal.write` on rank 0, nothing on the others."""


@dataclass(frozen=True)
class Throughput:
    """Turns step seconds into rates per device."""

    world_size: int
    flops_per_token: float
    """Model FLOPs of one token, forward and backward: see `model.arithmetic`."""

    def rates(self, tokens_of_step: int, step_seconds: float) -> dict[str, float]:
        tokens = tokens_of_step / step_seconds / self.world_size
        return {
            "tokens_per_second_per_device": tokens,
            "model_tflops_per_device": tokens * self.flops_per_token / 1e12,
        }


def train(
    engine: Engine,
    batches: BatchStream,
    validation: BatchStream | None,
    *,
    training: TrainingSection,
    optimizer: OptimizerSection,
    layout: Layout,
    device: Device,
    throughput: Throughput,
    record: Record,
    save: Callable[[int], None],
) -> None:
    """Take all steps, recording each.

    Args:
        save: called after every `save_interval` steps but the last, with the step's number.
    Raises:
        KitError: the loss or the gradient is no longer finite (in fp16 an overflow of the gradient
            skips its update, and only one at the lowest loss scale is an error).
    """
    skipped_samples = 0
    for step in range(1, training.train_iters + 1):
        lr, size = learning_rate(training, step, skipped_samples), training.batch_size(step)
        device.synchronize()
        begin = time.perf_counter()
        result = engine.train_step(
            batches.samples(training.samples_before(step), size),
            training.num_micro_batches(layout, step),
            lr,
        )
        device.synchronize()
        seconds = time.perf_counter() - begin
        record(
            "step", step=step, loss=result.loss, grad_norm=result.grad_norm, lr=lr,
            step_seconds=seconds, memory_bytes=device.peak_memory_bytes(),
            **throughput.rates(size * training.seq_length, seconds),
            **_particulars(training, size, result),
        )  # fmt: skip
        _check_numbers(step, result, lr, optimizer)
        skipped_samples += size if result.skipped else 0
        if validation and step % training.eval_interval == 0:
            first = (step // training.eval_interval - 1) * training.eval_iters
            loss = held_out_loss(engine, validation, first, training, layout)
            record("validation", step=step, loss=loss)
        due = training.save_interval is not None and step % training.save_interval == 0
        if due and step < training.train_iters:
            save(step)


def held_out_loss(
    engine: Engine, batches: BatchStream, first: int, training: TrainingSection, layout: Layout
) -> float:
    """Mean loss over `eval_iters` full batches from batch `first` on, in nats per token."""
    losses = [
        engine.validation_loss(batches.step(index), training.num_micro_batches(layout))
        for index in range(first, first + training.eval_iters)
    ]
    return sum(losses) / len(losses)


def _particulars(training: TrainingSection, size: int, result: StepResult) -> dict[str, Any]:
    """Fields of a step that only some trainings have."""
    fields: dict[str, Any] = {}
    if training.rampup_batch_size:
        fields |= {"global_batch_size": size, "tokens": size * training.seq_length}
    if result.loss_scale is not None:
        fields |= {"loss_scale": result.loss_scale, "skipped": result.skipped}
    return fields


def _check_numbers(step: int, result: StepResult, lr: float, optimizer: OptimizerSection) -> None:
    found = f"the loss is {result.loss}, the gradient norm {result.grad_norm}, lr {lr:g}"
    if not math.isfinite(result.loss) or (result.skipped and result.loss_scale is None):
        raise KitError(
            f"step {step}: {found}; lower training.lr, lengthen the warm-up or lower "
            "optimizer.clip_grad"
        )
    lowest = optimizer.loss_scale or optimizer.min_loss_scale
    if result.skipped and result.loss_scale is not None and result.loss_scale <= lowest:
        raise KitError(
            f"step {step}: the gradient overflows fp16 at a loss scale of {result.loss_scale:g}, "
            f"and it may not be lowered ({found}); lower optimizer.loss_scale or min_loss_scale, "
            "lower training.lr, or train in bf16"
        )
