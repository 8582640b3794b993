"""What workers of this folder share: the kit's own parts, put together inside of a rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm_lib.data.indexed import Kind
from internlm_lib.devices import select_device
from internlm_lib.experiment.schema import Experiment, Layout
from internlm_lib.run_folder import RunFolder

if TYPE_CHECKING:
    from internlm_lib.data.batches import BatchStream
    from internlm_lib.training.loop import TrainingLoop


@dataclass
class Part:
    """This rank's model and engine, with some weights."""

    engine: Any
    chunks: Any


def build(
    folder: RunFolder, experiment: Experiment, layout: Layout, weights: Path | None = None
) -> Part:
    from internlm_lib.model.build import build_chunks
    from internlm_lib.training.worker import build_engine
    from internlm_lib.weights.megatron import load_weights

    chunks = build_chunks(experiment.model, layout, experiment.training, select_device("cpu"))
    load_weights(chunks, weights or folder.huggingface, experiment.model)
    return Part(build_engine(chunks, layout, experiment), chunks)


def stream(
    folder: RunFolder, experiment: Experiment, layout: Layout, kind: Kind = "pretrain"
) -> "BatchStream":
    """The training batches of this data parallel rank."""
    from megatron.core import parallel_state

    from internlm_lib.data.batches import BatchStream, build_datasets

    training = experiment.training
    data = build_datasets(
        folder.corpus_prefix, experiment.data, training, experiment.model.vocab_size, kind=kind
    )
    return BatchStream(
        data.train, global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=layout.data_parallel_size, device=select_device("cpu").current(),
    )  # fmt: skip


def loop(
    part: Part,
    folder: RunFolder,
    experiment: Experiment,
    layout: Layout,
    record: Callable[..., None],
    *,
    checkpoints: Path | None = None,
    recent_losses: Sequence[float] = (),
    **more: Any,
) -> "TrainingLoop":
    """The training loop around a part; `more` are further fields of it."""
    from internlm_lib.training.checkpoint import CheckpointWriter
    from internlm_lib.training.guard import StepGuard
    from internlm_lib.training.loop import Throughput, TrainingLoop

    device = select_device("cpu")
    fields: dict[str, Any] = {
        "engine": part.engine,
        "chunks": part.chunks,
        "batches": stream(folder, experiment, layout),
        "validation": None,
        "training": experiment.training,
        "optimizer": experiment.optimizer,
        "layout": layout,
        "device": device,
        "throughput": Throughput(layout.world_size, 1.0),
        "record": record,
        "checkpoints": CheckpointWriter(
            checkpoints or folder.path / "unused", folder.experiment, experiment.model,
            device.current(), record, keep=9, asynchronous=True,
        ),
        "facts": {},
        "guard": StepGuard(experiment.training.loss_spike_factor, recent_losses),
        "stop_requested": lambda: False,
    }  # fmt: skip
    return TrainingLoop(**{**fields, **more})
