"""Rows of instruction data → samples: one row each, padded, trained where it has labels.

Files of a corpus are rows in parallel: token ids, and labels, in which -100 marks what is not
trained. The attention mask beside them, 1 for every token, says nothing that lengths do not say.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from numpy.random import RandomState
from numpy.typing import NDArray
from torch import Tensor

from internlm_lib.data.fingerprint import content_sha256
from internlm_lib.data.index_cache import index_sha256
from internlm_lib.data.indexed import field_prefix, token_files
from internlm_lib.errors import InputError

NOT_TRAINED = -100
"""Label of a token whose prediction does not count."""

FIELDS_READ = ("input_ids", "labels")


class Rows(NamedTuple):
    """Two indexed datasets in parallel."""

    ids: IndexedDataset
    labels: IndexedDataset


class InstructionDataset(MegatronDataset):
    """Sample n is row n of a shuffled epoch; every epoch is shuffled by itself.

    Made by BlendedMegatronDatasetBuilder, which splits rows into parts in file order. An epoch's
    order takes milliseconds to draw, so that none is kept. Not for several threads at a time.
    """

    order_sha256: str
    """Of the files' content and of the order of all samples."""

    def __init__(
        self,
        dataset: Rows,
        dataset_path: str,
        indices: NDArray[numpy.int32],
        num_samples: int,
        index_split: Split,
        config: BlendedMegatronDatasetConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self._width = config.sequence_length + 1
        self._epoch, self._order = 0, self._shuffled(0)
        prefix = Path(dataset_path)
        files = [
            file
            for field in FIELDS_READ
            for file in token_files(field_prefix(prefix, "instruction", field))
        ]
        key = {
            "order": "rows, each epoch shuffled",
            "content_sha256": content_sha256(
                files, Path(f"{prefix}.json"), Path(config.path_to_cache)
            ),
            "rows": [int(indices[0]), int(indices[-1]) + 1],
            "seed": config.random_seed,
            "seq_length": config.sequence_length,
            "samples": num_samples,
        }
        self.order_sha256 = index_sha256(key, {"first epoch": self._order})

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: BlendedMegatronDatasetConfig) -> Rows:
        """Raises InputError if labels and token ids do not belong together."""
        ids, labels = (
            field_prefix(Path(dataset_path), "instruction", field) for field in FIELDS_READ
        )
        rows = Rows(IndexedDataset(str(ids)), IndexedDataset(str(labels)))
        if not numpy.array_equal(rows.ids.sequence_lengths, rows.labels.sequence_lengths):
            raise InputError(
                f"{labels}: its rows are not as long as those of {ids.name}: the two files were "
                "not made together; prepare the data again"
            )
        if not numpy.issubdtype(rows.labels.index.dtype, numpy.signedinteger):
            raise InputError(
                f"{labels}: labels are kept as {rows.labels.index.dtype.__name__}, which cannot "
                f"hold {NOT_TRAINED}; prepare the data again with int32 labels"
            )
        return rows

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Rows) -> int:
        return len(low_level_dataset.ids)

    @property
    def truncated_rows(self) -> int:
        """Rows of this part that are longer than a sample, and lose their end."""
        return int((self.dataset.ids.sequence_lengths[self.indices] > self._width).sum())

    @property
    def facts(self) -> dict[str, Any]:
        """For records: how the samples come about."""
        return {
            "kind": "instruction",
            "samples": self.num_samples,
            "rows": len(self.indices),
            "epochs": -(-self.num_samples // len(self.indices)),
            "epochs_shuffled_together": 1,
            "truncated_rows": self.truncated_rows,
        }

    def __len__(self) -> int:
        return int(self.num_samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`tokens`, `labels`, `loss_mask`, `position_ids` [seq_length], as GPTDataset's."""
        row = self._row(int(index))
        length = min(self._width, int(self.dataset.ids.sequence_lengths[row]))
        ids = self.dataset.ids.get(row, length=length)
        labels = self.dataset.labels.get(row, length=length)
        tokens = torch.full((self._width - 1,), self.config.tokenizer.eod, dtype=torch.int64)
        targets = torch.full_like(tokens, NOT_TRAINED)
        tokens[: length - 1] = torch.from_numpy(ids[:-1].astype(numpy.int64))
        targets[: length - 1] = torch.from_numpy(labels[1:].astype(numpy.int64))
        trained = targets != NOT_TRAINED
        return {
            "tokens": tokens,
            "labels": targets * trained,
            "loss_mask": trained.float(),
            "position_ids": torch.arange(self._width - 1),
        }

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        epoch, within = divmod(index, len(self.indices))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return int(self.indices[self._order[within]])

    def _shuffled(self, epoch: int) -> NDArray[Any]:
        """Numbers of the part's rows in the order of an epoch."""
        return RandomState([self.config.random_seed, epoch]).permutation(len(self.indices))


def _fields(prefix: Path) -> list[Path]:
    """Prefixes of the files of each field that is read."""
    return [field_prefix(prefix, "instruction", field) for field in FIELDS_READ]
