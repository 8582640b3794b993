"""The training loop: the same for every engine, device and layout."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.models.gpt import GPTModel

from internlm_lib.data.batches import Ahead, BatchStream
from internlm_lib.devices import Device, Memory
from internlm_lib.engines.base import Engine, StepResult
from internlm_lib.errors import KitError, RollbackError, StoppedError
from internlm_lib.experiment.schema import Layout, OptimizerSection, TrainingSection
from internlm_lib.training.agreement import any_rank
from internlm_lib.training.checkpoint import CheckpointWriter, Position
from internlm_lib.training.guard import StepGuard
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


@dataclass
class TrainingLoop:
    """What a training works with; `run` takes all its steps. Every rank has one."""

    engine: Engine
    chunks: list[GPTModel]
    batches: BatchStream | Ahead
    validation: BatchStream | None
    training: TrainingSection
    optimizer: OptimizerSection
    layout: Layout
    device: Device
    throughput: Throughput
    record: Record
    checkpoints: CheckpointWriter
    facts: Mapping[str, Any]
    """What a checkpoint says beside its position: hashes of experiment, data and weights."""
    guard: StepGuard
    stop_requested: Callable[[], bool]
    position: Position = Position()
    validated: tuple[int, float] | None = None
    """Step and loss of the latest validation."""

    def run(self) -> None:
        """Take the steps that are left, recording each.

        Raises:
            KitError: a loss or gradient is not finite, or a spike, and the policy is to stop; or
                the gradient overflows at the lowest loss scale.
            RollbackError: … to go back to the last checkpoint.
            StoppedError: asked to stop; the state after the last step has been saved.
        """
        while self.position.step < self.training.train_iters:
            self._take_step(self.position.step + 1)
            if self.validation and self.position.step % self.training.eval_interval == 0:
                self._validate(self.validation)
            self._save_if_due()
            self.checkpoints.poll()
            self._stop_if_asked()
        self.checkpoints.finish()

    def _take_step(self, step: int) -> None:
        """Take optimizer step `step`, leaving out batches that are refused."""
        size = self.training.batch_size(step)
        lr = learning_rate(self.training, step, self.position.skipped_samples)
        while True:
            self.device.synchronize()
            begin = time.perf_counter()
            result = self.engine.train_step(
                self.batches.samples(self.position.consumed_samples, size),
                self.training.num_micro_batches(self.layout, step),
                lr,
                accept=lambda loss: not self.guard.fault(loss),
            )
            self.device.synchronize()
            seconds = time.perf_counter() - begin
            consumed = self.position.consumed_samples + size
            self.position = replace(self.position, consumed_samples=consumed)
            if not result.skipped or self._is_overflow(step, result):
                break
            self._refuse(step, result)
        self.guard.accepted(result.loss)
        skipped = self.position.skipped_samples + (size if result.skipped else 0)
        self.position = replace(self.position, step=step, skipped_samples=skipped)
        self.record(
            "step", step=step, loss=result.loss, grad_norm=result.grad_norm, lr=lr,
            step_seconds=seconds, **_memory_fields(self.device.memory()),
            **self.throughput.rates(size * self.training.seq_length, seconds),
            **_particulars(self.training, size, result), **result.seconds,
        )  # fmt: skip

    def _is_overflow(self, step: int, result: StepResult) -> bool:
        """Whether fp16 was too small for the gradient: a smaller loss scale mends that.

        Raises KitError if the scale may not be lowered.
        """
        if result.loss_scale is None or self.guard.fault(result.loss):
            return False
        if result.loss_scale <= (self.optimizer.loss_scale or self.optimizer.min_loss_scale):
            raise KitError(
                f"step {step}: the gradient overflows fp16 at a loss scale of "
                f"{result.loss_scale:g}, and it may not be lowered (the loss is {result.loss}); "
                "lower optimizer.loss_scale or min_loss_scale, lower training.lr, or train in bf16"
            )
        return True

    def _refuse(self, step: int, result: StepResult) -> None:
        """Do with a step that was not applied what `training.bad_step_policy` says."""
        policy = self.training.bad_step_policy
        fault = self.guard.fault(result.loss) or f"the gradient norm is {result.grad_norm}"
        self.record(
            "bad_step", step=step, loss=result.loss, grad_norm=result.grad_norm, fault=fault,
            policy=policy, consumed_samples=self.position.consumed_samples,
        )  # fmt: skip
        if policy == "stop":
            raise KitError(
                f"step {step}: {fault} (gradient norm {result.grad_norm:.4g}); the weights were "
                "left as they were. Lower training.lr, lengthen the warm-up or lower "
                "optimizer.clip_grad; or set training.bad_step_policy to skip_batch or rollback"
            )
        if policy == "rollback":
            self.checkpoints.finish()
            raise RollbackError(f"step {step}: {fault}; going back to the last checkpoint")
        self.guard.refused()

    def _validate(self, validation: BatchStream) -> None:
        step = self.position.step
        first = (step // self.training.eval_interval - 1) * self.training.eval_iters
        loss = held_out_loss(self.engine, validation, first, self.training, self.layout)
        self.validated = (step, loss)
        self.record("validation", step=step, loss=loss)

    def _save_if_due(self) -> None:
        step, interval = self.position.step, self.training.save_interval
        if interval is not None and step % interval == 0 and step < self.training.train_iters:
            self._save()

    def _save(self) -> None:
        best = self._is_best()
        if best and self.validated:
            self.position = replace(self.position, best_loss=self.validated[1])
        facts = {**self.facts, "best": best, "recent_losses": list(self.guard.recent)}
        self.checkpoints.save(self.engine, self.chunks, self.position, facts)

    def _is_best(self) -> bool:
        """Whether these weights have been validated, and no saved ones had a lower loss."""
        if self.validated is None or self.validated[0] != self.position.step:
            return False
        return self.position.best_loss is None or self.validated[1] < self.position.best_loss

    def _stop_if_asked(self) -> None:
        (asked,) = any_rank(self.device.current(), self.stop_requested())
        if not asked or self.position.step == self.training.train_iters:
            return
        self._save()
        self.checkpoints.finish()
        self.record("end", status="stopped", step=self.position.step)
        raise StoppedError(
            f"stopped as asked after step {self.position.step}; its state is saved, and the same "
            "command goes on from there"
        )


def held_out_loss(
    engine: Engine, batches: BatchStream, first: int, training: TrainingSection, layout: Layout
) -> float:
    """Mean loss over `eval_iters` full batches from batch `first` on, in nats per token."""
    losses = [
        engine.validation_loss(batches.step(index), training.num_micro_batches(layout))
        for index in range(first, first + training.eval_iters)
    ]
    return sum(losses) / len(losses)


def _memory_fields(memory: Memory) -> dict[str, int]:
    """`memory_bytes`, the peak, has its name from journals that held no other number."""
    fields = {
        "memory_bytes": memory.peak_bytes,
        "memory_allocated_bytes": memory.allocated_bytes,
    }
    if memory.reserved_bytes is not None:
        fields["memory_reserved_bytes"] = memory.reserved_bytes
    return fields


def _particulars(training: TrainingSection, size: int, result: StepResult) -> dict[str, Any]:
    """Fields of a step that only some trainings have."""
    fields: dict[str, Any] = {}
    if training.rampup_batch_size:
        fields |= {"global_batch_size": size, "tokens": size * training.seq_length}
    if result.loss_scale is not None:
        fields |= {"loss_scale": result.loss_scale, "skipped": result.skipped}
    return fields
