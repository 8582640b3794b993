"""What parts hold and a training consumes, against megatron-core's own parts and samples."""

from pathlib import Path

import numpy
import pytest

from internlm_lib.data.corpora import Corpora
from internlm_lib.data.indexed import field_prefix, indexed_writer
from internlm_lib.data.usage import part_bounds, part_rows
from internlm_lib.experiment.schema import DataSection, TrainingSection

TRAINING = TrainingSection(
    seq_length=16, micro_batch_size=1, global_batch_size=4, train_iters=30, eval_interval=10,
    eval_iters=2,
)  # fmt: skip


def write(prefix: Path, lengths: list[int]) -> None:
    with indexed_writer(prefix, 512) as writer:
        for length in lengths:
            writer.add_document([5] * length)


@pytest.mark.parametrize("split", ["949,50,1", "8,1,1", "1,0,0", "2.5,1,0.5"])
def test_parts_are_megatrons(split: str) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for rows in (1, 7, 52002):
        theirs = [[round(bound * rows) for bound in part or (0, 0)] for part in matrix]
        ours = [list(part) for part in part_bounds(split, rows)]
        assert [end - first for first, end in ours] == [end - first for first, end in theirs]


def test_text_is_cut_into_windows_and_read_for_some_epochs(tmp_path: Path) -> None:
    lengths = numpy.random.RandomState(0).randint(5, 40, 100).tolist()
    write(tmp_path / "text", lengths)
    corpora = Corpora("pretrain", (tmp_path / "text",), (1.0,))
    train, valid, test = part_rows(corpora, DataSection(split="8,1,1"), TRAINING)
    assert (train["rows"], valid["rows"], test["rows"]) == (80, 10, 10)
    assert train["tokens"] == sum(lengths[:80])
    assert train["samples per epoch"] == (sum(lengths[:80]) - 1) // 16
    assert (train["samples taken"], valid["samples taken"], test["samples taken"]) == (120, 24, 8)
    assert train["epochs"] == 120 / train["samples per epoch"] and train["padding"] == "0 %"


def test_rows_of_instruction_data_are_samples_with_padding(tmp_path: Path) -> None:
    prefix = tmp_path / "train"
    write(field_prefix(prefix, "instruction"), [9, 17, 40, 5])
    corpora = Corpora("instruction", (prefix,), (1.0,))
    (train, *_) = part_rows(corpora, DataSection(split="1,0,0"), TRAINING)
    assert train["samples per epoch"] == 4 and train["epochs"] == 30.0
    # 8, 16, 16 (cut off) and 4 of 16 positions each
    assert train["padding"] == f"{1 - 44 / 64:.1%}"


def test_sources_of_a_blend_share_the_samples_by_weight(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, [30] * 50)
    corpora = Corpora("pretrain", (tmp_path / "a", tmp_path / "b"), (3.0, 1.0))
    rows = part_rows(corpora, DataSection(split="1,0,0"), TRAINING)
    taken = {row["token files"]: row["samples taken"] for row in rows if row["part"] == "training"}
    assert taken == {"a": 90, "b": 30}
