"""What a training loop may ask of an engine. Import only after `Device.adapt_megatron()`."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from internlm_lib.data.batches import Batch


@dataclass(frozen=True)
class StepResult:
    """Equal on every rank, but for `seconds`."""

    loss: float
    """Nats per token, mean over the global batch."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Where this rank's time went: see `Stopwatch.seconds`."""


class Engine(Protocol):
    """One way to take a training step; built around one rank's part of the model."""

    def train_step(self, batches: Iterator[Batch], num_micro_batches: int, lr: float) -> StepResult:
        """Forward, backward, clip and update with learning rate `lr`. Collective."""

    def validation_loss(self, batches: Iterator[Batch], num_micro_batches: int) -> float:
        """Mean loss in nats per token, without an update. Collective."""

    def whole_weights(self) -> AbstractContextManager[GPTModel]:
        """This rank's part of the model with every parameter in its full shape, to be saved.

        Collective, as is the end of the block.
        """


def masked_mean(losses: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean of per-token losses [b, s] in float32 over tokens whose mask is 1."""
    losses, mask = losses.float().view(-1), loss_mask.view(-1)
    return torch.sum(losses * mask) / mask.sum()


def decays(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to biases and norm weights, as Megatron-LM."""
    return not name.endswith(".bias") and parameter.ndim > 1
