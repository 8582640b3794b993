"""One rank decides what a parallel model computes, the others follow.

A `ParallelModel` is collective, but an evaluation harness runs in one process. Rank 0 hands it a
`Driver`; the other ranks sit in `serve` until the driver is closed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from internlm_lib.generation.parallel_model import ParallelModel

_CLOSE, _LOGITS, _SCORE = range(3)
_HEADER = 5
"""Integers sent ahead of a call: what to do, then the shapes of tokens and of places."""


class Driver:
    """A `LanguageModel` whose calls on rank 0 make all ranks compute. See `driving`."""

    def __init__(self, model: ParallelModel) -> None:
        self._model = model

    @property
    def max_length(self) -> int:
        return self._model.max_length

    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            positions = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
        _announce(self._model, _LOGITS, tokens, positions)
        return self._model.logits(tokens, positions)

    def score(
        self, tokens: Tensor, rows: Tensor, positions: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        places = torch.stack([rows, positions, targets])
        _announce(self._model, _SCORE, tokens, places)
        return self._model.score(tokens, *places)


@contextmanager
def driving(model: ParallelModel) -> Iterator[Driver]:
    """Rank 0's side: a driver for the block; afterwards the other ranks' `serve` returns.

    Not after an error: the job then ends as a whole, and waiting ranks with it.
    """
    yield Driver(model)
    nothing = torch.empty(0, 0, dtype=torch.int64)
    _announce(model, _CLOSE, nothing, nothing)


def serve(model: ParallelModel) -> None:
    """The other ranks' side: compute whatever rank 0 does, until it closes its driver."""
    while True:
        call, *sizes = _broadcast(torch.empty(_HEADER, dtype=torch.int64), model).tolist()
        if call == _CLOSE:
            return
        tokens, places = (
            _broadcast(torch.empty(shape, dtype=torch.int64), model)
            for shape in (sizes[:2], sizes[2:])
        )
        if call == _LOGITS:
            model.logits(tokens, places)
        else:
            model.score(tokens, *places)


def _announce(model: ParallelModel, call: int, tokens: Tensor, places: Tensor) -> None:
    _broadcast(torch.tensor([call, *tokens.shape, *places.shape]), model)
    if call != _CLOSE:
        _broadcast(tokens, model)
        _broadcast(places, model)


def _broadcast(value: Tensor, model: ParallelModel) -> Tensor:
    """Rank 0's value on every rank, by way of the model's device, which the backend can reach."""
    value = value.to(model.device).contiguous()
    torch.distributed.broadcast(value, src=0)
    return value
