"""Token files → batches, in Megatron's data order: the same for every engine and layout."""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from torch import Tensor

from internlm_lib.data.blend import BlendBuilder
from internlm_lib.data.indexed import Kind
from internlm_lib.data.instruction import InstructionDataset
from internlm_lib.data.parts import PARTS, check_parts, parts_to_read
from internlm_lib.data.pretrain import PretrainDataset
from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import DataSection, TrainingSection


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


class Samples(Protocol):
    """Samples of one part of a corpus, or of a blend, in the order in which they are taken."""

    @property
    def order_sha256(self) -> str:
        """Hash of what the token files hold and of the order of the samples. The same wherever the
        files lie and whatever layout or device reads them; another one for other content, split,
        seed, `seq_length`, number of samples or kind of data."""

    @property
    def facts(self) -> dict[str, Any]:
        """For records: kind, samples, epochs … (JSON)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """The fields of `Batch`, each [seq_length]."""


class Datasets(NamedTuple):
    """Samples of the three parts of a corpus; None for a part that is not read."""

    train: Samples
    valid: Samples | None
    test: Samples | None


@dataclass(frozen=True)
class _Vocabulary:
    """What megatron-core's datasets ask of a tokenizer."""

    vocab_size: int
    eod: int = 2
    unique_identifiers: tuple[str, ...] = ("sentencepiece",)


def build_datasets(
    source: Path | Sequence[tuple[float, Path]],
    data: DataSection,
    training: TrainingSection,
    vocab_size: int,
    *,
    kind: Kind = "pretrain",
    index_folder: Path | None = None,
) -> Datasets:
    """Samples for all training steps; with `eval_iters` also for all validations, and for the test
    after the last step unless `data.split` leaves no test part.

    Collective: rank 0 checks and makes what the others read.

    Args:
        source: prefix of a corpus' files, or weights and prefixes of several to be mixed.
        kind: `instruction` reads rows with labels (see `data/instruction.py`), a sample each.
        index_folder: where the order of samples is kept; by default `index/` beside the (first)
            corpus. What is in it can be made again.
    Raises:
        InputError: files are missing, damaged or do not belong together, a weight is not positive,
            or a part that is asked for holds no sample.
    """
    prefixes, weights = _corpora(source)
    test_samples = training.eval_iters * training.global_batch_size
    validations = training.train_iters // training.eval_interval + 1
    config = GPTDatasetConfig(
        random_seed=training.seed,
        sequence_length=training.seq_length,
        blend=([str(prefix) for prefix in prefixes], weights),
        split=data.split,
        path_to_cache=str(index_folder or prefixes[0].parent / "index"),
        tokenizer=_Vocabulary(vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    parts = parts_to_read(config.split_matrix, training)
    for prefix in prefixes:
        check_parts(prefix, kind, parts, data, training)
    # Only the parts that are read: of a part without documents megatron counts epochs for ever.
    config.split_matrix = [parts.get(name) for name in PARTS]
    return Datasets(
        *BlendBuilder(
            InstructionDataset if kind == "instruction" else PretrainDataset,
            [training.train_samples, validations * test_samples, test_samples],
            lambda: True,
            config,
        ).build()
    )


def _corpora(
    source: Path | Sequence[tuple[float, Path]],
) -> tuple[Sequence[Path], Sequence[float] | None]:
    """Prefixes, and weights if there are any."""
    if isinstance(source, Path):
        return [source], None
    for weight, prefix in source:
        if not 0 < weight < math.inf:
            raise InputError(
                f"{prefix}: its weight is {weight}; a corpus of a blend needs one above 0"
            )
    if not source:
        raise InputError("a blend of no corpus; give at least one weight and prefix")
    return [prefix for _, prefix in source], [float(weight) for weight, _ in source]


class BatchStream:
    """Micro-batches of one data parallel rank, in the order of MegatronPretrainingSampler.

    A step takes the samples of the shuffled dataset that follow those consumed before it;
    micro-batch m of data parallel rank d takes the d-th slice of the m-th part of these. Any step
    can be asked for.
    """

    def __init__(
        self,
        dataset: Samples,
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
