"""Several corpora mixed by weight, in the order of megatron-core's BlendedDataset."""

from collections.abc import Callable
from typing import Any

import numpy
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from numpy.typing import NDArray

from internlm_lib.data.index_cache import index_sha256

PERIOD = 1 << 24
"""Samples after which the sequence of corpora repeats; up to there it is BlendedDataset's. It takes
ten bytes each, in every rank."""


class Blend(BlendedDataset):
    """BlendedDataset with a bounded index that is made in no time, and hence never kept."""

    order_sha256: str
    """Of the corpora's order and of the sequence in which they take turns."""

    @property
    def facts(self) -> dict[str, Any]:
        """For records: how the samples come about."""
        return {
            "kind": "blend",
            "samples": self.size,
            "weights": self.weights,
            "corpora": [dataset.facts for dataset in self.datasets],
        }

    def __len__(self) -> int:
        return int(self.size)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """As the corpus' own dataset gives it; `dataset_id` says which corpus that is.

        Of blends of a few hundred samples, for which Megatron may have drawn one too few of a
        corpus, and raise an error, this corpus starts over.
        """
        period, within = divmod(int(idx), len(self.dataset_index))
        number = int(self.dataset_index[within])
        sample = period * int(self._per_period[number]) + int(self.dataset_sample_index[within])
        corpus = self.datasets[number]
        return {"dataset_id": number, **corpus[sample % len(corpus)]}

    def _build_indices(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Called by BlendedDataset when it is made."""
        length = min(self.size, PERIOD)
        corpus = numpy.zeros(length, dtype=numpy.int16)
        sample = numpy.zeros(length, dtype=numpy.int64)
        helpers.build_blending_indices(
            corpus, sample, self.weights, len(self.datasets), length, False
        )
        self._per_period = numpy.bincount(corpus, minlength=len(self.datasets))
        key = {
            "corpora": [dataset.order_sha256 for dataset in self.datasets],
            "samples": self.size,
        }
        self.order_sha256 = index_sha256(key, {"corpus": corpus})
        return corpus, sample


class BlendBuilder(BlendedMegatronDatasetBuilder):
    """Megatron's builder, making a `Blend` where it would make a BlendedDataset."""

    @staticmethod
    def build_generic_dataset(
        cls: Callable[..., Any],
        is_built_on_rank: Callable[[], bool],
        synchronize_ranks: bool,
        *args: Any,
    ) -> Any:
        return BlendedMegatronDatasetBuilder.build_generic_dataset(
            Blend if cls is BlendedDataset else cls, is_built_on_rank, synchronize_ranks, *args
        )
