"""One rank of a training: `python -m internlm_lib.training.worker ROOT RUN ROLE` under torchrun."""

import sys
import time
from pathlib import Path
from typing import Any

from internlm_lib import provenance
from internlm_lib.devices import Device, select_device
from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import Experiment, Layout, Role
from internlm_lib.journal import Journal
from internlm_lib.model.arithmetic import model_flops_per_token, parameter_count
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder


def train_role(folder: RunFolder, role: Role) -> None:
    """Train one layout of the run's experiment from the run's converted weights."""
    _, experiment = load_experiment(folder.experiment)
    layout = experiment.parallel.layout(role)
    assert layout is not None, f"{folder.experiment}: no parallel.{role}"
    device = select_device(experiment.parallel.device)
    device.adapt_megatron()
    _train(folder, role, experiment, layout, device)


def _train(
    folder: RunFolder, role: Role, experiment: Experiment, layout: Layout, device: Device
) -> None:
    # These import megatron, which must be adapted to the device first.
    from megatron.core import parallel_state

    from internlm_lib.data.batches import BatchStream, build_datasets, data_order_sha256
    from internlm_lib.model.build import build_gpt_model
    from internlm_lib.model.parallel import initialize_parallel, is_rank_zero, shutdown
    from internlm_lib.training.loop import Throughput, train
    from internlm_lib.weights.megatron import load_weights

    training = experiment.training
    initialize_parallel(
        layout, device, seed=training.seed,
        timeout_minutes=experiment.parallel.distributed_timeout_minutes,
    )  # fmt: skip
    datasets = build_datasets(
        folder.corpus_prefix, experiment.data, training, experiment.model.vocab_size
    )
    gpt = build_gpt_model(experiment.model, layout, training, device)
    load_weights(gpt, folder.megatron)
    engine = _engine(gpt, layout, experiment)

    train_batches, valid_batches = (
        dataset
        and BatchStream(
            dataset,
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=layout.data_parallel_size,
            device=device.current(),
        )
        for dataset in datasets
    )
    journal = Journal(folder.training(role).journal) if is_rank_zero() else None
    record = journal.write if journal else lambda *args, **fields: None
    throughput = Throughput(
        training.global_batch_size * training.seq_length,
        layout.world_size,
        model_flops_per_token(experiment.model, training.seq_length),
    )
    begin = time.time()
    if journal:
        journal.write("start", **_identity(folder, role, experiment, layout, device),
                      data_sha256=data_order_sha256(datasets[0]))  # fmt: skip
    train(
        engine, train_batches, valid_batches, training=training, layout=layout, device=device,
        throughput=throughput, record=record,
    )  # fmt: skip
    engine.save_weights(folder.training(role).checkpoint)
    record("end", status="done", seconds=time.time() - begin)
    shutdown()


def _engine(gpt: Any, layout: Layout, experiment: Experiment) -> Any:
    if layout.engine == "deepspeed":
        from internlm_lib.engines.zero import ZeroEngine

        return ZeroEngine(gpt, layout, experiment.training, experiment.optimizer)
    from internlm_lib.engines.megatron import MegatronEngine

    return MegatronEngine(gpt, layout, experiment.training, experiment.optimizer)


def _identity(
    folder: RunFolder, role: Role, experiment: Experiment, layout: Layout, device: Device
) -> dict[str, Any]:
    """What the `start` event says a training is."""
    training = experiment.training
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
    }


def main() -> None:
    root, run, role = sys.argv[1:]
    folder = RunFolder.of(run, Path(root))
    rank_main(lambda: train_role(folder, role))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
