"""Log-likelihoods of continuations, with as few and as short rows as possible.

The options of a question share their context, and a causal model's scores at a position do not
depend on what follows. So a row that begins a longer row needs no pass of its own: the four
letters after one prompt cost one row, and so do answers of a single token beside a longer one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from internlm_lib.errors import InputError
from internlm_lib.generation.generate import pad
from internlm_lib.generation.language_model import LanguageModel

Row = tuple[int, ...]


@dataclass(frozen=True)
class Continuation:
    """Token ids that follow a context; both have at least one."""

    context: Row
    target: Row

    @property
    def row(self) -> Row:
        """What the model must read: all but the last token, after which nothing is asked."""
        return (*self.context, *self.target[:-1])

    @property
    def first(self) -> int:
        """Position in the row at which the first target token is predicted."""
        return len(self.context) - 1


def log_likelihoods(
    model: LanguageModel,
    continuations: Sequence[Continuation],
    batch_size: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[float, bool]]:
    """Log-probability in nats of each continuation, and whether greedy decoding would give it.

    Args:
        batch_size: rows per forward pass; the longest rows come first.
        on_progress: told the rows done and all rows after each pass.
    """
    results: list[tuple[float, bool]] = [(0.0, True)] * len(continuations)
    users = _users(continuations)
    rows = sorted(users, key=len, reverse=True)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        chosen = [[(i, continuations[i]) for i in users[row]] for row in batch]
        for i, result in _score_batch(model, batch, chosen):
            results[i] = result
        on_progress(start + len(batch), len(rows))
    return results


def fit_context(context: Sequence[int], new_tokens: int, max_length: int) -> Row:
    """A context that leaves room for `new_tokens` behind it.

    Of one too long, the first token (`<s>`) is kept, and those after it are dropped.

    Raises InputError if `new_tokens` leave no room for any context.
    """
    room = max_length - new_tokens
    if room < 1:
        raise InputError(
            f"{new_tokens} new tokens leave no room for a context within "
            f"model.max_position_embeddings = {max_length}; shorten the options, or lower the "
            "task's max_gen_toks"
        )
    if len(context) <= room:
        return tuple(context)
    return (context[0], *context[len(context) - room + 1 :])


def _users(continuations: Sequence[Continuation]) -> dict[Row, list[int]]:
    """Row to compute → numbers of the continuations that can be read off it."""
    covering = _covering({c.row for c in continuations})
    users: dict[Row, list[int]] = {}
    for i, continuation in enumerate(continuations):
        users.setdefault(covering[continuation.row], []).append(i)
    return users


def _covering(rows: set[Row]) -> dict[Row, Row]:
    """Each row → a row that begins with it and that no other row begins with."""
    covering: dict[Row, Row] = {}
    following: Row = ()
    # In sorted order, whatever begins with a row stands directly behind it.
    for row in sorted(rows, reverse=True):
        covering[row] = covering[following] if following[: len(row)] == row else row
        following = row
    return covering


def _score_batch(
    model: LanguageModel, rows: Sequence[Row], chosen: Sequence[Sequence[tuple[int, Continuation]]]
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Number and result of every continuation that is read off these rows."""
    numbers = [i for row in chosen for i, _ in row]
    lengths = [len(c.target) for row in chosen for _, c in row]
    places = [
        (row, c.first + offset, token)
        for row, continuations in enumerate(chosen)
        for _, c in continuations
        for offset, token in enumerate(c.target)
    ]
    log_probs, greedy = model.score(pad(rows), *torch.tensor(places).T)
    parts = zip(log_probs.double().split(lengths), greedy.split(lengths), strict=True)
    for i, (part, is_greedy) in zip(numbers, parts, strict=True):
        yield i, (part.sum().item(), bool(is_greedy.all()))
