"""Batches come in Megatron's order for every layout, from the corpus that lies there now."""

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import DataSection
from tests.unit.data.corpora import (
    DOCUMENTS,
    GLOBAL,
    SEQUENCE,
    build,
    training_section,
    write,
)

if TYPE_CHECKING:
    from internlm_lib.data.batches import Batch, BatchStream

pytestmark = pytest.mark.usefixtures("megatron_on_cpu")

LAYOUTS = [
    (data, micro) for data in (1, 2, 3, 4, 6, 12) for micro in (1, 2, 3, 4, 6, 12)
    if GLOBAL % (data * micro) == 0
]  # fmt: skip
"""(data_parallel_size, micro_batch_size)"""


@pytest.fixture(autouse=True)
def ten_seconds() -> Iterator[None]:
    """What has not ended by then never will: megatron-core can loop for ever over an empty part."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Numbered:
    """A dataset whose sample n holds n everywhere."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Any]:
        import torch

        assert 0 <= number < self.length
        names = ("tokens", "labels", "loss_mask", "position_ids")
        return {name: torch.full((SEQUENCE,), number) for name in names}


def stream(dataset: Any, rank: int = 0, data: int = 1, micro: int = GLOBAL) -> "BatchStream":
    import torch

    from internlm_lib.data.batches import BatchStream

    return BatchStream(
        dataset, global_batch_size=GLOBAL, micro_batch_size=micro, data_parallel_rank=rank,
        data_parallel_size=data, device=torch.device("cpu"),
    )  # fmt: skip


def numbers(batch: "Batch") -> list[int]:
    return batch.tokens[:, 0].tolist()


def megatron_sampler(total: int, rank: int, data: int, micro: int) -> Iterator[list[int]]:
    """Megatron-LM's MegatronPretrainingSampler, in its own words: gather as many samples as the
    data parallel ranks take at once, then give each rank its slice."""
    gathered: list[int] = []
    for number in range(total):
        gathered.append(number)
        if len(gathered) == micro * data:
            yield gathered[rank * micro : (rank + 1) * micro]
            gathered = []


@pytest.mark.parametrize(("data", "micro"), LAYOUTS)
def test_every_rank_takes_what_megatrons_sampler_gives_it(data: int, micro: int) -> None:
    dataset = Numbered(5 * GLOBAL)
    for rank in range(data):
        batches = stream(dataset, rank, data, micro)
        taken = [numbers(batch) for step in range(5) for batch in batches.step(step)]
        assert taken == list(megatron_sampler(len(dataset), rank, data, micro))


@pytest.mark.parametrize(("data", "micro"), LAYOUTS)
def test_a_step_holds_the_same_samples_in_the_same_order_for_every_layout(
    data: int, micro: int
) -> None:
    ranks = [list(stream(Numbered(100), rank, data, micro).step(3)) for rank in range(data)]
    assert {len(batches) for batches in ranks} == {GLOBAL // (data * micro)}
    together = [n for parts in zip(*ranks, strict=True) for batch in parts for n in numbers(batch)]
    assert together == list(range(3 * GLOBAL, 4 * GLOBAL))


def test_any_step_can_be_asked_for_at_any_time() -> None:
    batches = stream(Numbered(100), micro=6)
    assert [numbers(batch)[0] for step in (4, 0, 4, 1) for batch in batches.step(step)] == [
        48, 54, 0, 6, 48, 54, 12, 18
    ]  # fmt: skip


def test_past_the_end_it_starts_over() -> None:
    (second,), (ninth,) = (stream(Numbered(20)).step(step) for step in (1, 8))
    assert numbers(second) == [12, 13, 14, 15, 16, 17, 18, 19, 0, 1, 2, 3]
    assert numbers(ninth) == [16, 17, 18, 19, 0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("data", "micro"), [(1, 2), (2, 1), (2, 2)])
def test_steps_of_growing_size_take_the_samples_one_after_the_other(data: int, micro: int) -> None:
    sizes = [4, 4, 8, 12]
    for rank in range(data):
        batches = stream(Numbered(100), rank, data, micro)
        taken = [
            numbers(batch)
            for step, size in enumerate(sizes)
            for batch in batches.samples(sum(sizes[:step]), size)
        ]
        assert taken == list(megatron_sampler(sum(sizes), rank, data, micro))


def test_batches_made_ahead_are_the_same_in_any_order_of_steps() -> None:
    plain = stream(Numbered(100), micro=6)
    ahead = plain.ahead()
    for consumed, count in ((0, 12), (12, 12), (24, 24), (84, 12), (96, 12), (36, 12), (36, 12)):
        ours, theirs = ([numbers(b) for b in s.samples(consumed, count)] for s in (ahead, plain))
        assert ours == theirs


def test_the_next_step_is_made_while_one_is_taken() -> None:
    """Once a step's first batch is there, the thread works on the next; it dies with its step."""
    import threading

    asked = []

    class Watched(Numbered):
        def __getitem__(self, number: int) -> dict[str, Any]:
            asked.append((number, threading.current_thread()))
            return super().__getitem__(number)

    ahead = stream(Watched(100)).ahead()
    next(ahead.samples(0, GLOBAL))
    for thread in {thread for _, thread in asked} | set(threading.enumerate()):
        if thread.name.startswith("batches"):
            assert thread.daemon
            thread.join(5)
    assert [number for number, _ in asked] == list(range(2 * GLOBAL))
    assert threading.main_thread() not in {thread for _, thread in asked}


def test_what_goes_wrong_ahead_is_raised_in_its_own_step() -> None:
    class Torn(Numbered):
        def __getitem__(self, number: int) -> dict[str, Any]:
            if number >= GLOBAL:
                raise OSError(f"sample {number}")
            return super().__getitem__(number)

    ahead = stream(Torn(100)).ahead()
    assert len(list(ahead.samples(0, GLOBAL))) == 1
    with pytest.raises(OSError, match="sample 12"):
        list(ahead.samples(GLOBAL, GLOBAL))


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write(tmp_path / "data" / "train_text_document")


def sha256(prefix: Path, **training: Any) -> str:
    order: str = build(prefix, **training).train.order_sha256
    return order


def test_labels_are_the_tokens_that_follow(prefix: Path) -> None:
    """Each sample and its last label is a window of the documents put one after another, in an
    order that differs between epochs."""
    dataset = build(prefix).train
    following = {
        pair for document in DOCUMENTS for pair in zip(document, document[1:], strict=False)
    }
    borders = {(last[-1], first[0]) for last in DOCUMENTS for first in DOCUMENTS}
    for batch in stream(dataset).step(0):
        assert batch.tokens.shape == batch.labels.shape == (GLOBAL, SEQUENCE)
        assert (batch.tokens[:, 1:] == batch.labels[:, :-1]).all()
        pairs = zip(batch.tokens.flatten().tolist(), batch.labels.flatten().tolist(), strict=True)
        assert set(pairs) <= following | borders


def test_a_sample_counts_every_token_and_its_positions_run_on(prefix: Path) -> None:
    import torch

    (batch,) = stream(build(prefix)[0]).step(2)
    assert batch.loss_mask.dtype == torch.float32 and bool((batch.loss_mask == 1).all())
    assert batch.position_ids.tolist() == [list(range(SEQUENCE))] * GLOBAL
    assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)


def test_one_epoch_takes_every_window_once(tmp_path: Path) -> None:
    tokens = list(range(3, 3 + 20 * SEQUENCE + 1))
    dataset = build(write(tmp_path / "one", [tokens]), train_iters=1).train
    assert sorted(samples(dataset)) == [
        tokens[i : i + SEQUENCE] for i in range(0, 20 * SEQUENCE, SEQUENCE)
    ]


def test_there_are_samples_for_all_steps(prefix: Path) -> None:
    dataset = build(prefix, train_iters=100).train
    assert len(dataset) >= 100 * GLOBAL > sum(map(len, DOCUMENTS)) // SEQUENCE


def test_a_batch_ramp_takes_fewer_samples(prefix: Path) -> None:
    """The order of samples is drawn for as many as there will be."""
    ramped = training_section(train_iters=100, rampup_batch_size=(1, 1, 300))
    dataset = build(prefix, train_iters=100, rampup_batch_size=(1, 1, 300)).train
    assert ramped.train_samples < 100 * GLOBAL
    assert ramped.train_samples <= len(dataset) < len(build(prefix, train_iters=100).train)


def triples(sequences: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
    """All runs of three tokens: random enough to tell documents by."""
    return {tuple(s[i : i + 3]) for s in sequences for i in range(len(s) - 2)}


def samples(dataset: Any) -> list[list[int]]:
    return [dataset[number]["tokens"].tolist() for number in range(len(dataset))]


@pytest.mark.parametrize(
    ("split", "documents"),
    [("9,1,0", slice(36, 40)), ("95,5,0", slice(38, 40)), ("1,2,1", slice(10, 30))],
)
def test_validation_samples_are_there_only_if_asked_for(
    prefix: Path, split: str, documents: slice
) -> None:
    assert build(prefix, split)[1:] == (None, None)
    train, valid, _ = build(prefix, split, eval_iters=2, eval_interval=5)
    held_back = triples(DOCUMENTS[documents])
    assert triples(samples(valid)) & held_back
    assert not triples(samples(train)) & held_back


def test_the_test_part_is_read_with_eval_iters_if_there_is_one(prefix: Path) -> None:
    assert build(prefix, "3,1,0", eval_iters=2).test is None
    train, valid, test = build(prefix, "2,1,1", eval_iters=2, eval_interval=5)
    assert len(test) >= 2 * GLOBAL
    parts = [triples(samples(part)) & triples(DOCUMENTS[30:]) for part in (train, valid, test)]
    assert [bool(part) for part in parts] == [False, False, True]


def test_a_part_without_documents_that_is_not_read_does_no_harm(tmp_path: Path) -> None:
    """The default split leaves four documents to the training part."""
    train, valid, test = build(write(tmp_path / "few", DOCUMENTS[:4]), "949,50,1")
    assert len(train) >= 20 * GLOBAL and valid is None and test is None


@pytest.mark.parametrize(
    ("documents", "split", "training", "what"),
    [
        ([[5] * SEQUENCE], "1,0,0", {}, "the training part (data.split = 1,0,0) holds 8 tokens"),
        ([[5] * 900], "1,9,0", {}, "the training part (data.split = 1,9,0) holds 0 tokens"),
        (DOCUMENTS[:4], "949,50,1", {"eval_iters": 1}, "the validation part"),
        (DOCUMENTS, "1,0,0", {"eval_iters": 1}, "the validation part (data.split = 1,0,0) holds 0"),
        (DOCUMENTS, "80,20,0.1", {"eval_iters": 1}, "the test part (data.split = 80,20,0.1) holds"),
    ],
)  # fmt: skip
def test_a_part_shorter_than_one_sample_is_bad_input(
    tmp_path: Path, documents: list[list[int]], split: str, training: dict[str, Any], what: str
) -> None:
    corpus = write(tmp_path / "short", documents)
    with pytest.raises(InputError, match="more data, a shorter sequence or a larger") as caught:
        build(corpus, split, **training)
    assert str(caught.value).startswith(f"{corpus}: {what}")


def test_a_corpus_of_exactly_one_sample_is_enough(tmp_path: Path) -> None:
    tokens = list(range(10, 10 + SEQUENCE + 1))
    dataset = build(write(tmp_path / "one", [tokens]), train_iters=1, global_batch_size=1).train
    assert dataset[0]["tokens"].tolist() == tokens[:-1]
    assert dataset[0]["labels"].tolist() == tokens[1:]


def test_a_corpus_written_anew_is_not_read_in_the_earlier_ones_order(prefix: Path) -> None:
    before = build(prefix).train
    assert before.document_index.max() == len(DOCUMENTS) - 1
    write(prefix, DOCUMENTS[:20])
    after = build(prefix).train
    assert after.document_index.max() == 19
    assert all(len(after[number]["tokens"]) == SEQUENCE for number in range(len(after)))


def test_an_index_of_another_split_is_not_taken(prefix: Path) -> None:
    """AscendSpeed's caches did not know the split."""
    hashes = set()
    for split, documents in (("1,1,0", 20), ("1,3,0", 10), ("1,0,0", 40)):
        dataset = build(prefix, split).train
        assert set(dataset.document_index.tolist()) == set(range(documents))
        hashes.add(dataset.order_sha256)
    assert len(hashes) == 3


def test_equally_long_documents_written_anew_get_an_index_of_their_own(prefix: Path) -> None:
    """The index would serve, but its hash would be that of other data."""
    before = build(prefix).train.order_sha256
    write(prefix, [document[::-1] for document in DOCUMENTS])
    after = build(prefix).train
    assert after.order_sha256 != before
    assert len(list((prefix.parent / "index").glob("train-*"))) == 2


def test_indices_lie_where_one_says(prefix: Path, tmp_path: Path) -> None:
    from internlm_lib.data.batches import build_datasets

    data, training = DataSection(split="1,0,0"), training_section()
    there = build_datasets(prefix, data, training, 512, index_folder=tmp_path / "there").train
    assert not (prefix.parent / "index").exists()
    assert there.order_sha256 == build(prefix).train.order_sha256
    assert len(list((tmp_path / "there").glob("train-*"))) == 1


def test_a_second_start_makes_nothing_and_reads_no_tokens(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from internlm_lib.data import fingerprint, pretrain

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    before = build(prefix).train
    monkeypatch.setattr(fingerprint, "sha256_of", never)
    monkeypatch.setattr(pretrain, "build_order", never)
    after = build(prefix).train
    assert after.order_sha256 == before.order_sha256 and samples(after) == samples(before)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_files_that_are_missing_or_cut_off_are_bad_input(prefix: Path, suffix: str) -> None:
    path = Path(f"{prefix}{suffix}")
    content = path.read_bytes()
    for length in (0, 5, 20, 34, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="train_text_document"):
            build(prefix)
    path.unlink()
    with pytest.raises(InputError, match=rf"train_text_document\{suffix} is missing"):
        build(prefix)


def test_what_an_earlier_longer_file_left_behind_does_no_harm(prefix: Path) -> None:
    """AscendSpeed writes over files without shortening them."""
    before = samples(build(prefix).train)
    with Path(f"{prefix}.bin").open("ab") as file:
        file.write(b"more")
    assert samples(build(prefix).train) == before


def test_the_hash_of_the_order_is_the_same_wherever_and_however_often_it_is_built(
    prefix: Path, tmp_path: Path
) -> None:
    assert sha256(prefix) == sha256(prefix) == sha256(write(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    "training", [{"seed": 99}, {"seq_length": SEQUENCE + 1}, {"train_iters": 200}], ids=str
)
def test_the_hash_changes_with_the_order(prefix: Path, training: dict[str, Any]) -> None:
    assert sha256(prefix, **training) != sha256(prefix)


def test_the_hash_changes_with_one_token(prefix: Path, tmp_path: Path) -> None:
    changed = [*DOCUMENTS[:-1], [*DOCUMENTS[-1][:-1], (DOCUMENTS[-1][-1] + 1) % 512]]
    assert sha256(write(tmp_path / "changed", changed)) != sha256(prefix)
