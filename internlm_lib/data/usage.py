"""What the parts of a corpus hold, and how much of them an experiment consumes."""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from internlm_lib.data.corpora import Corpora
from internlm_lib.data.indexed import Kind, field_prefix, sequence_lengths
from internlm_lib.experiment.schema import DataSection, TrainingSection


def part_rows(
    corpora: Corpora, data: DataSection, training: TrainingSection
) -> list[dict[str, Any]]:
    """One row per part of each corpus: rows and tokens in it, samples per epoch, samples that the
    experiment takes, epochs that these are, and the share of positions that are padding."""
    total = sum(corpora.weights)
    return [
        {**({"token files": prefix.name} if len(corpora.prefixes) > 1 else {}), **row}
        for prefix, weight in zip(corpora.prefixes, corpora.weights, strict=True)
        for row in _rows(prefix, corpora.kind, weight / total, data, training)
    ]


def part_bounds(split: str, rows: int) -> list[tuple[int, int]]:
    """First row of each part and the one behind its last, as megatron-core rounds them.

    Args:
        split: weights of the parts, `data.split`.
    """
    weights = [float(weight) for weight in split.split(",")]
    shares = [share / sum(weights) for share in accumulate(weights, initial=0.0)]
    return [(round(a * rows), round(b * rows)) for a, b in pairwise(shares)]


def _rows(
    prefix: Path, kind: Kind, share: float, data: DataSection, training: TrainingSection
) -> Iterator[dict[str, Any]]:
    lengths = sequence_lengths(field_prefix(prefix, kind))
    bounds = part_bounds(data.split, len(lengths))
    for (name, asked), (first, end) in zip(_asked(training).items(), bounds, strict=True):
        part = lengths[first:end]
        samples = _samples(part, kind, training.seq_length)
        taken = round(asked * share) if samples else 0
        yield {
            "part": name,
            "rows": len(part),
            "tokens": int(part.sum(dtype=numpy.int64)),
            "samples per epoch": samples,
            "samples taken": taken,
            "epochs": taken / samples if samples else 0.0,
            "padding": _padding(part, kind, training.seq_length),
        }


def _asked(training: TrainingSection) -> dict[str, int]:
    """Samples that a whole training takes of each part."""
    held_out = training.eval_iters * training.global_batch_size
    return {
        "training": training.train_samples,
        "validation": training.train_iters // training.eval_interval * held_out,
        "test": held_out,
    }


def _samples(lengths: NDArray[numpy.int32], kind: Kind, seq_length: int) -> int:
    """A row of instruction data is a sample; text is cut into windows of seq_length tokens and the
    one that follows."""
    if kind == "instruction":
        return len(lengths)
    return max(0, (int(lengths.sum(dtype=numpy.int64)) - 1) // seq_length)


def _padding(lengths: NDArray[numpy.int32], kind: Kind, seq_length: int) -> str:
    """Share of a batch's positions that hold no token."""
    if kind == "pretrain" or not len(lengths):
        return "0 %"
    filled = numpy.minimum(lengths - 1, seq_length).sum(dtype=numpy.int64)
    return f"{1 - filled / (len(lengths) * seq_length):.1%}"
