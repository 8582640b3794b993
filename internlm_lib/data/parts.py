"""Training, validation and test part of a corpus: which are read, and whether they hold samples."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from internlm_lib.data.indexed import Kind, field_prefix, token_files
from internlm_lib.data.instruction import FIELDS_READ
from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import DataSection, TrainingSection

Bounds = tuple[float, float]
"""Begin and end of a part, as shares of the documents in file order."""

PARTS = {"training": "first", "validation": "second", "test": "third"}
"""Parts of a corpus, and which number of `data.split` says how large each is."""


def parts_to_read(
    split_matrix: Sequence[Bounds | None], training: TrainingSection
) -> dict[str, Bounds | None]:
    """The parts that a training asks for, by name; None is an empty one.

    Args:
        split_matrix: of the configuration of a megatron-core dataset.
    """
    train, valid, test = split_matrix
    parts = {"training": train}
    if training.eval_iters:
        parts["validation"] = valid
    if training.eval_iters and test:
        parts["test"] = test
    return parts


def check_parts(
    prefix: Path,
    kind: Kind,
    parts: Mapping[str, Bounds | None],
    data: DataSection,
    training: TrainingSection,
) -> None:
    """Raises InputError if a corpus lacks files, or one is cut off, or a part has no sample."""
    read = FIELDS_READ if kind == "instruction" else FIELDS_READ[:1]
    files = [file for field in read for file in token_files(field_prefix(prefix, kind, field))]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(
            f"{missing[0]} is missing: there are no data of kind {kind} at {prefix}; prepare them "
            "(01_prepare, internlm preprocess)"
        )
    lengths = _sequence_lengths(field_prefix(prefix, kind))
    for name, part in parts.items():
        first, end = (round(bound * len(lengths)) for bound in part or (0, 0))  # as megatron rounds
        tokens = int(lengths[first:end].sum())
        where = f"{prefix}: the {name} part (data.split = {data.split}) holds"
        number = f"a larger {PARTS[name]} number in data.split"
        if kind == "instruction" and first >= end:
            raise InputError(f"{where} no row; give more data or {number}")
        if kind == "pretrain" and tokens <= training.seq_length:
            raise InputError(
                f"{where} {tokens} tokens, less than one sample of training.seq_length = "
                f"{training.seq_length} and the token that follows; give more data, a shorter "
                f"sequence or {number}"
            )


def _sequence_lengths(prefix: Path) -> NDArray[numpy.int32]:
    """Tokens of each document. Raises InputError if the files are not whole."""
    bin_path, idx_path = token_files(prefix)
    try:
        dataset = IndexedDataset(str(prefix))
    except (AssertionError, ValueError, IndexError, struct.error) as error:
        raise InputError(
            f"{idx_path} is not an index of token files, or damaged ({error}); prepare the data "
            "again"
        ) from error
    lengths, index = numpy.array(dataset.sequence_lengths), dataset.index
    needed = int(index.sequence_pointers[-1]) + int(lengths[-1]) * index.dtype_size
    # AscendSpeed leaves the rest of an earlier, longer file behind.
    if bin_path.stat().st_size < needed:
        raise InputError(
            f"{bin_path} has {bin_path.stat().st_size} bytes, its index speaks of {needed}: it is "
            "cut off, or the two were not made together; prepare the data again"
        )
    return lengths
