"""Token files are those that megatron-core writes, byte for byte, and it reads them."""

import io
from pathlib import Path

import numpy
import pytest

from internlm_lib.data import indexed
from internlm_lib.data.indexed import (
    corpus_files,
    id_dtype,
    indexed_writer,
    read_documents,
    sequence_lengths,
    token_files,
    write_index,
)

DOCUMENTS = [[1, 5, 9, 2], [1, 2], [7], [1, *range(3, 90), 2], [1, 299, 2]]


def megatron_files(prefix: Path, vocab_size: int) -> tuple[Path, Path]:
    """The same documents, written by megatron-core itself."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    bin_path, idx_path = token_files(prefix)
    builder = IndexedDatasetBuilder(str(bin_path), dtype=DType.optimal_dtype(vocab_size))
    for document in DOCUMENTS:
        builder.add_document(document, [len(document)])
    builder.finalize(str(idx_path))
    return bin_path, idx_path


@pytest.mark.parametrize("block", [1, 2, 1 << 20])
@pytest.mark.parametrize("vocab_size", [300, 65499, 65500, 103168])
def test_files_are_megatrons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int, block: int
) -> None:
    monkeypatch.setattr(indexed, "_BLOCK", block)
    with indexed_writer(tmp_path / "own", vocab_size) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    for own, megatrons in zip(
        token_files(tmp_path / "own"), megatron_files(tmp_path / "other", vocab_size), strict=True
    ):
        assert own.read_bytes() == megatrons.read_bytes()


def test_megatron_reads_them(tmp_path: Path) -> None:
    prefix = tmp_path / "alpaca.v1.2"
    with indexed_writer(prefix, 103168) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alpaca.v1.2.bin", "alpaca.v1.2.idx"]
    assert read_documents(prefix, [4, 0]) == [DOCUMENTS[4], DOCUMENTS[0]]
    assert sequence_lengths(prefix).tolist() == [len(document) for document in DOCUMENTS]


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "uint16"])
def test_every_dtype_has_megatrons_code(tmp_path: Path, dtype: str) -> None:
    values = numpy.arange(5, dtype=dtype)
    bin_path, idx_path = token_files(tmp_path / "x")
    bin_path.write_bytes(values.tobytes())
    lengths = io.BytesIO(numpy.array([2, 3], dtype="<i4").tobytes())
    write_index(idx_path, lengths, values.dtype)
    assert read_documents(tmp_path / "x", [0, 1]) == [[0, 1], [2, 3, 4]]


def test_an_error_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), indexed_writer(tmp_path / "x", 300) as writer:
        writer.add_document([1, 1 // 0])
    assert not any(tmp_path.iterdir())


def test_the_predecessors_dtype_can_be_had() -> None:
    assert [str(id_dtype(choice, 300)) for choice in ("smallest", "int32")] == ["uint16", "int32"]
    assert str(id_dtype("smallest", 103168)) == "int32"


def test_instruction_data_is_named_as_by_the_predecessor(tmp_path: Path) -> None:
    assert [p.name for p in corpus_files(tmp_path / "a.b", "pretrain")] == ["a.b.bin", "a.b.idx"]
    names = [path.name for path in corpus_files(tmp_path / "c", "instruction")]
    assert names == [
        f"c_packed_{field}_document.{suffix}"
        for field in ("input_ids", "attention_mask", "labels")
        for suffix in ("bin", "idx")
    ]
