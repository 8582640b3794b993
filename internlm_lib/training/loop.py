"""The training loop: the same for every engine, device and layout."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.nn import Module

from internlm_lib.data.batches import BatchStream
from internlm_lib.devices import Device
from internlm_lib.engines.base import Engine, StepResult
from internlm_lib.errors import KitError, RollbackError, StoppedError
from internlm_lib.experiment.schema import Layout, TrainingSection
from internlm_lib.training.agreement import any_rank
from internlm_lib.training.checkpoint import CheckpointWriter, Position
from internlm_lib.training.guard import StepGuard
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


@dataclass
class TrainingLoop:
    """What a training works with; `run` takes all its steps. Every rank has one."""

    engine: Engine
    gpt: Module
    batches: BatchStream
    validation: BatchStream | None
    training: TrainingSection
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
            KitError: a loss is not finite, or a spike, and the policy is to stop.
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
        """Take the update `step`, leaving out batches that are refused."""
        lr = learning_rate(self.training, step)
        while True:
            self.device.synchronize()
            begin = time.perf_counter()
            result = self._compute(lr)
            self.device.synchronize()
            seconds = time.perf_counter() - begin
            self._consume()
            if result.applied:
                break
            self._refuse(step, result)
        self.guard.accepted(result.loss)
        self.position = replace(self.position, step=step)
        self.record(
            "step", step=step, loss=result.loss, grad_norm=result.grad_norm, lr=lr,
            step_seconds=seconds, memory_bytes=self.device.peak_memory_bytes(),
            **self.throughput.rates(seconds),
        )  # fmt: skip

    def _compute(self, lr: float) -> StepResult:
        index = self.position.consumed_samples // self.training.global_batch_size
        return self.engine.train_step(
            self.batches.step(index),
            self.training.num_micro_batches(self.layout),
            lr,
            accept=lambda loss: not self.guard.fault(loss),
        )

    def _consume(self) -> None:
        consumed = self.position.consumed_samples + self.training.global_batch_size
        self.position = replace(self.position, consumed_samples=consumed)

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
        accumulate = self.training.num_micro_batches(self.layout)
        losses = [
            self.engine.validation_loss(validation.step(i), accumulate)
            for i in range(first, first + self.training.eval_iters)
        ]
        self.validated = (step, sum(losses) / len(losses))
        self.record("validation", step=step, loss=self.validated[1])

    def _save_if_due(self) -> None:
        step, interval = self.position.step, self.training.save_interval
        if interval is not None and step % interval == 0 and step < self.training.train_iters:
            self._save()

    def _save(self) -> None:
        best = self._is_best()
        if best and self.validated:
            self.position = replace(self.position, best_loss=self.validated[1])
        facts = {**self.facts, "best": best, "recent_losses": list(self.guard.recent)}
        self.checkpoints.save(self.engine, self.gpt, self.position, facts)

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
