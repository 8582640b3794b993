"""The training loop: the same for every engine, device and layout."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from internlm_lib.data.batches import Ahead, BatchStream
from internlm_lib.devices import Device
from internlm_lib.engines.base import Engine
from internlm_lib.errors import KitError
from internlm_lib.experiment.schema import Layout, TrainingSection
from internlm_lib.training.schedule import learning_rate

Record = Callable[..., None]
"""`Journal.write` on rank 0, nothing on the others."""


@dataclass(frozen=True)
class Throughput:
    """Turns step seconds into rates per device."""

    tokens_per_step: int
    world_size: int
    flops_per_token: float
    """Model FLOPs of one token, forward and backward: see `model.arithmetic`."""

    def rates(self, step_seconds: float) -> dict[str, float]:
        tokens = self.tokens_per_step / step_seconds / self.world_size
        return {
            "tokens_per_second_per_device": tokens,
            "model_tflops_per_device": tokens * self.flops_per_token / 1e12,
        }


def train(
    engine: Engine,
    batches: BatchStream | Ahead,
    validation: BatchStream | None,
    *,
    training: TrainingSection,
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
        KitError: the loss is no longer finite.
    """
    accumulate = training.num_micro_batches(layout)
    for step in range(1, training.train_iters + 1):
        lr = learning_rate(training, step)
        device.synchronize()
        begin = time.perf_counter()
        result = engine.train_step(batches.step(step - 1), accumulate, lr)
        device.synchronize()
        seconds = time.perf_counter() - begin
        record(
            "step", step=step, loss=result.loss, grad_norm=result.grad_norm, lr=lr,
            step_seconds=seconds, memory_bytes=device.peak_memory_bytes(),
            **throughput.rates(seconds), **result.seconds,
        )  # fmt: skip
        if not math.isfinite(result.loss):
            raise KitError(
                f"step {step}: the loss is {result.loss} (gradient norm {result.grad_norm}, lr "
                f"{lr:g}); lower training.lr, lengthen the warm-up or lower optimizer.clip_grad"
            )
        if validation and step % training.eval_interval == 0:
            first = (step // training.eval_interval - 1) * training.eval_iters
            losses = [
                engine.validation_loss(validation.step(i), accumulate)
                for i in range(first, first + training.eval_iters)
            ]
            record("validation", step=step, loss=sum(losses) / len(losses))
        due = training.save_interval is not None and step % training.save_interval == 0
        if due and step < training.train_iters:
            save(step)
