"""Token files in megatron-core's indexed format, written and read by megatron-core itself.

`<prefix>.bin` holds the documents' token ids one after another, `<prefix>.idx` their lengths.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from internlm_lib.files import atomic_path

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

Kind = Literal["pretrain", "instruction"]
"""pretrain: one file of token ids. instruction: three parallel ones, `FIELDS`."""
FIELDS = ("input_ids", "attention_mask", "labels")


class DocumentWriter:
    """Appends documents; made by `indexed_writer`."""

    def __init__(self, builder: "IndexedDatasetBuilder") -> None:
        self._builder = builder

    def add_document(self, token_ids: Sequence[int]) -> None:
        """Append one document, special tokens included."""
        self._builder.add_document(token_ids, [len(token_ids)])


@contextmanager
def indexed_writer(prefix: Path, vocab_size: int) -> Iterator[DocumentWriter]:
    """Write `<prefix>.bin` and `<prefix>.idx`; both appear when the block ends without an error.

    Args:
        prefix: path without suffix.
        vocab_size: ids are in [0, vocab_size): stored as uint16 where they fit, else as int32.
    """
    megatron = _indexed_dataset()
    dtype = megatron.DType.optimal_dtype(vocab_size)
    bin_path, idx_path = token_files(prefix)
    with atomic_path(idx_path) as idx, atomic_path(bin_path) as bin_:
        builder = megatron.IndexedDatasetBuilder(str(bin_), dtype=dtype)
        try:
            yield DocumentWriter(builder)
            builder.finalize(str(idx))
        finally:
            builder.data_file.close()


def read_documents(prefix: Path, numbers: Sequence[int]) -> list[list[int]]:
    """Token ids of the documents with these numbers, counted from 0."""
    dataset = _indexed_dataset().IndexedDataset(str(prefix))
    return [dataset[number].tolist() for number in numbers]


def token_files(prefix: Path) -> tuple[Path, Path]:
    """`<prefix>.bin` and `<prefix>.idx`."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def field_prefix(prefix: Path, kind: Kind, field: str = "input_ids") -> Path:
    """Prefix of the files of one field: of instruction data as AscendSpeed names them."""
    if kind == "pretrain":
        return prefix
    return prefix.with_name(f"{prefix.name}_packed_{field}_document")


def _indexed_dataset() -> ModuleType:
    """megatron-core's module; importing it warns of the GPU packages that only training uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
