"""A GPTModel split over tensor and pipeline parallel ranks, run forward as one model.

Every method is collective: all ranks call it with equal arguments, and all get the result. There
is no key-value cache: each call computes its rows anew. Import after `Device.adapt_megatron()`.
"""

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor

from internlm_lib.experiment.schema import ModelSection

_SCORED_AT_ONCE = 1024
"""Positions whose scores over the vocabulary are copied at a time, to bound that copy."""


class ParallelModel:
    """A `LanguageModel` over this rank's part of a GPTModel (one without sequence parallelism)."""

    def __init__(self, gpt: GPTModel, model: ModelSection) -> None:
        """Puts `gpt` into evaluation mode."""
        self.gpt = gpt.eval()
        self._model = model

    @property
    def max_length(self) -> int:
        return self._model.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return next(self.gpt.parameters()).device

    @torch.no_grad()
    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """See `LanguageModel.logits`; the result is on this rank's device."""
        tokens = tokens.to(self.device)
        shard = self._forward(tokens)
        length = tokens.shape[1] if positions is None else positions.shape[1]
        full = None
        if shard is not None:
            if positions is not None:
                rows = torch.arange(tokens.shape[0], device=self.device).unsqueeze(1)
                shard = shard[rows, positions.to(self.device)]
            full = gather_from_tensor_model_parallel_region(shard)
            full = full[..., : self._model.vocab_size].float().contiguous()
        return self._from_last_stage(full, (tokens.shape[0], length, self._model.vocab_size))

    @torch.no_grad()
    def score(
        self, tokens: Tensor, rows: Tensor, positions: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `LanguageModel.score`; the results are on this rank's device."""
        shard = self._forward(tokens.to(self.device))
        scores = None
        if shard is not None:
            places = torch.stack([rows, positions, targets]).to(self.device)
            parts = places.split(_SCORED_AT_ONCE, dim=1)
            scores = torch.cat([_score(self._unpadded(shard[r, p]), t) for r, p, t in parts], dim=1)
        log_probs, greedy = self._from_last_stage(scores, (2, len(targets)))
        return log_probs, greedy.bool()

    def _forward(self, tokens: Tensor) -> Tensor | None:
        """This rank's share of the vocabulary, [b, s, V/tp], on the last stage; None elsewhere."""
        if not parallel_state.is_pipeline_first_stage():
            self.gpt.set_input_tensor(self._receive(tokens))
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        output: Tensor = self.gpt(tokens, positions, None)
        if parallel_state.is_pipeline_last_stage():
            return output
        torch.distributed.send(
            output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank()
        )
        return None

    def _receive(self, tokens: Tensor) -> Tensor:
        """Hidden states of the stage before, [s, b, hidden_size]."""
        batch, length = tokens.shape
        shape = (length, batch, self._model.hidden_size)
        hidden = torch.empty(shape, dtype=self.gpt.config.pipeline_dtype, device=tokens.device)
        torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        return hidden

    def _from_last_stage(self, value: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """What the last stage holds, float32 of `shape`, on every stage."""
        if value is None:
            value = torch.empty(shape, dtype=torch.float32, device=self.device)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.broadcast(
                value,
                parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        return value

    def _unpadded(self, shard: Tensor) -> Tensor:
        """`shard` [n, V/tp] in float32, its columns beyond the vocabulary ruled out."""
        first = parallel_state.get_tensor_model_parallel_rank() * shard.shape[-1]
        ids = torch.arange(first, first + shard.shape[-1], device=shard.device)
        return shard.float().masked_fill(ids >= self._model.vocab_size, float("-inf"))


def _score(shard: Tensor, targets: Tensor) -> Tensor:
    """Log-probability and greediness of the targets, float32 [2, n]; overwrites `shard`."""
    greedy = _most_likely(shard) == targets
    # Its name notwithstanding it is the plain -log p per position, and it computes in place.
    losses = vocab_parallel_cross_entropy(shard, targets)
    return torch.stack([-losses, greedy.float()])


def _most_likely(shard: Tensor) -> Tensor:
    """Ids of the highest scores over all vocabulary shards, int64 [n]; the lowest of equals."""
    highest, column = shard.max(dim=-1, keepdim=True)
    first = parallel_state.get_tensor_model_parallel_rank() * shard.shape[-1]
    all_highest = gather_from_tensor_model_parallel_region(highest)
    all_ids = gather_from_tensor_model_parallel_region(column + first)
    return all_ids.gather(-1, all_highest.argmax(dim=-1, keepdim=True)).squeeze(-1)
