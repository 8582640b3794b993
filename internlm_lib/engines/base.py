"""What a training loop may ask of an engine. Import only after `Device.adapt_megatron()`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from internlm_lib.data.batches import Batch
from internlm_lib.engines.fragments import Fragment
from internlm_lib.experiment.schema import Layout, OptimizerSection


@dataclass(frozen=True)
class StepResult:
    """Equal on every rank, but for `seconds`."""

    loss: float
    """Nats per token, mean over the global batch's tokens that are trained."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping, measured with `clip_grad` 0 too; of a
    gradient that is not finite, infinity or NaN."""
    skipped: bool = False
    """Refused, or the gradient was not finite: the weights and the optimizer are as they were."""
    loss_scale: float | None = None
    """What the loss was multiplied by for this step's backward pass; None without fp16."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Where this rank's time went: see `Stopwatch.seconds`."""


Accept = Callable[[float], bool]
"""Told the mean loss of a step before the update; False leaves the weights as they are."""


def always(loss: float) -> bool:
    return True


class Engine(Protocol):
    """One way to take a training step; built around one rank's part of the model."""

    def train_step(
        self, batches: Iterator[Batch], num_micro_batches: int, lr: float, accept: Accept = always
    ) -> StepResult:
        """Forward, backward, clip and, if `accept` does, update with learning rate `lr`; a gradient
        that is not finite is left out on every rank. Collective."""

    def validation_loss(self, batches: Iterator[Batch], num_micro_batches: int) -> float:
        """Mean loss in nats per trained token, without an update. Collective."""

    def whole_weights(self) -> AbstractContextManager[list[GPTModel]]:
        """This rank's part of the model with every parameter in its full shape, to be saved.

        One GPTModel, or the chunks of an interleaved layout. Collective, as is the end of the
        block.
        """

    def fragments(self) -> Iterator[Fragment]:
        """All that this rank's optimizer keeps of its parameters; of a new one, zero moments."""

    def counters(self) -> dict[str, Any]:
        """What an exact resume needs beside the fragments, as JSON: Adam's step, loss scaling."""

    def set_counters(self, counters: Mapping[str, Any]) -> None:
        """Take over what another engine's `counters` gave; call it after filling `fragments`."""


def trained_tokens(batches: Sequence[Batch]) -> Tensor:
    """Tokens whose loss counts, as a mean over the micro-batches of a step. float32 scalar.

    Args:
        batches: all micro-batches of this data parallel rank. Collective over these ranks.
    """
    counts = torch.stack([batch.loss_mask.sum() for batch in batches])
    total = counts.sum(dtype=torch.int32)
    ranks = parallel_state.get_data_parallel_world_size()
    if ranks > 1:
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return torch.tensor(
        int(total) / (len(batches) * ranks), dtype=torch.float32, device=total.device
    )


def masked_mean(losses: Tensor, loss_mask: Tensor, tokens: Tensor) -> Tensor:
    """Sum of per-token losses [b, s] in float32 where the mask is 1, divided by `tokens`.

    With `trained_tokens`, the mean of this over micro-batches and data parallel ranks, and with it
    the gradient, is that over the step's trained tokens, however they are spread; where all
    micro-batches train equally many it is each one's mean.
    """
    losses, mask = losses.float().view(-1), loss_mask.view(-1)
    return torch.sum(losses * mask) / tokens


def decays(
    name: str, parameter: torch.nn.Parameter, optimizer: OptimizerSection, layout: Layout
) -> bool:
    """Whether weight decay applies to a parameter: to matrices, as Megatron-LM.

    With `predecessor_decay` to norm weights too, but for DeepSpeed with sequence parallelism: so
    did AscendSpeed, whose rule knows only biases and torch's LayerNorm. Never to biases.
    """
    if name.endswith(".bias"):
        return False
    set_apart = layout.engine == "deepspeed" and layout.sequence_parallel
    return parameter.ndim > 1 or (optimizer.predecessor_decay and not set_apart)
