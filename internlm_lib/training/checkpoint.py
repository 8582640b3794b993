"""A training's state on disk: written while it goes on, whole or not at all, found and filled in.

A checkpoint is a folder `step-0000100`: a file of state per rank (`weights/training_state.py`),
`state.json`, the experiment, the model's config.json, and a manifest with the SHA-256 of every
file. It is written under a hidden name; the rename is what makes it a checkpoint, and `latest`
names it after that. Ranks on several nodes need the folder on a shared file system.

Import only after `Device.adapt_megatron()`.
"""

import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from safetensors.torch import load_file, save_file
from torch import Tensor

from internlm_lib.engines.base import Engine
from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.files import read_json, sha256_of, sync, write_json, write_text
from internlm_lib.model.arithmetic import padded_vocab_size
from internlm_lib.model.parallel import is_rank_zero
from internlm_lib.run_folder import saved_states, state_name
from internlm_lib.training.agreement import any_rank, on_rank_zero
from internlm_lib.weights.layout import TensorRule, local_shape, local_tensor, rules
from internlm_lib.weights.manifest import read_manifest, write_manifest
from internlm_lib.weights.megatron import GPT, named_parameters
from internlm_lib.weights.model_config import CONFIG, GENERATION_CONFIG, write_model
from internlm_lib.weights.training_state import (
    KINDS,
    STATE,
    Place,
    open_training_state,
    rank_file,
    write_rank,
)

LATEST, BEST = "latest", "best"
EXPERIMENT = "experiment.yaml"
_TORCH = "torch"

Record = Callable[..., None]


@dataclass(frozen=True)
class Position:
    """How far a training has come."""

    step: int = 0
    """Updates taken."""
    consumed_samples: int = 0
    """Samples of the shuffled data that are used up, those of steps left out included."""
    skipped_samples: int = 0
    """Of them, those of fp16 overflows: they have not moved the schedule."""
    best_loss: float | None = None
    """Lowest validation loss so far, in nats per token."""


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    step: int
    folder: Path
    begin: float
    stall_seconds: float = 0.0
    thread: threading.Thread | None = None
    files: dict[str, Any] = field(default_factory=dict)
    """Size and SHA-256 of each file this rank has written."""
    error: str = ""


class CheckpointWriter:
    """One rank's part in writing checkpoints. All public methods are collective."""

    def __init__(
        self,
        folder: Path,
        experiment: Path,
        model: ModelSection,
        device: torch.device,
        record: Record,
        *,
        keep: int,
        asynchronous: bool,
    ) -> None:
        """Args:
        folder: of all checkpoints of the training.
        experiment: file to lay beside the weights.
        record: writes to the journal on rank 0.
        keep: how many of the newest checkpoints stay; the best stays besides.
        asynchronous: write while the training goes on.
        """
        self._folder = folder
        self._experiment = experiment
        self._model = model
        self._device = device
        self._record = record
        self._keep = keep
        self._asynchronous = asynchronous
        self._pending: _Pending | None = None

    def save(self, engine: Engine, gpt: GPT, position: Position, facts: Mapping[str, Any]) -> None:
        """Copy the state and write it, after an earlier one is done.

        Args:
            facts: what `state.json` says beside the position and the engine's counters; `best`:
                whether no checkpoint has had a lower validation loss.
        """
        self.finish()
        begin = time.perf_counter()
        pending = _Pending(
            position.step, self._folder / f".{state_name(position.step)}.saving", time.time()
        )
        if error := on_rank_zero(lambda: _make_empty(pending.folder)):
            self._give_up(pending, error)
            return
        tensors, places = _own_elements(engine, gpt, self._model)
        state = {**vars(position), "engine": engine.counters(), **facts}
        pending.thread = threading.Thread(
            target=self._write,
            args=(pending, tensors, places, _random_state(), state),
            name="checkpoint",
        )
        pending.thread.start()
        pending.stall_seconds = time.perf_counter() - begin
        self._pending = pending
        if not self._asynchronous:
            self.finish()

    def poll(self) -> None:
        """Conclude the checkpoint that is being written, if all ranks have done their part."""
        pending = self._pending
        if pending is None or pending.thread is None:
            return
        writing, failed = any_rank(self._device, pending.thread.is_alive(), bool(pending.error))
        if not writing:
            self._pending = None
            self._conclude(pending, failed)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written."""
        if (pending := self._pending) and pending.thread:
            begin = time.perf_counter()
            pending.thread.join()
            pending.stall_seconds += time.perf_counter() - begin
            self.poll()

    def _write(
        self,
        pending: _Pending,
        tensors: dict[str, Tensor],
        places: dict[str, Place],
        random: dict[str, Tensor],
        state: dict[str, Any],
    ) -> None:
        """Runs beside the training. An error is kept: a full disk must not end the training."""
        try:
            rank = torch.distributed.get_rank()
            write_rank(pending.folder / rank_file(rank), tensors, places)
            save_file(random, pending.folder / _random_file(rank))
            names = [rank_file(rank), _random_file(rank)]
            if rank == 0:
                write_model(pending.folder, self._model, "float32")
                shutil.copyfile(self._experiment, pending.folder / EXPERIMENT)
                write_json(pending.folder / STATE, state)
                names += [CONFIG, GENERATION_CONFIG, EXPERIMENT, STATE]
            for file in (pending.folder / name for name in names):
                sync(file)
                pending.files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        except Exception as error:
            pending.error = f"{type(error).__name__}: {error}"

    def _conclude(self, pending: _Pending, failed: bool) -> None:
        everyone: list[_Pending] = [pending] * torch.distributed.get_world_size()
        written = _Pending(pending.step, pending.folder, pending.begin)
        written.files, written.error = pending.files, pending.error
        torch.distributed.all_gather_object(everyone, written)
        error = next((other.error for other in everyone if other.error), "")
        if not failed:
            files = {name: entry for other in everyone for name, entry in other.files.items()}
            error = on_rank_zero(lambda: self._commit(pending, files))
        if error:
            self._give_up(pending, error)

    def _commit(self, pending: _Pending, files: Mapping[str, Any]) -> None:
        """The manifest, the rename, the pointers; older checkpoints are removed only then."""
        final = self._folder / state_name(pending.step)
        described = {"format": "training", "layout": "ranks", "files": dict(files)}
        write_manifest(pending.folder, described)
        sync(pending.folder, recursive=False)
        shutil.rmtree(final, ignore_errors=True)  # of an attempt that this one replaces
        pending.folder.replace(final)
        sync(self._folder, recursive=False)
        self._record(
            "checkpoint", step=pending.step, path=final.name,
            bytes=sum(entry["bytes"] for entry in files.values()),
            seconds=time.time() - pending.begin, stall_seconds=pending.stall_seconds,
        )  # fmt: skip
        write_text(self._folder / LATEST, final.name)
        if read_json(final / STATE)["best"]:
            write_text(self._folder / BEST, final.name)
        self._prune()

    def _prune(self) -> None:
        pointer = self._folder / BEST
        best = pointer.read_text() if pointer.is_file() else ""
        for old in saved_states(self._folder)[self._keep :]:
            if old.name != best:
                shutil.rmtree(old)

    def _give_up(self, pending: _Pending, error: str) -> None:
        self._record("checkpoint_failed", step=pending.step, error=error)
        if is_rank_zero():
            shutil.rmtree(pending.folder, ignore_errors=True)
            print(
                f"WARNING: no checkpoint of step {pending.step} was written: {error}. The training "
                "goes on; older checkpoints are as they were.",
                file=sys.stderr,
            )


def remove_unfinished(folder: Path) -> None:
    """Remove what a training that was killed was writing. Collective."""
    if is_rank_zero():
        for path in folder.glob(".step-*.saving"):
            shutil.rmtree(path, ignore_errors=True)
    torch.distributed.barrier()


def newest_whole(folder: Path, record: Record) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; None if there is none.

    Collective: each rank hashes its share of the files. One that is damaged is named loudly, and
    the one before it is tried.
    """
    found: list[Any] = [saved_states(folder)]
    torch.distributed.broadcast_object_list(found)
    for path in found[0]:
        problems: list[str] = [""] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(problems, _damage(path))
        problem = next(filter(None, problems), "")
        if not problem:
            return path
        record("broken_checkpoint", path=path.name, error=problem)
        print(f"WARNING: {path} is damaged and left out: {problem}", file=sys.stderr)
    return None


def read_position(path: Path) -> tuple[Position, dict[str, Any]]:
    """How far a checkpoint has come, and everything its state.json says."""
    state: dict[str, Any] = read_json(path / STATE)
    return Position(**{name: state[name] for name in vars(Position())}), state


def restore(engine: Engine, gpt: GPT, path: Path, model: ModelSection) -> None:
    """Fill the optimizer from a checkpoint of any layout and engine.

    The model's weights are loaded from it before the engine is built, as from any checkpoint.
    """
    places = _places(gpt, model)
    own = {parameter: name for name, parameter in named_parameters(gpt).items()}
    # Kind by kind, and one parameter at a time: never more than a tensor beside the state itself.
    fragments = sorted(engine.fragments(), key=lambda fragment: KINDS.index(fragment.kind))
    for kind in KINDS:
        with open_training_state(path, model, kind) as state, torch.no_grad():
            for fragment in (f for f in fragments if f.kind == kind):
                rule, place, padded = places[own[fragment.parameter]]
                whole = local_tensor(rule, state.read, place.tp_rank, place.tp_size, padded)
                end = fragment.start + fragment.value.numel()
                fragment.value.copy_(whole.view(-1)[fragment.start : end])
    engine.set_counters(read_json(path / STATE)["engine"])
    _set_random_state(path)


def _own_elements(
    engine: Engine, gpt: GPT, model: ModelSection
) -> tuple[dict[str, Tensor], dict[str, Place]]:
    """Copies of what this rank is to write: every element is written by exactly one rank."""
    known = _places(gpt, model)
    names = {parameter: name for name, parameter in named_parameters(gpt).items()}
    rank = parallel_state.get_data_parallel_rank()
    size = parallel_state.get_data_parallel_world_size()
    tensors: dict[str, Tensor] = {}
    places: dict[str, Place] = {}
    for fragment in engine.fragments():
        name = names[fragment.parameter]
        rule, place, _ = known[name]
        if rule.split == "replicated" and place.tp_rank:
            continue
        start, value = fragment.start, fragment.value
        if fragment.shared:
            count = value.numel()
            start, stop = rank * count // size, (rank + 1) * count // size
            value = value[start:stop]
        if value.numel():
            tensors[f"{fragment.kind}/{name}"] = value.detach().to("cpu", copy=True)
            places[name] = Place(place.tp_rank, place.tp_size, place.local_shape, start)
    return tensors, places


def _places(gpt: GPT, model: ModelSection) -> dict[str, tuple[TensorRule, Place, int]]:
    """Of each parameter of this rank: its rule, its part, and the padded vocabulary's size."""
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    padded = padded_vocab_size(model, tp_size)
    parameters = named_parameters(gpt)
    return {
        rule.name: (rule, Place(tp_rank, tp_size, local_shape(rule, tp_size, padded), 0), padded)
        for rule in rules(model)
        if rule.name in parameters
    }


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _damage(path: Path) -> str:
    """What is wrong with this rank's share of a checkpoint's files, or ""."""
    try:
        manifest = read_manifest(path) or {"files": {}}
    except InputError as error:
        return str(error)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name, entry in sorted(manifest["files"].items())[rank::size]:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"] or sha256_of(file) != entry["sha256"]:
            return f"{name} is not what was written"
    return ""


def _random_state() -> dict[str, Tensor]:
    """States of this rank's random number generators, uint8."""
    trackers: dict[str, Tensor] = tensor_parallel.get_cuda_rng_tracker().get_states()
    states = {_TORCH: torch.get_rng_state(), **trackers}
    return {name: state.cpu() for name, state in states.items()}


def _set_random_state(path: Path) -> None:
    """Of the same rank; another number of ranks starts from the seed, and nothing is drawn."""
    if len(list(path.glob("random-*"))) == torch.distributed.get_world_size():
        states = load_file(path / _random_file(torch.distributed.get_rank()))
        torch.set_rng_state(states.pop(_TORCH))
        tensor_parallel.get_cuda_rng_tracker().set_states(states)


def _random_file(rank: int) -> str:
    return f"random-{rank:05}.safetensors"
