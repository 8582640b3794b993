"""One rank of a training: `python -m internlm_lib.training.worker RUN_FOLDER ROLE [--profile]`."""

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm_lib import provenance
from internlm_lib.devices import Device, select_device
from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import Experiment, Layout, ModelSection
from internlm_lib.files import read_json
from internlm_lib.journal import Journal
from internlm_lib.model.arithmetic import model_flops_per_token, parameter_count
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder
from internlm_lib.training.profile import profiled
from internlm_lib.training.recompute import RecomputePlan, plan_recompute
from internlm_lib.weights.start import starting_folder

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from internlm_lib.engines.base import Engine


def train_role(folder: RunFolder, role: str, *options: str) -> None:
    """Train one layout of the run's experiment from the run's weights.

    Args:
        options: `--profile` leaves a trace of some steps in the training's folder.
    """
    _, experiment = load_experiment(folder.experiment)
    layout = experiment.layout(role)
    device = select_device(experiment.parallel.device)
    device.adapt_megatron()
    _train(folder, role, experiment, layout, device, profile="--profile" in options)


def _train(
    folder: RunFolder,
    role: str,
    experiment: Experiment,
    layout: Layout,
    device: Device,
    *,
    profile: bool,
) -> None:
    # These import megatron, which must be adapted to the device first.
    from megatron.core import parallel_state

    from internlm_lib.data.batches import BatchStream, build_datasets, data_order_sha256
    from internlm_lib.engines.stopwatch import time_collectives
    from internlm_lib.model.build import build_gpt_model
    from internlm_lib.model.parallel import initialize_parallel, is_rank_zero, shutdown
    from internlm_lib.training.loop import Throughput, train
    from internlm_lib.weights.megatron import load_weights, save_weights

    training, files = experiment.training, folder.training(role)
    initialize_parallel(
        layout, device, seed=training.seed,
        timeout_minutes=experiment.parallel.distributed_timeout_minutes,
    )  # fmt: skip
    train_data, valid_data = build_datasets(
        folder.corpus_prefix, experiment.data, training, experiment.model.vocab_size
    )
    plan = plan_recompute(experiment, layout)
    gpt = build_gpt_model(
        experiment.model, layout, training, device,
        recompute_num_layers=plan.num_layers if plan else 0,
    )  # fmt: skip
    weights = starting_folder(folder, experiment.model)
    load_weights(gpt, weights, experiment.model)
    weights_sha256 = _weights_sha256(folder, weights, experiment.model)
    engine = _engine(gpt, layout, experiment)
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
    throughput = Throughput(
        training.global_batch_size * training.seq_length,
        layout.world_size,
        model_flops_per_token(experiment.model, training.seq_length),
    )

    def save(path: Path) -> None:
        with engine.whole_weights() as weights:
            save_weights(weights, path, experiment.model)

    record = Journal(files.journal).write if is_rank_zero() else _record_nothing
    begin = time.time()
    if is_rank_zero():
        data_sha256 = data_order_sha256(train_data)
        hashes = {"data_sha256": data_sha256, "weights_sha256": weights_sha256}
        record("start", **_start(role, experiment, layout, device, plan, hashes))
    train(
        engine, stream(train_data).ahead(), stream(valid_data) if valid_data else None,
        training=training, layout=layout, device=device, throughput=throughput, record=record,
        save=lambda step: save(files.checkpoint_of(step)),
    )  # fmt: skip
    save(files.checkpoint)
    record("end", status="done", seconds=time.time() - begin)
    shutdown()


def _engine(gpt: "GPTModel", layout: Layout, experiment: Experiment) -> "Engine":
    if layout.engine == "deepspeed":
        from internlm_lib.engines.zero import ZeroEngine

        return ZeroEngine(gpt, layout, experiment.training, experiment.optimizer)
    from internlm_lib.engines.megatron import MegatronEngine

    return MegatronEngine(gpt, layout, experiment.training, experiment.optimizer)


def _record_nothing(event: str, **fields: Any) -> None:
    """What ranks other than the first write."""


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
    plan: RecomputePlan | None,
    hashes: dict[str, str],
) -> dict[str, Any]:
    """What the `start` event says a training is."""
    training = experiment.training
    checkout = Path(__file__).resolve().parents[2]
    return {
        "role": role,
        "engine": layout.engine,
        "layout": layout.label,
        "world_size": layout.world_size,
        "device": device.name,
        "device_name": device.description(),
        "precision": training.precision,
        "train_iters": training.train_iters,
        "first_step": 1,
        "tokens_per_step": training.global_batch_size * training.seq_length,
        "parameters": parameter_count(experiment.model),
        "recompute_num_layers": plan.num_layers if plan else None,
        "tags": {
            "config_sha256": provenance.sha256_of_experiment(experiment),
            **hashes,
            "environment_sha256": provenance.environment_sha256(),
            "git_commit": provenance.git_state(checkout)["git_commit"],
        },
    }


if __name__ == "__main__":
    rank_main(train_role)
