"""Token files in megatron-core's indexed format, which AscendSpeed's programs read, too.

`<prefix>.bin` holds sequences of numbers one after another, `<prefix>.idx` their lengths. The index
is little-endian: magic `MMIDIDX` and two zero bytes; u64 version 1; u8 code of the numbers' dtype;
u64 number of sequences; u64 number of document borders; then int32 lengths, int64 byte offsets,
int64 document borders, beginning with 0. Here every sequence is a document. Source: megatron-core
0.16.1, `_IndexWriter` and `DType` in `core/datasets/indexed_dataset.py`, not used to write,
for it takes Python lists of all of these: too much memory for a large corpus.
"""

import io
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Literal

import numpy
from numpy.typing import NDArray

from internlm_lib.files import atomic_path

Kind = Literal["pretrain", "instruction"]
"""pretrain: one file of token ids. instruction: three parallel ones, `FIELDS`."""
FIELDS = ("input_ids", "attention_mask", "labels")
DtypeChoice = Literal["smallest", "int32"]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_CODES = {"uint8": 1, "int32": 4, "int64": 5, "uint16": 8}
_UINT16_VOCABULARY = 65500  # as megatron-core's DType.optimal_dtype
_LENGTH = numpy.dtype("<i4")
_BLOCK = 1 << 20


def token_files(prefix: Path) -> tuple[Path, Path]:
    """`<prefix>.bin` and `<prefix>.idx`."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def field_prefix(prefix: Path, kind: Kind, field: str = "input_ids") -> Path:
    """Prefix of the files of one field: of instruction data as AscendSpeed names them."""
    if kind == "pretrain":
        return prefix
    return prefix.with_name(f"{prefix.name}_packed_{field}_document")


def packing_prefix(prefix: Path) -> Path:
    """Prefix of the files that say what the rows of a packed corpus hold."""
    return prefix.with_name(f"{prefix.name}_packing")


def corpus_files(prefix: Path, kind: Kind) -> list[Path]:
    """All `.bin` and `.idx` files of a corpus, those of the token ids first."""
    fields = FIELDS if kind == "instruction" else FIELDS[:1]
    return [file for field in fields for file in token_files(field_prefix(prefix, kind, field))]


def id_dtype(choice: DtypeChoice, vocab_size: int) -> numpy.dtype:
    """dtype of stored token ids: int32, or "smallest": uint16 where the vocabulary fits."""
    small = choice == "smallest" and vocab_size < _UINT16_VOCABULARY
    return numpy.dtype("uint16" if small else "int32")


class DocumentWriter:
    """Appends documents; made by `indexed_writer`."""

    def __init__(self, file: BinaryIO, dtype: numpy.dtype) -> None:
        self._file, self._dtype = file, dtype
        self.lengths = io.BytesIO()

    def add_document(self, token_ids: Sequence[int]) -> None:
        """Append one document, special tokens included."""
        self._file.write(numpy.array(token_ids, self._dtype).tobytes())
        self.lengths.write(struct.pack("<i", len(token_ids)))


@contextmanager
def indexed_writer(prefix: Path, vocab_size: int) -> Iterator[DocumentWriter]:
    """Write a corpus document by document; both files appear when the block ends without an error.

    Args:
        prefix: path without suffix.
        vocab_size: ids are in [0, vocab_size).
    """
    dtype = id_dtype("smallest", vocab_size)
    bin_path, idx_path = token_files(prefix)
    with atomic_path(idx_path) as idx, atomic_path(bin_path) as temporary:
        with temporary.open("wb") as file:
            writer = DocumentWriter(file, dtype)
            yield writer
        write_index(idx, writer.lengths, dtype)


def write_index(path: Path, lengths: BinaryIO, dtype: numpy.dtype) -> None:
    """Write an index of sequences that stand one after another.

    Args:
        lengths: the numbers in each sequence, as int32; read block by block.
        dtype: of the numbers.
    """
    count = lengths.seek(0, io.SEEK_END) // _LENGTH.itemsize
    with path.open("wb") as file:
        file.write(_MAGIC + _HEADER.pack(1, _CODES[dtype.name], count, count + 1))
        for block in read_blocks(lengths, _LENGTH):
            file.write(block.tobytes())
        start = 0
        for block in read_blocks(lengths, _LENGTH):
            ends = start + numpy.cumsum(block, dtype="<i8") * dtype.itemsize
            file.write(numpy.concatenate([[start], ends[:-1]]).astype("<i8").tobytes())
            start = int(ends[-1])
        for first in range(0, count + 1, _BLOCK):
            borders = numpy.arange(first, min(first + _BLOCK, count + 1), dtype="<i8")
            file.write(borders.tobytes())


def read_blocks(file: BinaryIO, dtype: numpy.dtype) -> Iterator[NDArray]:
    """All numbers of a raw file from its beginning, a block at a time."""
    file.seek(0)
    while block := file.read(_BLOCK * dtype.itemsize):
        yield numpy.frombuffer(block, dtype)


def read_documents(prefix: Path, numbers: Sequence[int]) -> list[list[int]]:
    """The sequences with these numbers, counted from 0."""
    dataset = _indexed_dataset().IndexedDataset(str(prefix))
    return [dataset[number].tolist() for number in numbers]


def sequence_lengths(prefix: Path) -> NDArray[numpy.int32]:
    """Length of every sequence."""
    with token_files(prefix)[1].open("rb") as file:
        file.seek(len(_MAGIC))
        _, _, count, _ = _HEADER.unpack(file.read(_HEADER.size))
        return numpy.fromfile(file, _LENGTH, count)


def _indexed_dataset() -> ModuleType:
    """megatron-core's module; importing it warns of the GPU packages that only training uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
