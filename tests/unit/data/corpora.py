"""Small corpora, and their samples as the kit and as megatron-core itself make them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from internlm_lib.data.indexed import Kind, field_prefix, indexed_writer
from internlm_lib.experiment.schema import DataSection, TrainingSection

VOCABULARY = 512
SEQUENCE = 8
GLOBAL = 12

_RANDOM = numpy.random.default_rng(5)
DOCUMENTS = [_RANDOM.integers(3, VOCABULARY, size=n).tolist() for n in _RANDOM.integers(4, 40, 40)]

Row = tuple[Sequence[int], Sequence[int]]
"""Token ids and labels."""


def write(prefix: Path, documents: Sequence[Sequence[int]] = DOCUMENTS) -> Path:
    with indexed_writer(prefix, VOCABULARY) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def write_rows(prefix: Path, rows: Sequence[Row], dtype: Any = numpy.int32) -> Path:
    """Instruction data, by megatron-core's own writer."""
    for number, field in enumerate(("input_ids", "labels")):
        write_raw(field_prefix(prefix, "instruction", field), [row[number] for row in rows], dtype)
    return prefix


def write_raw(prefix: Path, sequences: Sequence[Sequence[int]], dtype: Any) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequence in sequences:
        builder.add_document(sequence, [len(sequence)])
    builder.finalize(f"{prefix}.idx")


def training_section(**training: Any) -> TrainingSection:
    keys = {"seq_length": SEQUENCE, "global_batch_size": GLOBAL, "train_iters": 20}
    return TrainingSection(**{**keys, **training})


def build(source: Any, split: str = "1,0,0", *, kind: Kind = "pretrain", **training: Any) -> Any:
    """The kit's datasets of a corpus or of a blend."""
    from internlm_lib.data.batches import build_datasets

    section, data = training_section(**training), DataSection(split=split)
    return build_datasets(source, data, section, VOCABULARY, kind=kind)


class _Tokenizer:
    vocab_size, eod, unique_identifiers = VOCABULARY, 2, ()


def megatron(source: Any, split: str, sizes: Sequence[int], *, seq_length: int, seed: int) -> Any:
    """Megatron-core's own datasets of the three parts; None for a size of 0."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    weights = None if isinstance(source, Path) else [weight for weight, _ in source]
    prefixes = [source] if isinstance(source, Path) else [prefix for _, prefix in source]
    config = GPTDatasetConfig(
        random_seed=seed, sequence_length=seq_length, blend=([str(p) for p in prefixes], weights),
        split=split, tokenizer=_Tokenizer(), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    config.split_matrix = [
        part if size else None for part, size in zip(config.split_matrix, sizes, strict=True)
    ]
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


def tokens_of(dataset: Any) -> list[list[int]]:
    """Tokens of every sample, and the one that follows."""
    samples = (dataset[number] for number in range(len(dataset)))
    return [[*sample["tokens"].tolist(), int(sample["labels"][-1])] for sample in samples]
