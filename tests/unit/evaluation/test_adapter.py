"""The adapter's numbers against a direct computation, one request at a time."""

from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import InputError
from internlm_lib.evaluation.adapter import InternLMAdapter
from internlm_lib.evaluation.scoring import (
    Continuation,
    fit_context,
    log_likelihoods,
)

CONTEXT = "Question: What is 2 plus 3?\nAnswer:"


@pytest.fixture
def adapter(model: Any, tokenizer: Tokenizer) -> InternLMAdapter:
    return InternLMAdapter(model, tokenizer, batch_size=3)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, i, ("t", i, 1)) for i, args in enumerate(arguments)]


def direct(model: Any, context: list[int], target: list[int]) -> tuple[float, bool]:
    """Log-probability and greediness, computed on one unpadded row."""
    with torch.no_grad():
        logits = model.llama(torch.tensor([context + target])).logits[0].double()
    predicted = logits.log_softmax(-1)[len(context) - 1 : -1]
    total = sum(predicted[i, token].item() for i, token in enumerate(target))
    return total, predicted.argmax(-1).tolist() == target


def test_loglikelihood_is_the_direct_one(
    adapter: InternLMAdapter, model: Any, tokenizer: Tokenizer
) -> None:
    pairs = [
        (CONTEXT, " 5"), (CONTEXT, " 6"), (CONTEXT, " five and a half"), ("Question:", " What is"),
        ("", "Answer"), (CONTEXT + " ", "5"),
    ]  # fmt: skip
    ours = adapter.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    expected = []
    for context, continuation in pairs:
        ids = tokenizer.encode(context.rstrip(), add_bos=True)
        whole = tokenizer.encode(context + continuation, add_bos=True)
        assert whole[: len(ids)] == ids and ids[0] == 1
        expected.append(direct(model, ids, whole[len(ids) :]))
    assert [score for score, _ in ours] == pytest.approx([s for s, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in ours] == [g for _, g in expected]
    assert ours[0] == ours[5]  # a blank at the end of a context belongs to what follows


def test_what_greedy_decoding_gives_is_greedy(adapter: InternLMAdapter, model: Any) -> None:
    context = adapter.tok_encode(CONTEXT)
    row = list(context)
    for _ in range(3):
        row.append(int(model.logits(torch.tensor([row]))[0, -1].argmax()))
    target = row[len(context) :]
    other = [*target[:2], (target[2] + 1) % 400]
    asked = [(("", ""), context, target), (("", ""), context, other)]
    assert [greedy for _, greedy in adapter._loglikelihood_tokens(asked)] == [True, False]


def test_rolling_loglikelihood_covers_every_token_once(
    adapter: InternLMAdapter, model: Any, tokenizer: Tokenizer
) -> None:
    short = "What is after X?"
    long = " ".join(["Name the pet of Kom, and the pet of Mil."] * 12)
    ids = tokenizer.encode(long)
    assert len(ids) > model.max_length
    ours = adapter.loglikelihood_rolling(
        requests("loglikelihood_rolling", (short,), (long,), ("",))
    )
    assert ours[0] == pytest.approx(direct(model, [1], tokenizer.encode(short))[0], abs=1e-4)
    # Windows of the model's length, each after the first begun by the last token before it.
    limit = model.max_length
    starts = range(0, len(ids), limit)
    windows = [([1] if s == 0 else [ids[s - 1]], ids[s : s + limit]) for s in starts[:-1]]
    total = sum(direct(model, *w)[0] for w in windows)
    rest = len(ids) - starts[-1]
    total += direct(model, ids[-limit - 1 : -rest], ids[-rest:])[0]
    assert ours[1] == pytest.approx(total, abs=1e-3)
    assert ours[2] == 0


def test_generate_until_stops_before_the_stop_text(
    adapter: InternLMAdapter, tokenizer: Tokenizer
) -> None:
    free = {"until": [], "max_gen_toks": 12}
    whole = adapter.generate_until(requests("generate_until", (CONTEXT, free), ("Say", free)))
    stop = whole[0][3:5]
    ours = adapter.generate_until(
        requests("generate_until", (CONTEXT, {**free, "until": [stop]}), ("Say", free))
    )
    assert ours == [whole[0].split(stop)[0], whole[1]]
    assert len(ours[0]) < len(whole[0])


def test_sampling_is_refused(adapter: InternLMAdapter) -> None:
    with pytest.raises(InputError, match="only greedy decoding"):
        adapter.generate_until(requests("generate_until", ("Say", {"do_sample": True})))


def test_contexts_too_long_keep_their_first_token(
    adapter: InternLMAdapter, model: Any, tokenizer: Tokenizer
) -> None:
    context = CONTEXT * 12
    score, _ = adapter.loglikelihood(requests("loglikelihood", (context, " 5")), True)[0]
    ids = tokenizer.encode(context)
    assert adapter.shortened == 1
    kept = [1, *ids[len(ids) - model.max_length + 1 :]]
    target = tokenizer.encode(context + " 5")[len(ids) :]
    row = kept if len(target) == 1 else [1, *kept[len(target) :]]
    assert len(row) + len(target) - 1 == model.max_length
    assert score == pytest.approx(direct(model, row, target)[0], abs=1e-4)
    with pytest.raises(InputError, match="96 new tokens leave no room"):
        fit_context([1], 96, 96)


def test_continuations_of_one_context_share_a_row(model: Any) -> None:
    letters = [Continuation((1, 5, 6), (letter,)) for letter in (10, 11, 12, 13)]
    longer = [Continuation((1, 5, 6), (20, 21, 22)), Continuation((1, 5, 7), (10,))]
    model.rows = 0
    ours = log_likelihoods(model, [*letters, *longer], batch_size=8)
    assert model.rows == 2  # (1 5 6 20 21) serves all that begin with (1 5 6)
    expected = [direct(model, list(c.context), list(c.target))[0] for c in [*letters, *longer]]
    assert [score for score, _ in ours] == pytest.approx(expected, abs=1e-4)


def test_progress_ends_at_all_rows(model: Any) -> None:
    told: list[tuple[int, int]] = []
    rows = [Continuation((1, n), (3,)) for n in range(7)]
    log_likelihoods(model, rows, 3, lambda done, total: told.append((done, total)))
    assert told == [(3, 7), (6, 7), (7, 7)]
