"""The independent reference of a training: transformers' LLaMA in a plain PyTorch loop.

It shares neither model nor engine nor kernels with the rest: only weights, batches and learning
rates. float32, on the CPU.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from internlm_lib.data.batches import Batch, BatchStream
from internlm_lib.experiment.schema import Experiment, Layout
from internlm_lib.training.schedule import learning_rate
from internlm_lib.weights.huggingface import open_huggingface, transformers_model


class PlainLoop:
    """LlamaForCausalLM, AdamW, clip_grad_norm_, as one writes them."""

    def __init__(self, weights: Path, experiment: Experiment) -> None:
        """Args:
        weights: Hugging Face folder to start from.
        """
        settings = experiment.optimizer
        self._training, self._clip = experiment.training, settings.clip_grad
        self._model = transformers_model(open_huggingface(weights)).train()
        matrices = [p for p in self._model.parameters() if p.dim() > 1]
        others = [p for p in self._model.parameters() if p.dim() == 1]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
        )

    def step(self, batches: Iterable[Batch], number: int) -> tuple[float, float]:
        """Take step `number`, counted from 1; returns its loss, in nats per token, and the norm of
        its gradient before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._training, number)
        self._optimizer.zero_grad()
        accumulate, total = self._training.num_micro_batches(Layout()), 0.0
        for loss in self._losses(batches):
            (loss / accumulate).backward()
            total += loss.item() / accumulate
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        return total, norm.item()

    @torch.no_grad()
    def validation_loss(self, batches: Iterable[Batch]) -> float:
        found = [loss.item() for loss in self._losses(batches)]
        return sum(found) / len(found)

    def _losses(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        for batch in batches:
            logits = self._model(batch.tokens, use_cache=False).logits
            yield torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())


def train_plain(
    weights: Path, experiment: Experiment, stream: BatchStream
) -> Iterator[tuple[float, float]]:
    """Loss and gradient norm of every step of a training (see `PlainLoop.step`)."""
    loop = PlainLoop(weights, experiment)
    for number in range(1, experiment.training.train_iters + 1):
        yield loop.step(stream.step(number - 1), number)
