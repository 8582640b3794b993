"""Token files → batches, in Megatron's data order: the same for every engine and layout."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from internlm_lib.data.indexed import token_files
from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import DataSection, TrainingSection
from internlm_lib.files import sha256_of


@dataclass(frozen=True)
class Batch:
    """One micro-batch. All [micro_batch_size, seq_length]."""

    tokens: Tensor
    """int64 token ids."""
    labels: Tensor
    """int64, the token that follows each."""
    loss_mask: Tensor
    """float32, 1 where a token counts."""
    position_ids: Tensor
    """int64, 0 … seq_length − 1; not reset at document borders, as the predecessor."""


_PARTS = {"training": "first", "validation": "second", "test": "third"}
"""Parts of a corpus, and which number of `data.split` says how large each is."""


@dataclass(frozen=True)
class _Vocabulary:
    """What GPTDataset asks of a tokenizer."""

    vocab_size: int
    eod: int = 2
    unique_identifiers: tuple[str, ...] = ("sentencepiece",)


class Datasets(NamedTuple):
    """Samples of the three parts of a corpus; None for a part that is not read."""

    train: GPTDataset
    valid: GPTDataset | None
    test: GPTDataset | None


def build_datasets(
    prefix: Path, data: DataSection, training: TrainingSection, vocab_size: int
) -> Datasets:
    """Samples of `<prefix>.bin/.idx` for all training steps; with `eval_iters` also for all
    validations, and for the test after the last step unless `data.split` leaves no test part.

    Collective: rank 0 builds the index maps beside the data, the others read them.
    Raises InputError if a part that is asked for holds no whole sample.
    """
    validations = training.train_iters // training.eval_interval + 1
    test_samples = training.eval_iters * training.global_batch_size
    valid_samples = validations * test_samples
    config = GPTDatasetConfig(
        random_seed=training.seed,
        sequence_length=training.seq_length,
        blend=([str(prefix)], None),
        split=data.split,
        path_to_cache=str(_index_folder(prefix)),
        tokenizer=_Vocabulary(vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train_part, valid_part, test_part = config.split_matrix
    asked = {"training": train_part}
    if training.eval_iters:
        asked["validation"] = valid_part
    if training.eval_iters and test_part:
        asked["test"] = test_part
    for name, part in asked.items():
        _check_part(prefix, name, part, data, training)
    # Only the parts that are read: of a part without documents megatron counts epochs for ever.
    config.split_matrix = [asked.get(name) for name in _PARTS]
    return Datasets(
        *BlendedMegatronDatasetBuilder(
            GPTDataset, [training.train_samples, valid_samples, test_samples], lambda: True, config
        ).build()
    )


def _index_folder(prefix: Path) -> Path:
    """Where megatron keeps its index maps: it names them after the path and the settings alone, so
    that those of an earlier corpus at `prefix` would be taken for this one's."""
    return prefix.parent / "index" / sha256_of(token_files(prefix)[1])[:16]


def _check_part(
    prefix: Path,
    name: str,
    part: tuple[float, float] | None,
    data: DataSection,
    training: TrainingSection,
) -> None:
    documents = IndexedDataset(str(prefix))  # closes the file that its lengths are read from
    first, end = (round(bound * len(documents)) for bound in part or (0, 0))  # as megatron rounds
    tokens = int(documents.sequence_lengths[first:end].sum())
    if tokens <= training.seq_length:
        number = _PARTS[name]
        raise InputError(
            f"{prefix}: the {name} part (data.split = {data.split}) holds {tokens} tokens, less "
            f"than one sample of training.seq_length = {training.seq_length} and the token that "
            f"follows; give more data, a shorter sequence or a larger {number} number in data.split"
        )


def data_order_sha256(dataset: GPTDataset) -> str:
    """Hash of the token file and of the order its samples come in."""
    digest = hashlib.sha256()
    for index in (dataset.document_index, dataset.sample_index, dataset.shuffle_index):
        digest.update(index.tobytes())
    with Path(f"{dataset.dataset_path}.bin").open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class BatchStream:
    """Micro-batches of one data parallel rank, in the order of MegatronPretrainingSampler.

    A step takes the samples of the shuffled dataset that follow those consumed before it;
    micro-batch m of data parallel rank d takes the d-th slice of the m-th part of these. Any step
    can be asked for.
    """

    def __init__(
        self,
        dataset: GPTDataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        device: torch.device,
    ) -> None:
        self._dataset = dataset
        self._global = global_batch_size
        self._micro = micro_batch_size
        self._rank = data_parallel_rank
        self._across = micro_batch_size * data_parallel_size
        self._device = device

    def ahead(self) -> "Ahead":
        """The same batches, those of the next step made while one step is taken."""
        return Ahead(self)

    def step(self, index: int) -> Iterator[Batch]:
        """The micro-batches of step `index`, counted from 0, where all steps are full ones."""
        return self.samples(index * self._global, self._global)

    def samples(self, consumed: int, count: int) -> Iterator[Batch]:
        """The micro-batches of samples `consumed` to `consumed + count - 1`; past the end of the
        dataset it starts over. `count` is a multiple of micro-batch size × data parallel size."""
        for part in range(consumed, consumed + count, self._across):
            first = part + self._rank * self._micro
            yield self._batch(range(first, first + self._micro))

    def _batch(self, samples: range) -> Batch:
        items: list[dict[str, Any]] = [self._dataset[i % len(self._dataset)] for i in samples]
        return Batch(
            **{
                name: torch.stack([item[name] for item in items]).to(self._device)
                for name in ("tokens", "labels", "loss_mask", "position_ids")
            }
        )


class Ahead:
    """Batches of a stream, made one step ahead by a thread, in the same order and bit for bit.

    A step that was not foreseen (while the batch ramps up, say) is made when it is asked for. The
    thread is a daemon that lives for one step: it ends with the process, and holds up no end.
    """

    def __init__(self, stream: BatchStream) -> None:
        self._stream = stream
        self._next: _Made | None = None

    def samples(self, consumed: int, count: int) -> Iterator[Batch]:
        """As `BatchStream.samples`; what making them raised is raised here, in its own step.

        The next step is foreseen to follow this one and to be as large.
        """
        made = self._next
        if made is None or made.samples != (consumed, count):
            if made is not None:
                made.join()  # two threads never read the dataset at once
            made = _Made(self._stream, consumed, count)
        batches = made.wait()
        self._next = _Made(self._stream, consumed + count, count)
        yield from batches


class _Made:
    """The batches of one step, in the making."""

    def __init__(self, stream: BatchStream, consumed: int, count: int) -> None:
        self.samples = (consumed, count)
        self._stream = stream
        self._batches: list[Batch] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"batches-{consumed}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._batches = list(self._stream.samples(*self.samples))
        except BaseException as error:
            self._error = error

    def join(self) -> None:
        self._thread.join()

    def wait(self) -> list[Batch]:
        self.join()
        if self._error is not None:
            raise self._error
        return self._batches
