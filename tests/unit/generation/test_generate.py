"""Greedy decoding, token by token the same as transformers', and its limits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from internlm_lib.errors import InputError
from internlm_lib.generation.generate import generate_greedy, pad

VOCAB_SIZE = 50
PROMPTS = [[1, 7, 9], [1, 30, 4, 5, 6, 22, 17], [1], [1, 44, 3]]


@pytest.fixture
def model(random_model: Callable[[int], Any]) -> Any:
    return random_model(VOCAB_SIZE)


def theirs(model: Any, prompt: list[int], eos_id: int, new: int) -> list[int]:
    output = model.llama.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=new,
        do_sample=False, use_cache=False, eos_token_id=eos_id, pad_token_id=0,
    )  # fmt: skip
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def generate(model: Any, prompts: list[list[int]], **changes: Any) -> list[list[int]]:
    settings = {"eos_id": VOCAB_SIZE, "max_new_tokens": 20, "max_length": model.max_length}
    return generate_greedy(model.logits, prompts, **(settings | changes))


def test_a_batch_of_unequal_prompts_gives_transformers_tokens(model: Any) -> None:
    ours = generate(model, PROMPTS)
    assert ours == [theirs(model, prompt, VOCAB_SIZE, 20) for prompt in PROMPTS]
    assert all(len(ids) == 20 for ids in ours)
    assert len({tuple(ids) for ids in ours}) > 1


def test_the_end_token_ends_one_text_and_not_the_others(model: Any) -> None:
    unbounded = generate(model, PROMPTS)
    # Something that one prompt's text holds in the middle, and another's never.
    eos_id = next(t for t in unbounded[0][2:] if any(t not in ids for ids in unbounded))
    ours = generate(model, PROMPTS, eos_id=eos_id)
    assert ours == [theirs(model, prompt, eos_id, 20) for prompt in PROMPTS]
    assert len(ours[0]) < 20 and eos_id not in ours[0]
    assert max(map(len, ours)) == 20


def test_finished_texts_are_not_computed_further(model: Any) -> None:
    whole = generate(model, PROMPTS[:2], max_new_tokens=6)
    model.rows = 0
    first = whole[0]
    ours = generate(model, PROMPTS[:2], max_new_tokens=6, is_complete=lambda new: new == first[:2])
    assert ours == [first[:2], whole[1]]
    assert model.rows == 2 + 6


def test_ids_without_a_piece_are_never_chosen(model: Any) -> None:
    free = generate(model, PROMPTS)
    limit = max(token for ids in free for token in ids)
    ours = generate(model, PROMPTS, vocab_size=limit)
    assert max(token for ids in ours for token in ids) < limit


def test_the_last_position_is_used_and_none_beyond(model: Any) -> None:
    prompt = [1] * (model.max_length - 3)
    assert len(generate(model, [prompt], max_new_tokens=3)[0]) == 3
    with pytest.raises(
        InputError, match=r"prompt 2: 93 tokens and .* = 4 exceed .* = 96; .* 3 tok"
    ):
        generate(model, [[1], prompt], max_new_tokens=4)


def test_an_empty_prompt_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="prompt 2 has no tokens"):
        generate(model, [[1], []])


def test_padding_keeps_rows_on_the_left() -> None:
    assert pad([[5, 6], [7]]).tolist() == [[5, 6], [7, 0]]
