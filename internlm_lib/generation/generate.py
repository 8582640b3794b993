"""Greedy decoding: the most likely next token, again and again. Knows no model and no ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from internlm_lib.errors import InputError

NextTokenLogits = Callable[[Tensor, Tensor], Tensor]
"""(tokens int64 [b, s] padded on the right, positions int64 [b, 1]) → scores [b, 1, V]."""


def generate_greedy(
    logits: NextTokenLogits,
    prompts: Sequence[Sequence[int]],
    *,
    eos_id: int,
    max_new_tokens: int,
    max_length: int,
    vocab_size: int | None = None,
    is_complete: Callable[[list[int]], bool] = lambda new: False,
) -> list[list[int]]:
    """Continue every prompt until `eos_id`, `max_new_tokens`, or `is_complete`.

    Args:
        prompts: token ids, of any lengths above 0; they are computed as one batch.
        max_length: most tokens the model can read, prompt and continuation together.
        vocab_size: ids from here on (embedding rows that no piece belongs to) are never chosen.
        is_complete: told the new ids after each one; true ends that prompt's continuation.
    Returns:
        The new ids of each prompt, without `eos_id`.
    Raises:
        InputError: a prompt is empty, or leaves no room for `max_new_tokens`.
    """
    _check_room(prompts, max_new_tokens, max_length)
    continuations: list[list[int]] = [[] for _ in prompts]
    unfinished = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not unfinished:
            break
        rows = [[*prompts[i], *continuations[i]] for i in unfinished]
        tokens = pad(rows)
        last = torch.tensor([[len(row) - 1] for row in rows])
        chosen = logits(tokens, last)[:, 0, :vocab_size].argmax(dim=-1).tolist()
        still = []
        for i, token in zip(unfinished, chosen, strict=True):
            if token == eos_id:
                continue
            continuations[i].append(token)
            if not is_complete(continuations[i]):
                still.append(i)
        unfinished = still
    return continuations


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of token ids as int64 [b, s], filled with 0 on the right.

    What stands there does not matter: a causal model never looks to the right.
    """
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def _check_room(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_length: int) -> None:
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise InputError(f"prompt {number} has no tokens; give it a text, or at least <s>")
        if len(prompt) + max_new_tokens > max_length:
            raise InputError(
                f"prompt {number}: {len(prompt)} tokens and generation.max_new_tokens = "
                f"{max_new_tokens} exceed model.max_position_embeddings = {max_length}; shorten "
                f"the prompt, or generate at most {max(0, max_length - len(prompt))} tokens"
            )
