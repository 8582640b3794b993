"""Where a run's weights come from, and what its trainings start from; imports nothing heavy."""

from pathlib import Path

from internlm_lib.experiment.schema import ModelSection
from internlm_lib.run_folder import RunFolder


def source_folder(folder: RunFolder, model: ModelSection) -> Path:
    """The checkpoint that `model.weights` names, or the one that random weights are drawn into."""
    return folder.root / model.weights if model.weights else folder.huggingface


def starting_folder(folder: RunFolder, model: ModelSection) -> Path:
    """The checkpoint that ranks load: the source itself, or what 02_convert made of it."""
    return source_folder(folder, model) if model.direct_start else folder.megatron
