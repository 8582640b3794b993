"""The formats weights come in, each a reader and a writer over `layout`'s table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.weights import classic, huggingface, torch_dist, training_state, zero
from internlm_lib.weights.checkpoint import Checkpoint, assemble
from internlm_lib.weights.layout import huggingface_shapes
from internlm_lib.weights.model_config import CONFIG, read_model
from internlm_lib.weights.plan import PlannedFile, Target
from internlm_lib.weights.storage import StoredTensor


@dataclass(frozen=True)
class Reader:
    recognises: Callable[[Path], bool]
    open: Callable[[Path, ModelSection | None], Checkpoint]


@dataclass(frozen=True)
class Format(Reader):
    plan: Callable[[Target], list[PlannedFile]]
    create: Callable[[Path, PlannedFile, Target], None]
    """Write a file with holes in the place of its tensors."""
    locate: Callable[[Path, PlannedFile, Target], Mapping[str, StoredTensor]]
    """Where the tensors of a file that `create` wrote lie."""
    finish: Callable[[Path, Sequence[PlannedFile], Target], None]
    """Write what makes the files a checkpoint that others recognise."""
    layouts: bool = True
    """Whether its files depend on tensor and pipeline parallelism."""


FORMATS = {
    "huggingface": Format(
        huggingface.is_huggingface,
        huggingface.open_huggingface,
        huggingface.plan_huggingface,
        huggingface.create_huggingface,
        huggingface.locate_huggingface,
        huggingface.finish_huggingface,
        layouts=False,
    ),
    "megatron": Format(
        torch_dist.is_torch_dist,
        torch_dist.open_torch_dist,
        torch_dist.plan_torch_dist,
        torch_dist.create_torch_dist,
        torch_dist.locate_torch_dist,
        torch_dist.finish_torch_dist,
        layouts=False,
    ),
    "classic": Format(
        classic.is_classic,
        classic.open_classic,
        classic.plan_classic,
        classic.create_classic,
        classic.locate_classic,
        classic.finish_classic,
    ),
    "deepspeed": Format(
        zero.is_deepspeed,
        zero.open_deepspeed,
        zero.plan_deepspeed,
        zero.create_deepspeed,
        zero.locate_deepspeed,
        zero.finish_deepspeed,
    ),
}

"""What can be written, too."""

READERS: dict[str, Reader] = {
    # First: it has a safetensors file and a config.json, as a Hugging Face folder has.
    "training": Reader(training_state.is_training_state, training_state.open_training_state),
    **FORMATS,
}


def open_checkpoint(path: Path, model: ModelSection | None = None) -> Checkpoint:
    """Weights in any of the formats, which is recognised.

    Args:
        model: what they must be; by default what a config.json beside them says, or the preset of
            their shape.
    Raises:
        InputError: if no format fits, or they are not this model's.
    """
    if not path.is_dir():
        raise InputError(f"{path} is no folder; give the folder of a checkpoint")
    for known in READERS.values():
        if known.recognises(path):
            if model is None and (path / CONFIG).is_file():
                model = read_model(path / CONFIG)
            return known.open(path, model)
    if (path / CONFIG).is_file():
        return huggingface.open_huggingface(path, model)  # which says what is missing
    raise InputError(
        f"{path} holds no checkpoint that is known. Looked for: safetensors or pytorch_model files "
        "(huggingface), .metadata (megatron), latest_checkpointed_iteration.txt or mp_rank_* "
        "folders (classic), latest or mp_rank_*_model_states.pt (deepspeed), state.json (training)"
    )


def checkpoints_below(path: Path) -> list[Path]:
    """`path` itself, if it is a checkpoint; else those in the folders below it, of a run say.

    Raises InputError if there are none.
    """
    if not path.is_dir():
        raise InputError(f"{path} is no folder; give the folder of a checkpoint or of a run")
    if is_checkpoint(path) or (path / CONFIG).is_file():
        return [path]
    # Not a rank's or an iteration's folder: what lies inside of a checkpoint is no other one.
    found: list[Path] = []
    for folder in sorted(p for p in path.rglob("*") if p.is_dir() and not _hidden(p, path)):
        if is_checkpoint(folder) and not any(above in folder.parents for above in found):
            found.append(folder)
    if not found:
        raise InputError(f"{path} holds no checkpoint, and neither does any folder below it")
    return found


def is_checkpoint(path: Path) -> bool:
    return any(known.recognises(path) for known in READERS.values())


def open_for_writing(
    folder: Path, name: str, files: Sequence[PlannedFile], target: Target
) -> Checkpoint:
    """The tensors of files that a format created, to be filled in."""
    stored = []
    for file in files:
        located = FORMATS[name].locate(folder, file, target)
        stored += [(tensor, located[tensor.name]) for tensor in file.tensors]
    tensors = assemble(huggingface_shapes(target.model), stored)
    paths = (folder / file.path for file in files)
    layout = target.split.label if FORMATS[name].layouts else "whole"
    return Checkpoint(folder, name, layout, target.model, tensors, paths, writable=True)


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
