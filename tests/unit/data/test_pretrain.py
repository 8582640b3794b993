"""The order of samples: megatron-core's, and within bounds for any number of epochs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.unit.data.corpora import DOCUMENTS, GLOBAL, SEQUENCE, build, megatron, tokens_of, write

pytestmark = pytest.mark.usefixtures("megatron_on_cpu")

TOKENS = sum(map(len, DOCUMENTS))
PER_EPOCH = (TOKENS - 1) // SEQUENCE
STEPS = {
    "less than an epoch": 2,
    "all of one epoch": PER_EPOCH // GLOBAL,
    "half of the last epoch": round(2.5 * PER_EPOCH) // GLOBAL,
    "nearly all of the last epoch": round(2.95 * PER_EPOCH) // GLOBAL,
    "many epochs": 30 * PER_EPOCH // GLOBAL,
}
"""Numbers of steps, of `GLOBAL` samples each, by how the last epoch is used: Megatron shuffles one
of which less than 80 % is used by itself."""


def spelled_out(
    documents: Sequence[Sequence[int]], seq_length: int, samples: int, seed: Any
) -> list[list[int]]:
    """GPTDataset once more, with lists: epochs laid end to end, cut, shuffled."""
    random = numpy.random.RandomState(seed)
    tokens = sum(map(len, documents))
    epochs = 1
    while (epochs * tokens - 1) // seq_length < samples:
        epochs += 1
    whole = ((epochs - 1) * tokens - 1) // seq_length  # samples that end before the last epoch
    used_of_last = samples - whole
    apart = epochs > 1 and used_of_last < int(0.8 * ((tokens - 1) // seq_length))

    order: list[int] = []
    for count in [epochs - 1, 1] if apart else [epochs]:
        part = list(range(len(documents))) * count
        random.shuffle(part)
        order += part
    stream = [token for number in order for token in documents[number]]
    cut = [stream[i : i + seq_length + 1] for i in range(0, len(stream) - seq_length, seq_length)]
    positions: list[int] = []
    for part in [range(whole), range(whole, len(cut))] if apart else [range(len(cut))]:
        shuffled = list(part)
        random.shuffle(shuffled)
        positions += shuffled
    return [cut[position] for position in positions]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write(tmp_path / "data" / "corpus")


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(("seq_length", "seed"), [(SEQUENCE, 1234), (5, 7)])
def test_samples_are_megatrons_and_those_spelled_out(
    prefix: Path, steps: int, seq_length: int, seed: int
) -> None:
    dataset = build(prefix, train_iters=steps, seq_length=seq_length, seed=seed).train
    (expected, _, _) = megatron(
        prefix, "1,0,0", [steps * GLOBAL, 0, 0], seq_length=seq_length, seed=seed
    )
    found = tokens_of(dataset)
    assert found == tokens_of(expected)
    assert found == spelled_out(DOCUMENTS, seq_length, steps * GLOBAL, seed)


def test_the_last_epoch_is_shuffled_apart_in_one_case_and_not_in_another() -> None:
    """Else the comparison above would leave something out."""
    used = {name: STEPS[name] * GLOBAL - (2 * TOKENS - 1) // SEQUENCE for name in STEPS}
    assert 0 < used["half of the last epoch"] < int(0.8 * PER_EPOCH)
    assert int(0.8 * PER_EPOCH) <= used["nearly all of the last epoch"] <= PER_EPOCH


def test_held_out_parts_are_megatrons(prefix: Path) -> None:
    ours = build(prefix, "6,3,1", eval_iters=2, eval_interval=5)
    sizes = [20 * GLOBAL, 5 * 2 * GLOBAL, 2 * GLOBAL]
    theirs = megatron(prefix, "6,3,1", sizes, seq_length=SEQUENCE, seed=1234)
    parts = (DOCUMENTS[:24], DOCUMENTS[24:36], DOCUMENTS[36:])
    for our, their, part, size in zip(ours, theirs, parts, sizes, strict=True):
        assert tokens_of(our) == tokens_of(their) == spelled_out(part, SEQUENCE, size, 1234)


@pytest.mark.parametrize("samples", [1, 10**6, 128 * 10**6, 10**10])
@pytest.mark.parametrize("documents", [1, 49_350, 3 * 10**7, 5 * 10**8])
@pytest.mark.parametrize("length", [30, 122, 10**6])
def test_an_index_is_bounded_whatever_is_asked_for(
    samples: int, documents: int, length: int
) -> None:
    from internlm_lib.data.pretrain import BLOCK_ENTRIES, MEGATRON_ENTRIES, plan_epochs

    tokens = max(documents * length, 2049)
    plan = plan_epochs(documents, tokens, 2048, samples)
    assert plan.blocks * plan.block_samples >= samples
    assert (plan.blocks - 1) * plan.block_samples < samples
    entries = plan.epochs * documents + plan.block_samples
    if plan.blocks == 1:
        epoch = documents + tokens // 2048
        assert entries <= MEGATRON_ENTRIES + epoch or plan.epochs == 1
        assert (plan.epochs * tokens - 1) // 2048 >= samples
    else:
        assert max(plan.epochs * documents, plan.block_samples) <= max(
            BLOCK_ENTRIES, documents, tokens // 2048
        )


@pytest.mark.parametrize(
    ("train_iters", "batch", "blocks"),
    [(2_048, 256, False), (50_000, 128, False), (500_000, 256, True)],
)
def test_the_predecessors_recipes(train_iters: int, batch: int, blocks: bool) -> None:
    """On Alpaca's training part, of 49350 documents and about 6 million tokens. The loss published
    for 7B is of 2048 steps; 65B's 50000 are within Megatron's order; 7B's 500000 would not fit."""
    from internlm_lib.data.pretrain import plan_epochs

    plan = plan_epochs(49_350, 6_000_000, 2048, train_iters * batch)
    assert (plan.blocks > 1) == blocks


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of more than 400 entries is too large; a block has at most 5 epochs of documents."""
    from internlm_lib.data import pretrain

    monkeypatch.setattr(pretrain, "MEGATRON_ENTRIES", 400)
    monkeypatch.setattr(pretrain, "BLOCK_ENTRIES", 5 * (PER_EPOCH + 1))


@pytest.mark.usefixtures("small_blocks")
class TestBlocksOfEpochs:
    BLOCK = (5 * TOKENS - 1) // SEQUENCE
    STEPS = 2 * BLOCK // GLOBAL + 3

    def test_each_block_is_a_dataset_of_its_epochs(self, prefix: Path) -> None:
        dataset = build(prefix, train_iters=self.STEPS).train
        assert dataset.facts["epochs_shuffled_together"] == 5
        assert len(dataset) == 3 * self.BLOCK >= self.STEPS * GLOBAL
        found = tokens_of(dataset)
        for block, seed in enumerate([1234, [1234, 1], [1234, 2]]):
            taken = found[block * self.BLOCK : (block + 1) * self.BLOCK]
            assert taken == spelled_out(DOCUMENTS, SEQUENCE, self.BLOCK, seed)

    def test_the_first_block_is_megatrons(self, prefix: Path) -> None:
        (expected, _, _) = megatron(
            prefix, "1,0,0", [self.BLOCK, 0, 0], seq_length=SEQUENCE, seed=1234
        )
        found = tokens_of(build(prefix, train_iters=self.STEPS).train)
        assert found[: self.BLOCK] == tokens_of(expected)

    def test_any_sample_can_be_asked_for_at_any_time(self, prefix: Path) -> None:
        dataset = build(prefix, train_iters=self.STEPS).train
        in_order = tokens_of(dataset)
        for number in [3 * self.BLOCK - 1, 0, self.BLOCK, self.BLOCK - 1, 2 * self.BLOCK, 5]:
            assert dataset[number]["tokens"].tolist() == in_order[number][:-1]

    def test_nothing_is_kept(self, prefix: Path) -> None:
        build(prefix, train_iters=self.STEPS)
        assert not [path for path in (prefix.parent / "index").iterdir() if path.is_dir()]

    def test_the_hash_tells_blocks_from_megatrons_order(
        self, prefix: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from internlm_lib.data import pretrain

        hashes = [build(prefix, train_iters=self.STEPS).train.order_sha256]
        assert build(prefix, train_iters=self.STEPS).train.order_sha256 == hashes[0]
        monkeypatch.setattr(pretrain, "BLOCK_ENTRIES", 4 * (PER_EPOCH + 1))
        hashes.append(build(prefix, train_iters=self.STEPS).train.order_sha256)
        monkeypatch.setattr(pretrain, "MEGATRON_ENTRIES", 10**6)
        hashes.append(build(prefix, train_iters=self.STEPS).train.order_sha256)
        assert len(set(hashes)) == 3
