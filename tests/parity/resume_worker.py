"""One rank of `test_resume.py`: `python -m tests.parity.resume_worker RUN_FOLDER RESULT`."""

from pathlib import Path
from typing import Any

import torch

from internlm_lib.devices import select_device
from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import Experiment, Layout
from internlm_lib.files import write_json
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder

STEPS, SAVED_AT = 8, 4
DEEPSPEED = {"engine": "deepspeed", "zero_stage": 2}
CASES: dict[str, tuple[Layout, str]] = {
    "megatron TP2 DP2 SP": (
        Layout(tensor_model_parallel_size=2, data_parallel_size=2, sequence_parallel=True),
        "fp32",
    ),
    "megatron PP2 DP2, plain optimizer": (
        Layout(
            pipeline_model_parallel_size=2, data_parallel_size=2, use_distributed_optimizer=False
        ),
        "fp32",
    ),
    "megatron DP4, bf16": (Layout(data_parallel_size=4), "bf16"),
    "megatron TP4, plain optimizer, bf16": (
        Layout(tensor_model_parallel_size=4, use_distributed_optimizer=False),
        "bf16",
    ),
    "ZeRO-1 DP4, bf16": (
        Layout(engine="deepspeed", zero_stage=1, data_parallel_size=4),
        "bf16",
    ),
    "ZeRO-2 TP2 DP2": (
        Layout(
            engine="deepspeed", zero_stage=2, tensor_model_parallel_size=2, data_parallel_size=2
        ),
        "fp32",
    ),
    "ZeRO-3 DP4": (Layout(engine="deepspeed", zero_stage=3, data_parallel_size=4), "fp32"),
}
MOVES = [
    ("megatron TP2 DP2 SP", "megatron PP2 DP2, plain optimizer"),
    ("megatron PP2 DP2, plain optimizer", "ZeRO-3 DP4"),
    ("ZeRO-3 DP4", "megatron TP2 DP2 SP"),
    ("ZeRO-2 TP2 DP2", "ZeRO-3 DP4"),
    ("ZeRO-3 DP4", "ZeRO-2 TP2 DP2"),
]
"""A state saved in the one layout and continued in the other."""


def work(folder: RunFolder, result: str) -> None:
    device = select_device("cpu")
    device.adapt_megatron()
    _, experiment = load_experiment(folder.experiment)
    from megatron.core import parallel_state

    from internlm_lib.model.parallel import initialize_parallel, is_rank_zero, shutdown

    initialize_parallel(Layout(data_parallel_size=4), device)
    found: dict[str, Any] = {"whole": {}, "resumed": {}, "moved": {}, "same weights": {}}
    for name, (layout, precision) in CASES.items():
        _split(parallel_state, layout)
        whole, weights = _train(folder, experiment, layout, precision, folder.path / name)
        saved = folder.path / name / f"step-{SAVED_AT:07}"
        resumed, again = _train(folder, experiment, layout, precision, None, saved)
        found["whole"][name], found["resumed"][name] = whole, resumed
        found["same weights"][name] = _everywhere(torch.equal(weights, again))
    for source, target in MOVES:
        layout, precision = CASES[target]
        _split(parallel_state, layout)
        saved = folder.path / source / f"step-{SAVED_AT:07}"
        moved, _ = _train(folder, experiment, layout, precision, None, saved)
        found["moved"][f"{source} -> {target}"] = (source, moved)
    if is_rank_zero():
        write_json(Path(result), found)
    shutdown()


def _split(parallel_state: Any, layout: Layout) -> None:
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    )


def _train(
    folder: RunFolder,
    experiment: Experiment,
    layout: Layout,
    precision: str,
    checkpoints: Path | None,
    saved: Path | None = None,
) -> tuple[list[tuple[float, float]], torch.Tensor]:
    """Loss and gradient norm of every step, and this rank's weights after the last."""
    from megatron.core import parallel_state

    from internlm_lib.data.batches import BatchStream, build_datasets
    from internlm_lib.model.build import build_gpt_model
    from internlm_lib.training.checkpoint import (
        CheckpointWriter,
        Position,
        newest_whole,
        read_position,
        restore,
    )
    from internlm_lib.training.guard import StepGuard
    from internlm_lib.training.loop import Throughput, TrainingLoop
    from internlm_lib.training.worker import build_engine
    from internlm_lib.weights.megatron import load_weights

    experiment = experiment.model_copy(
        update={"training": experiment.training.model_copy(update={"precision": precision})}
    )
    device, model, training = select_device("cpu"), experiment.model, experiment.training
    steps: list[tuple[float, float]] = []

    def record(event: str, **fields: Any) -> None:
        if event == "step":
            steps.append((fields["loss"], fields["grad_norm"]))

    data, _ = build_datasets(folder.corpus_prefix, experiment.data, training, model.vocab_size)
    gpt = build_gpt_model(model, layout, training, device)
    load_weights(gpt, saved or folder.huggingface, model)
    engine = build_engine(gpt, layout, experiment)
    position, recent = Position(), []
    if saved:
        assert newest_whole(saved.parent, record) == saved
        position, state = read_position(saved)
        recent = state["recent_losses"]
        restore(engine, gpt, saved, model)
    TrainingLoop(
        engine=engine,
        gpt=gpt,
        batches=BatchStream(
            data,
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=layout.data_parallel_size,
            device=device.current(),
        ),
        validation=None,
        training=training.model_copy(update={"save_interval": SAVED_AT if checkpoints else None}),
        layout=layout,
        device=device,
        throughput=Throughput(1, 1, 1.0),
        record=record,
        checkpoints=CheckpointWriter(
            checkpoints or folder.path / "unused", folder.experiment, model, device.current(),
            record, keep=9, asynchronous=True,
        ),
        facts={},
        guard=StepGuard(None, recent),
        stop_requested=lambda: False,
        position=position,
    ).run()  # fmt: skip
    with engine.whole_weights() as whole:
        weights = torch.cat([p.detach().float().flatten().clone() for p in whole.parameters()])
    return steps, weights


def _everywhere(flag: bool) -> bool:
    everyone = [flag] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, flag)
    return all(everyone)


if __name__ == "__main__":
    rank_main(work)
