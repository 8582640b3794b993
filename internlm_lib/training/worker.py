"""One rank of a training: `python -m internlm_lib.training.worker RUN_FOLDER ROLE [--profile]`."""

import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm_lib import provenance
from internlm_lib.devices import Device, select_device
from internlm_lib.errors import InputError
from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import Experiment, Layout, ModelSection
from internlm_lib.experiment.variables import those_of
from internlm_lib.files import read_json, sha256_of
from internlm_lib.journal import Journal
from internlm_lib.model.arithmetic import model_flops_per_token, parameter_count
from internlm_lib.ranks.environment import ranks_on_this_node
from internlm_lib.ranks.rank import rank_main
from internlm_lib.ranks.stopping import StopRequest
from internlm_lib.run_folder import RunFolder
from internlm_lib.training.determinism import make_deterministic
from internlm_lib.training.guard import StepGuard
from internlm_lib.training.profile import profiled
from internlm_lib.training.recompute import Choice
from internlm_lib.weights.start import starting_folder

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from internlm_lib.data.batches import Samples
    from internlm_lib.engines.base import Engine


def train_role(folder: RunFolder, role: str, *options: str) -> None:
    """Train one layout of the run's experiment, from the run's weights or its last checkpoint.

    Args:
        options: `--profile` leaves a trace of some steps in the training's folder.
    """
    _, experiment = load_experiment(folder.experiment)
    layout = experiment.layout(role)
    device = select_device(experiment.parallel.device)
    if experiment.training.deterministic_mode:
        make_deterministic(device.name)
    stop = StopRequest()
    device.adapt_megatron()
    _train(folder, role, experiment, layout, device, stop, profile="--profile" in options)


def _train(
    folder: RunFolder,
    role: str,
    experiment: Experiment,
    layout: Layout,
    device: Device,
    stop: StopRequest,
    *,
    profile: bool,
) -> None:
    # These import megatron, which must be adapted to the device first.
    from megatron.core import parallel_state

    from internlm_lib.data.batches import BatchStream, build_datasets
    from internlm_lib.data.corpora import recorded_corpora
    from internlm_lib.engines.stopwatch import time_collectives
    from internlm_lib.model.build import build_chunks
    from internlm_lib.model.parallel import initialize_parallel, is_rank_zero, shutdown
    from internlm_lib.training.activations import decide_recompute
    from internlm_lib.training.checkpoint import CheckpointWriter, restore
    from internlm_lib.training.loop import Throughput, TrainingLoop, held_out_loss
    from internlm_lib.training.resume import find_start
    from internlm_lib.weights.megatron import load_weights, save_weights

    training, files = experiment.training, folder.training(role)
    initialize_parallel(
        layout, device, seed=training.seed,
        timeout_minutes=experiment.parallel.distributed_timeout_minutes,
    )  # fmt: skip
    record = Journal(files.journal).write if is_rank_zero() else _record_nothing
    corpora = recorded_corpora(folder)
    train_data, valid_data, test_data = build_datasets(
        corpora.blend, experiment.data, training, experiment.model.vocab_size, kind=corpora.kind
    )
    chunks = build_chunks(experiment.model, layout, training, device)
    weights = starting_folder(folder, experiment.model)
    hashes = {
        "config_sha256": provenance.sha256_of_experiment(experiment),
        "data_sha256": _order_sha256(train_data),
        "weights_sha256": _weights_sha256(folder, weights, experiment.model),
    }
    start = find_start(files, hashes, record)
    load_weights(chunks, start.checkpoint or weights, experiment.model)
    choice = decide_recompute(chunks, experiment, layout, device, files.recompute)
    engine = build_engine(chunks, layout, experiment)
    if start.checkpoint:
        restore(engine, chunks, start.checkpoint, experiment.model)
    if profile:
        engine = profiled(engine, files.profile, device)
    if device.name == "cpu":
        time_collectives()

    stream = partial(
        BatchStream,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=layout.data_parallel_size,
        device=device.current(),
    )
    begin = time.time()
    record(
        "start",
        **_start(role, experiment, layout, device, choice, hashes, folder.tokenizer),
        data=train_data.facts,
        first_step=start.position.step + 1,
        resumed_from=start.checkpoint.name if start.checkpoint else None,
        steps_repeated=start.steps_repeated,
    )
    TrainingLoop(
        engine=engine,
        chunks=chunks,
        batches=stream(train_data).ahead(),
        validation=stream(valid_data) if valid_data else None,
        training=training,
        optimizer=experiment.optimizer,
        layout=layout,
        device=device,
        throughput=Throughput(
            layout.world_size, model_flops_per_token(experiment.model, training.seq_length)
        ),
        record=record,
        checkpoints=CheckpointWriter(
            files.checkpoints, folder.experiment, experiment.model, device.current(), record,
            keep=training.keep_checkpoints, asynchronous=training.async_save,
        ),
        facts={"role": role, "layout": layout.label, **hashes},
        guard=StepGuard(training.loss_spike_factor, start.recent_losses),
        stop_requested=lambda: stop.requested,
        position=start.position,
    ).run()  # fmt: skip
    with engine.whole_weights() as whole:
        save_weights(whole, files.checkpoint, experiment.model)
    if test_data:
        loss = held_out_loss(engine, stream(test_data), 0, training, layout)
        record("test", step=training.train_iters, loss=loss)
    record("end", status="done", seconds=time.time() - begin)
    shutdown()


def build_engine(chunks: "list[GPTModel]", layout: Layout, experiment: Experiment) -> "Engine":
    """The engine of a layout around this rank's part of the model (see `model.build_chunks`)."""
    if layout.engine == "deepspeed":
        from internlm_lib.engines.zero import ZeroEngine

        (gpt,) = chunks  # no pipeline, hence no interleaved one
        return ZeroEngine(gpt, layout, experiment.training, experiment.optimizer)
    from internlm_lib.engines.megatron import MegatronEngine

    return MegatronEngine(chunks, layout, experiment.training, experiment.optimizer)


def _record_nothing(event: str, **fields: Any) -> None:
    """What ranks other than the first write."""


def _order_sha256(train_data: "Samples") -> str:
    """What every rank reads; raises InputError on one that reads something else. Collective."""
    from internlm_lib.training.agreement import from_rank_zero

    expected = from_rank_zero(lambda: train_data.order_sha256)
    if train_data.order_sha256 != expected:
        raise InputError(
            f"this rank reads other data than the first one (order {train_data.order_sha256[:12]}… "
            f"instead of {expected[:12]}…): every node needs the run's folder, and all data, at "
            "the same path of one shared file system"
        )
    return expected


def _weights_sha256(folder: RunFolder, weights: Path, model: ModelSection) -> str:
    """What 02_convert found, or, where it has not run, this job itself; every rank calls it."""
    if folder.conversion_record.exists():
        found: str = read_json(folder.conversion_record)["weights_sha256"]
        return found
    from internlm_lib.weights.megatron import hash_over_ranks

    return hash_over_ranks(weights, model)


def _start(
    role: str,
    experiment: Experiment,
    layout: Layout,
    device: Device,
    choice: Choice | None,
    hashes: dict[str, str],
    tokenizer: Path,
) -> dict[str, Any]:
    """What the `start` event says a training is."""
    import torch

    training = experiment.training
    checkout = Path(__file__).resolve().parents[2]
    return {
        "role": role,
        "engine": layout.engine,
        "layout": layout.label,
        "world_size": layout.world_size,
        "device": device.name,
        "device_name": device.description(),
        # One per rank: what the rates per device are divided by. On a CPU ranks share it.
        "device_count": layout.world_size,
        "devices_per_node": ranks_on_this_node() or layout.world_size,
        "precision": training.precision,
        "seed": training.seed,
        "deterministic_mode": torch.are_deterministic_algorithms_enabled(),
        "environment": those_of(device.name, os.environ),
        "predecessor_decay": experiment.optimizer.predecessor_decay,
        "train_iters": training.train_iters,
        "tokens_per_step": training.global_batch_size * training.seq_length,
        "seq_length": training.seq_length,
        "global_batch_size": training.global_batch_size,
        "micro_batch_size": training.micro_batch_size,
        "parameters": parameter_count(experiment.model),
        "model": experiment.model.shape,
        "recompute": training.recompute_policy,
        "packages": provenance.package_versions(),
        "recompute_layers": choice.layers if choice else None,
        "tags": {
            **hashes,
            "tokenizer_sha256": sha256_of(tokenizer) if tokenizer.exists() else None,
            "environment_sha256": provenance.environment_sha256(),
            "git_commit": provenance.git_state(checkout)["git_commit"],
        },
    }


if __name__ == "__main__":
    rank_main(train_role)
