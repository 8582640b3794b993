"""A run's model, opened on all ranks for reading: which layout, which weights, which processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from internlm_lib.devices import select_device
from internlm_lib.experiment.schema import Experiment, Layout, ModelSection
from internlm_lib.run_folder import RunFolder
from internlm_lib.weights.start import starting_folder

if TYPE_CHECKING:
    from internlm_lib.generation.parallel_model import ParallelModel


def inference_layout(layout: Layout) -> Layout:
    """A training layout's tensor and pipeline split, alone: one replica, whole sequences, one
    chunk of layers per stage."""
    return Layout(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
    )


def weight_sets(folder: RunFolder, model: ModelSection) -> dict[str, Path]:
    """The checkpoints before and after the candidate's training."""
    trained = folder.training("candidate").checkpoint
    return {"before": starting_folder(folder, model), "after": trained}


@contextmanager
def open_model(experiment: Experiment) -> Iterator["ParallelModel"]:
    """This rank's part of the model, its weights undefined until `load_weights` fills `.gpt`.

    Every rank of `inference_layout(experiment.parallel.candidate)` calls it.
    """
    layout = inference_layout(experiment.parallel.candidate)
    device = select_device(experiment.parallel.device)
    device.adapt_megatron()
    # These import megatron, which must be adapted to the device first.
    from internlm_lib.generation.parallel_model import ParallelModel
    from internlm_lib.model.build import build_gpt_model
    from internlm_lib.model.parallel import initialize_parallel, shutdown

    initialize_parallel(
        layout, device, seed=experiment.training.seed,
        timeout_minutes=experiment.parallel.distributed_timeout_minutes,
    )  # fmt: skip
    gpt = build_gpt_model(experiment.model, layout, experiment.training, device)
    yield ParallelModel(gpt, experiment.model)
    shutdown()
