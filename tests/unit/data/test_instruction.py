"""Instruction data: a row a sample, trained where it has labels, split at true boundaries."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest

from internlm_lib.data.indexed import field_prefix
from internlm_lib.errors import InputError
from tests.unit.data.corpora import (
    GLOBAL,
    SEQUENCE,
    VOCABULARY,
    Row,
    build,
    write_raw,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("megatron_on_cpu")

RANDOM = numpy.random.default_rng(8)
EOS, UNTRAINED = 2, -100


def draw_row(length: int) -> Row:
    """A prompt that is not trained, an answer that is; ids that occur in no other row."""
    prompt = int(RANDOM.integers(1, length)) if length > 1 else 0
    ids = RANDOM.integers(3, VOCABULARY, length).tolist()
    return ids, [UNTRAINED] * prompt + ids[prompt:]


ROWS = [draw_row(int(length)) for length in RANDOM.integers(1, 2 * SEQUENCE, 50)]
LONG = [number for number, (ids, _) in enumerate(ROWS) if len(ids) > SEQUENCE + 1]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data" / "alpaca", ROWS)


def spelled_out(row: Row, seq_length: int = SEQUENCE) -> dict[str, list[Any]]:
    """What a sample should hold, token by token."""
    ids, labels = row
    tokens, targets, mask = [], [], []
    for position in range(seq_length):
        there = position + 1 < len(ids)
        trained = there and labels[position + 1] != UNTRAINED
        tokens.append(ids[position] if there else EOS)
        targets.append(labels[position + 1] if trained else 0)
        mask.append(1.0 if trained else 0.0)
    return {
        "tokens": tokens, "labels": targets, "loss_mask": mask,
        "position_ids": list(range(seq_length)),
    }  # fmt: skip


def as_lists(sample: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: value.tolist() for name, value in sample.items()}


def order(rows: int, samples: int, seed: int = 1234) -> list[int]:
    """Numbers of the rows, epoch by epoch."""
    taken: list[int] = []
    epoch = 0
    while len(taken) < samples:
        taken += numpy.random.RandomState([seed, epoch]).permutation(rows).tolist()
        epoch += 1
    return taken[:samples]


@pytest.mark.parametrize(("seq_length", "seed"), [(SEQUENCE, 1234), (5, 9), (40, 1234)])
def test_samples_are_those_spelled_out(prefix: Path, seq_length: int, seed: int) -> None:
    dataset = build(prefix, kind="instruction", seq_length=seq_length, seed=seed).train
    assert len(dataset) == 20 * GLOBAL
    found = [as_lists(dataset[number]) for number in range(len(dataset))]
    expected = order(len(ROWS), len(dataset), seed)
    assert found == [spelled_out(ROWS[number], seq_length) for number in expected]


def test_samples_have_the_types_of_pre_training_ones(prefix: Path) -> None:
    import torch

    sample = build(prefix, kind="instruction").train[0]
    types = {name: value.dtype for name, value in sample.items()}
    whole = dict.fromkeys(("tokens", "labels", "position_ids"), torch.int64)
    assert types == {**whole, "loss_mask": torch.float32}


def test_an_epoch_takes_every_row_once_and_no_two_are_in_one_order(prefix: Path) -> None:
    dataset = build(prefix, kind="instruction").train
    rows = len(ROWS)
    epochs = [
        [tuple(dataset[e * rows + n]["tokens"].tolist()) for n in range(rows)] for e in range(4)
    ]
    every_row = sorted(tuple(spelled_out(row)["tokens"]) for row in ROWS)
    assert all(sorted(epoch) == every_row for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_any_sample_can_be_asked_for_at_any_time(prefix: Path) -> None:
    dataset = build(prefix, kind="instruction").train
    in_order = [dataset[number]["tokens"].tolist() for number in range(len(dataset))]
    for number in [200, 0, 49, 50, 239, 51]:
        assert dataset[number]["tokens"].tolist() == in_order[number]


@pytest.mark.parametrize("kind", ["pretrain", "instruction"])
@pytest.mark.parametrize("number", [-1, 1000])
def test_there_are_no_samples_beyond_the_last(prefix: Path, kind: Any, number: int) -> None:
    source = field_prefix(prefix, "instruction") if kind == "pretrain" else prefix
    with pytest.raises(IndexError):
        build(source, kind=kind).train[number]


def test_parts_are_true_and_in_file_order(prefix: Path) -> None:
    """AscendSpeed validated on rows that it trained on."""
    datasets = build(prefix, "6,3,1", kind="instruction", eval_iters=2, eval_interval=5)
    bounds = [(0, 30), (30, 45), (45, 50)]
    sizes = [20 * GLOBAL, 5 * 2 * GLOBAL, 2 * GLOBAL]
    for dataset, (first, end), size in zip(datasets, bounds, sizes, strict=True):
        assert len(dataset) == size >= end - first
        found = {tuple(dataset[number]["tokens"].tolist()) for number in range(size)}
        assert found == {tuple(spelled_out(row)["tokens"]) for row in ROWS[first:end]}


def test_rows_that_lose_their_end_are_counted(prefix: Path) -> None:
    assert 5 < len(LONG) < 30
    assert build(prefix, kind="instruction").train.facts == {
        "kind": "instruction", "samples": 240, "rows": 50, "epochs": 5,
        "epochs_shuffled_together": 1, "truncated_rows": len(LONG),
    }  # fmt: skip
    valid = build(prefix, "1,1,0", kind="instruction", eval_iters=1).valid
    assert valid.facts["truncated_rows"] == sum(number >= 25 for number in LONG)
    longest = max(len(ids) for ids, _ in ROWS)
    fitting = build(prefix, kind="instruction", seq_length=longest - 1).train
    assert fitting.facts["truncated_rows"] == 0


def sha256(prefix: Path, split: str = "1,0,0", **training: Any) -> str:
    order: str = build(prefix, split, kind="instruction", **training).train.order_sha256
    return order


def test_the_hash_of_the_order_is_that_of_content_and_settings(
    prefix: Path, tmp_path: Path
) -> None:
    whole = sha256(prefix)
    assert whole == sha256(prefix) == sha256(write_rows(tmp_path / "elsewhere", ROWS))
    unmask = [(ids, ids) for ids, _ in ROWS]
    others = [
        sha256(prefix, "9,1,0"), sha256(prefix, seed=99), sha256(prefix, train_iters=21),
        sha256(prefix, seq_length=SEQUENCE + 1), sha256(write_rows(tmp_path / "labels", unmask)),
        sha256(write_rows(tmp_path / "turned", ROWS[::-1])),
    ]  # fmt: skip
    assert len({whole, *others}) == 1 + len(others)


def test_the_hash_tells_kinds_apart(prefix: Path) -> None:
    ids = field_prefix(prefix, "instruction", "input_ids")
    assert build(ids).train.order_sha256 != sha256(prefix)


def rewrite(prefix: Path, field: str, sequences: Sequence[Sequence[int]], dtype: Any) -> None:
    write_raw(field_prefix(prefix, "instruction", field), sequences, dtype)


def test_labels_of_other_rows_are_bad_input(prefix: Path) -> None:
    rewrite(prefix, "labels", [labels for _, labels in ROWS[1:]], numpy.int32)
    with pytest.raises(InputError, match="alpaca_packed_labels_document: its rows are not as long"):
        build(prefix, kind="instruction")


def test_labels_that_cannot_be_negative_are_bad_input(prefix: Path) -> None:
    rewrite(prefix, "labels", [ids for ids, _ in ROWS], numpy.uint16)
    with pytest.raises(InputError, match="kept as uint16, which cannot hold -100"):
        build(prefix, kind="instruction")


def test_token_ids_may_be_small(prefix: Path) -> None:
    before = as_lists(build(prefix, kind="instruction").train[7])
    rewrite(prefix, "input_ids", [ids for ids, _ in ROWS], numpy.uint16)
    assert as_lists(build(prefix, kind="instruction").train[7]) == before


@pytest.mark.parametrize("field", ["input_ids", "labels"])
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_bad_input(prefix: Path, field: str, suffix: str) -> None:
    Path(f"{field_prefix(prefix, 'instruction', field)}{suffix}").unlink()
    with pytest.raises(InputError, match=f"packed_{field}_document{suffix} is missing.*instruct"):
        build(prefix, kind="instruction")


@pytest.mark.parametrize(
    ("split", "training", "part"),
    [("1,200,0", {}, "training"), ("200,1,0", {"eval_iters": 1}, "validation"),
     ("1,0,0", {"eval_iters": 1}, "validation")],
)  # fmt: skip
def test_a_part_without_rows_is_bad_input(
    prefix: Path, split: str, training: dict[str, Any], part: str
) -> None:
    with pytest.raises(InputError, match=f"the {part} part .* holds no row"):
        build(prefix, split, kind="instruction", **training)
