"""What a training loop may ask of an engine. Import only after `Device.adapt_megatron()`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from internlm_lib.data.batches import Batch
from internlm_lib.engines.fragments import Fragment


@dataclass(frozen=True)
class StepResult:
    """Equal on every rank."""

    loss: float
    """Nats per token, mean over the global batch."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    applied: bool = True
    """False if the weights were left as they were: refused, or a gradient that is not finite."""


Accept = Callable[[float], bool]
"""Told the mean loss of a step before the update; False leaves the weights as they are."""


class Engine(Protocol):
    """One way to take a training step; built around one rank's part of the model."""

    def train_step(
        self, batches: Iterator[Batch], num_micro_batches: int, lr: float, accept: Accept
    ) -> StepResult:
        """Forward, backward, clip and, if `accept` does, update with rate `lr`. Collective."""

    def validation_loss(self, batches: Iterator[Batch], num_micro_batches: int) -> float:
        """Mean loss in nats per token, without an update. Collective."""

    def whole_weights(self) -> AbstractContextManager[GPTModel]:
        """This rank's part of the model with every parameter in its full shape, to be saved.

        Collective, as is the end of the block.
        """

    def fragments(self) -> Iterator[Fragment]:
        """All that this rank's optimizer keeps of its parameters; of a new one, zero moments."""

    def counters(self) -> dict[str, Any]:
        """What an exact resume needs beside the fragments, as JSON: Adam's step, loss scaling."""

    def set_counters(self, counters: Mapping[str, Any]) -> None:
        """Take over what another engine's `counters` gave; call it after filling `fragments`."""


def masked_mean(losses: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean of per-token losses [b, s] in float32 over tokens whose mask is 1."""
    losses, mask = losses.float().view(-1), loss_mask.view(-1)
    return torch.sum(losses * mask) / mask.sum()


def decays(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to biases and norm weights, as Megatron-LM."""
    return not name.endswith(".bias") and parameter.ndim > 1
