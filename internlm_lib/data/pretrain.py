"""Documents → samples of equal length, in megatron-core's order, for any number of epochs.

The samples of a training are those of megatron-core's GPTDataset, token for token: all epochs'
documents are shuffled together and laid one after another, cut into samples that overlap by one
token, and these are shuffled again. Its index holds every document of every epoch, and building it
takes 20 bytes for each: 500000 steps of 256 samples of Alpaca would need 40 GiB. Hence

- the same arrays are made here with 4 bytes for each, and kept (`index_cache.py`);
- an index that would have more than `MEGATRON_ENTRIES` entries is not made. The training then goes
  through blocks of epochs, each the whole GPTDataset of as many epochs as fit `BLOCK_ENTRIES`,
  drawn when it is reached, the first as Megatron would. Which of the two it is follows from the
  data, `seq_length` and the number of samples alone, and is part of the order's hash.

`benchmarks/index_build.py` measures all of this.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, _build_shuffle_index
from numpy.random import RandomState
from numpy.typing import NDArray

from internlm_lib.data.fingerprint import content_sha256
from internlm_lib.data.index_cache import Arrays, cached_index, index_sha256
from internlm_lib.data.indexed import token_files

MEGATRON_ENTRIES = 1 << 27
"""Documents of all epochs and samples together, up to which the order is GPTDataset's; a single
epoch's always is. Half a GiB, which rank 0 makes and all ranks of a machine share. Of Alpaca it is
enough for 7 million samples of 2048 tokens; the predecessor's 65B recipe takes 6.4 million."""

BLOCK_ENTRIES = 1 << 24
"""Documents, or samples, of a block of epochs; more only if a single epoch has more. Every rank has
a block of its own: 64 MiB of documents."""

_FINAL_EPOCH_APART = 0.80
"""Megatron's: a last epoch of which less is used is shuffled by itself."""


@dataclass(frozen=True)
class EpochPlan:
    """How many epochs make up the samples, and how many of them are shuffled together."""

    epochs: int
    """Of one block."""
    blocks: int
    block_samples: int
    """Samples of one block."""


def plan_epochs(documents: int, tokens: int, seq_length: int, samples: int) -> EpochPlan:
    """The epochs that give at least `samples` samples.

    Args:
        documents, tokens: of one epoch; more tokens than `seq_length`.
    """
    epochs = -(-(samples * seq_length + 1) // tokens)
    if epochs == 1 or epochs * documents + samples <= MEGATRON_ENTRIES:
        return EpochPlan(epochs, 1, (epochs * tokens - 1) // seq_length)
    per_epoch = max(documents, -(-tokens // seq_length))
    together = max(1, BLOCK_ENTRIES // per_epoch)
    of_block = (together * tokens - 1) // seq_length
    return EpochPlan(together, -(-samples // of_block), of_block)


def build_order(
    documents: NDArray[numpy.int32],
    lengths: NDArray[numpy.int32],
    epochs: int,
    samples: int,
    *,
    seq_length: int,
    random: RandomState,
) -> Arrays:
    """What GPTDataset calls its document, sample and shuffle index, bit for bit.

    Args:
        documents: numbers of the documents.
        lengths: tokens of every document of the file, by number.
        epochs: the fewest that give `samples` samples.
    """
    tokens = int(lengths[documents].sum(dtype=numpy.int64))
    before_last = ((epochs - 1) * tokens - 1) // seq_length
    of_last = int(_FINAL_EPOCH_APART * ((tokens - 1) // seq_length))
    apart = epochs > 1 and samples - before_last < of_last
    parts = [epochs - 1, 1] if apart else [epochs]
    document_index = numpy.tile(documents, epochs)
    start = 0
    for part in parts:  # views: shuffled in place, without a copy
        end = start + part * len(documents)
        random.shuffle(document_index[start:end])
        start = end
    sample_index = helpers.build_sample_idx(
        numpy.array(lengths), document_index, seq_length, epochs, tokens
    )
    count = len(sample_index) - 1
    shuffle_index = _build_shuffle_index(before_last if apart else count, count, random)
    return {"documents": document_index, "samples": sample_index, "shuffle": shuffle_index}


class PretrainDataset(GPTDataset):
    """GPTDataset with a bounded index; made by BlendedMegatronDatasetBuilder.

    `config.path_to_cache` is the folder of indices. Not for several threads at a time.
    """

    order_sha256: str
    """Of the files' content and of the order of all samples."""

    @property
    def facts(self) -> dict[str, Any]:
        """For records: how the samples come about."""
        plan = self._plan
        return {
            "kind": "pretrain",
            "samples": self.num_samples,
            "documents": len(self.indices),
            "epochs": plan.epochs * plan.blocks,
            "epochs_shuffled_together": plan.epochs,
        }

    def __len__(self) -> int:
        return self._plan.blocks * self._plan.block_samples

    def _build_document_sample_shuffle_indices(self) -> tuple[Any, Any, Any]:
        """Called by GPTDataset when it is made."""
        prefix, cache = Path(self.dataset_path), Path(self.config.path_to_cache)
        self._plan = plan_epochs(
            len(self.indices),
            self._get_num_tokens_per_epoch(),
            self.config.sequence_length,
            self.num_samples,
        )
        self._block = 0
        key = {
            "order": "megatron-core GPTDataset" if self._plan.blocks == 1 else "blocks of epochs",
            "content_sha256": content_sha256(token_files(prefix), Path(f"{prefix}.json"), cache),
            "documents": [int(self.indices[0]), int(self.indices[-1]) + 1],
            "seed": self.config.random_seed,
            "seq_length": self.config.sequence_length,
            "samples": self.num_samples,
        }
        if self._plan.blocks == 1:
            index = cached_index(
                cache, self.index_split.name, key, self._build_block, first=_is_first_rank()
            )
            arrays, self.order_sha256 = index.arrays, index.sha256
        else:
            arrays = self._build_block()
            self.order_sha256 = index_sha256(key, arrays)
        return arrays["documents"], arrays["samples"], arrays["shuffle"]

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[Any, Any]:
        """Called by GPTDataset for a sample: its tokens, and the documents they are of."""
        if not 0 <= idx < len(self):
            raise IndexError(f"sample {idx} of {len(self)}")
        block, within = divmod(int(idx), self._plan.block_samples)
        if block != self._block:
            self._block = block
            self.document_index = self.sample_index = self.shuffle_index = None  # makes room
            arrays = self._build_block()
            self.document_index, self.sample_index = arrays["documents"], arrays["samples"]
            self.shuffle_index = arrays["shuffle"]
        return super()._query_document_sample_shuffle_indices(within)

    def _build_block(self) -> Arrays:
        seed = self.config.random_seed
        return build_order(
            self.indices,
            self.dataset.sequence_lengths,
            self._plan.epochs,
            self.num_samples if self._plan.blocks == 1 else self._plan.block_samples,
            seq_length=self.config.sequence_length,
            random=RandomState(seed if self._block == 0 else [seed, self._block]),
        )


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
