"""One rank of `test_checkpoints.py`: `python -m tests.parity.checkpoint_worker RUN_FOLDER`."""

from typing import Any

import torch

from internlm_lib.devices import select_device
from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import Experiment, Layout
from internlm_lib.files import write_json
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder

STAGES = (1, 2, 3)
TP2_PP2 = Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
TP2_DP2 = Layout(engine="deepspeed", tensor_model_parallel_size=2, data_parallel_size=2)


def work(folder: RunFolder) -> None:
    device = select_device("cpu")
    device.adapt_megatron()
    _, experiment = load_experiment(folder.experiment)
    from megatron.core import parallel_state

    from internlm_lib.model.parallel import initialize_parallel, shutdown

    initialize_parallel(TP2_PP2, device)
    _megatron(folder, experiment, TP2_PP2, device)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(TP2_DP2.tensor_model_parallel_size)
    _zero(folder, experiment, TP2_DP2, device)
    shutdown()


def _megatron(folder: RunFolder, experiment: Experiment, layout: Layout, device: Any) -> None:
    """megatron-core itself loads what the kit wrote, and saves what the kit is to read."""
    from megatron.core import dist_checkpointing

    from internlm_lib.model.build import build_gpt_model
    from internlm_lib.model.parallel import is_rank_zero
    from internlm_lib.weights.huggingface import open_huggingface
    from internlm_lib.weights.megatron import differing_parameters, save_weights

    model = experiment.model
    gpt = build_gpt_model(model, layout, experiment.training, device)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            # Rows past the vocabulary are in no checkpoint; the kit's own loading makes them zero.
            parameter.fill_(0.0 if "embedding" in name or "output" in name else torch.nan)
    state = dist_checkpointing.load(gpt.sharded_state_dict(), str(folder.megatron))
    gpt.load_state_dict(state)
    with open_huggingface(folder.huggingface) as source:
        differing = [*differing_parameters(gpt, source, model)]
    everyone: list[list[str]] = [[] for _ in range(layout.world_size)]
    torch.distributed.all_gather_object(everyone, differing)
    save_weights(gpt, folder.path / "saved", model)
    if is_rank_zero():
        write_json(folder.path / "differing.json", sum(everyone, []))


def _zero(folder: RunFolder, experiment: Experiment, layout: Layout, device: Any) -> None:
    """DeepSpeed's own checkpoint after a step of each ZeRO stage, and the weights it stands for."""
    from internlm_lib.data.batches import Batch
    from internlm_lib.engines.zero import ZeroEngine
    from internlm_lib.model.build import build_gpt_model
    from internlm_lib.weights.megatron import load_weights, save_weights

    model, training = experiment.model, experiment.training
    shape = (training.micro_batch_size, training.seq_length + 1)
    rank = torch.distributed.get_rank() // layout.tensor_model_parallel_size
    generator = torch.Generator().manual_seed(rank)
    for stage in STAGES:
        chosen = layout.model_copy(update={"zero_stage": stage})
        gpt = build_gpt_model(model, chosen, training, device)
        load_weights(gpt, folder.huggingface, model)
        engine = ZeroEngine(gpt, chosen, training, experiment.optimizer)
        count = training.num_micro_batches(chosen)
        batches = []
        for _ in range(count):
            tokens = torch.randint(model.vocab_size, shape, generator=generator)
            positions = torch.arange(training.seq_length).expand(shape[0], -1)
            mask = torch.ones(shape[0], training.seq_length)
            batches.append(
                Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask, positions)
            )
        engine.train_step(iter(batches), count, 1e-2)
        engine._engine.save_checkpoint(str(folder.path / f"zero-{stage}"))
        with engine.whole_weights() as weights:
            save_weights(weights, folder.path / f"whole-{stage}", model)


if __name__ == "__main__":
    rank_main(work)
