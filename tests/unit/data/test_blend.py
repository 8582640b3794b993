"""Corpora mixed by weight: megatron-core's BlendedDataset, bounded."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest

from internlm_lib.errors import InputError
from tests.unit.data.corpora import (
    DOCUMENTS,
    GLOBAL,
    SEQUENCE,
    build,
    megatron,
    tokens_of,
    write,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("megatron_on_cpu")

WEIGHTS = (3.0, 1.0, 2.0)
STEPS = 100
Blend = list[tuple[float, Path]]


@pytest.fixture
def blend(tmp_path: Path) -> Blend:
    """Three corpora of different sizes, two of them of the same name."""
    parts = {"a/corpus": DOCUMENTS[:20], "b/corpus": DOCUMENTS[20:26], "b/more": DOCUMENTS[26:]}
    prefixes = [write(tmp_path / name, documents) for name, documents in parts.items()]
    return list(zip(WEIGHTS, prefixes, strict=True))


def test_samples_are_megatrons(blend: Blend) -> None:
    ours = build(blend, "6,4,0", train_iters=STEPS, eval_iters=2, eval_interval=5)
    sizes = [STEPS * GLOBAL, 21 * 2 * GLOBAL, 0]
    theirs = megatron(blend, "6,4,0", sizes, seq_length=SEQUENCE, seed=1234)
    for our, their in zip(ours[:2], theirs[:2], strict=True):
        assert len(our) == len(their)
        assert tokens_of(our) == tokens_of(their)
        assert [our[n]["dataset_id"] for n in range(len(our))] == their.dataset_index.tolist()
    assert ours.test is None


def test_batches_come_from_a_blend_as_from_a_corpus(blend: Blend) -> None:
    import torch

    from internlm_lib.data.batches import BatchStream

    dataset = build(blend).train
    stream = BatchStream(
        dataset, global_batch_size=GLOBAL, micro_batch_size=GLOBAL, data_parallel_rank=0,
        data_parallel_size=1, device=torch.device("cpu"),
    )  # fmt: skip
    (batch,) = stream.step(3)
    expected = [dataset[number]["tokens"].tolist() for number in range(3 * GLOBAL, 4 * GLOBAL)]
    assert batch.tokens.tolist() == expected


def test_longer_than_a_period_shares_stay_and_no_sample_is_left_out(
    blend: Blend, monkeypatch: pytest.MonkeyPatch
) -> None:
    from internlm_lib.data import blend as module

    period = 90
    monkeypatch.setattr(module, "PERIOD", period)
    dataset = build(blend, train_iters=STEPS).train
    assert len(dataset.dataset_index) == period < len(dataset)
    taken: list[list[Any]] = [[], [], []]
    for number in range(len(dataset)):
        sample = dataset[number]
        taken[sample["dataset_id"]].append(sample["tokens"].tolist())
    counts = numpy.array([len(samples) for samples in taken])
    shares = numpy.array(WEIGHTS) / sum(WEIGHTS)
    assert abs(counts / len(dataset) - shares).max() < 0.005
    for corpus, samples in zip(dataset.datasets, taken, strict=True):
        assert samples == [corpus[n]["tokens"].tolist() for n in range(len(samples))]
    for number in [len(dataset) - 1, 0, period, period - 1]:
        again = dataset[number]
        assert again["tokens"].tolist() in taken[again["dataset_id"]]


def test_a_period_does_not_change_what_comes_before_its_end(
    blend: Blend, monkeypatch: pytest.MonkeyPatch
) -> None:
    from internlm_lib.data import blend as module

    whole = build(blend, train_iters=STEPS).train
    monkeypatch.setattr(module, "PERIOD", 90)
    repeating = build(blend, train_iters=STEPS).train
    assert tokens_of(repeating)[:90] == tokens_of(whole)[:90]
    assert repeating.order_sha256 != whole.order_sha256


def test_the_hash_of_the_order(blend: Blend, tmp_path: Path) -> None:
    def sha256(source: Any, **training: Any) -> str:
        order: str = build(source, **training).train.order_sha256
        return order

    (_, a), (_, b), (_, c) = blend
    first = sha256(blend)
    assert first == sha256(blend) == sha256([(w / 6, prefix) for w, prefix in blend])
    moved = write(tmp_path / "moved", DOCUMENTS[:20])
    assert first == sha256([(3.0, moved), *blend[1:]])
    others = [
        sha256(blend[::-1]), sha256([(1.0, a), (3.0, b), (2.0, c)]), sha256(blend, seed=2),
        sha256(blend, train_iters=21), sha256([(3.0, a), (1.0, b), (2.0, a)]),
    ]  # fmt: skip
    assert len({first, *others}) == 1 + len(others)


def test_instruction_data_blend_too(tmp_path: Path) -> None:
    rows = [([n] * 6, [-100] * 3 + [n] * 3) for n in range(3, 53)]
    blend = [(3, write_rows(tmp_path / "a", rows[:20])), (1, write_rows(tmp_path / "b", rows[20:]))]
    dataset = build(blend, kind="instruction").train
    counts = Counter(int(dataset[n]["tokens"][0]) < 23 for n in range(len(dataset)))
    assert counts[True] / len(dataset) == pytest.approx(0.75, abs=0.01)
    assert dataset[0]["loss_mask"].sum() == 3
    facts = dataset.facts
    assert (facts["kind"], facts["weights"]) == ("blend", [0.75, 0.25])
    assert [corpus["rows"] for corpus in facts["corpora"]] == [20, 30]


def test_of_a_few_samples_a_corpus_may_start_over(tmp_path: Path) -> None:
    """Megatron draws a little more of each corpus than it needs, which of a few can be too few."""
    prefixes = [write(tmp_path / str(n), [[3 + n] * (SEQUENCE + 1)]) for n in range(6)]
    source = list(zip((1000.0, 1.0, 1.0, 1.0, 1.0, 1.0), prefixes, strict=True))
    dataset = build(source, train_iters=1, global_batch_size=1).train
    taken = [dataset[number]["dataset_id"] for number in range(len(dataset))]
    assert taken.count(0) > len(dataset.datasets[0])
    with pytest.raises(IndexError, match="oversamples"):
        megatron(source, "1,0,0", [1, 0, 0], seq_length=SEQUENCE, seed=1234)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_bad_input(blend: Blend, weight: float) -> None:
    with pytest.raises(InputError, match=f"corpus: its weight is {weight}"):
        build([(weight, blend[0][1]), *blend[1:]])


def test_no_corpora_are_bad_input() -> None:
    with pytest.raises(InputError, match="a blend of no corpus"):
        build([])


def test_a_corpus_of_a_blend_without_a_sample_is_bad_input(blend: Blend, tmp_path: Path) -> None:
    short = write(tmp_path / "short", [[5] * SEQUENCE])
    with pytest.raises(InputError, match="short: the training part"):
        build([*blend, (1.0, short)])
