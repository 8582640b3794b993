"""One rank of `test_resume.py`: `python -m tests.parity.resume_worker RUN_FOLDER RESULT`."""

from pathlib import Path
from typing import Any

import torch

from internlm_lib.devices import select_device
from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import Experiment, Layout
from internlm_lib.files import write_json
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder, state_name
from tests.parity.in_ranks import build, loop

STEPS, SAVED_AT = 6, 3
ZERO = Layout(engine="deepspeed", data_parallel_size=2)
CASES: dict[str, tuple[Layout, str]] = {
    "megatron TP2 SP": (Layout(tensor_model_parallel_size=2, sequence_parallel=True), "fp32"),
    "megatron PP2 VPP2": (
        Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        "fp32",
    ),
    "megatron DP2, overlap": (
        Layout(data_parallel_size=2, overlap_grad_reduce=True, overlap_param_gather=True),
        "fp32",
    ),
    "megatron DP2, bf16": (Layout(data_parallel_size=2), "bf16"),
    "megatron DP2, plain optimizer, bf16": (
        Layout(data_parallel_size=2, use_distributed_optimizer=False),
        "bf16",
    ),
    "ZeRO-1 DP2, bf16": (ZERO.model_copy(update={"zero_stage": 1}), "bf16"),
    "ZeRO-2 TP2": (
        Layout(engine="deepspeed", zero_stage=2, tensor_model_parallel_size=2),
        "fp32",
    ),
    "ZeRO-3 DP2": (ZERO.model_copy(update={"zero_stage": 3}), "fp32"),
}
MOVES = [
    ("megatron TP2 SP", "megatron PP2 VPP2"),
    ("megatron PP2 VPP2", "ZeRO-3 DP2"),
    ("ZeRO-3 DP2", "ZeRO-2 TP2"),
    ("ZeRO-2 TP2", "megatron DP2, overlap"),
]
"""A state saved in the one layout and continued in the other."""


def work(folder: RunFolder, result: str) -> None:
    device = select_device("cpu")
    device.adapt_megatron()
    _, experiment = load_experiment(folder.experiment)
    from internlm_lib.model.parallel import initialize_parallel, is_rank_zero, shutdown, split_ranks

    initialize_parallel(Layout(data_parallel_size=2), device)
    found: dict[str, Any] = {"whole": {}, "resumed": {}, "moved": {}, "same weights": {}}
    for name, (layout, precision) in CASES.items():
        split_ranks(layout)
        whole, weights = _train(folder, experiment, layout, precision, folder.path / name)
        saved = folder.path / name / state_name(SAVED_AT)
        resumed, again = _train(folder, experiment, layout, precision, None, saved)
        found["whole"][name], found["resumed"][name] = whole, resumed
        found["same weights"][name] = _everywhere(torch.equal(weights, again))
    for source, target in MOVES:
        layout, precision = CASES[target]
        split_ranks(layout)
        saved = folder.path / source / state_name(SAVED_AT)
        moved, _ = _train(folder, experiment, layout, precision, None, saved)
        found["moved"][f"{source} -> {target}"] = (source, moved)
    if is_rank_zero():
        write_json(Path(result), found)
    shutdown()


def _train(
    folder: RunFolder,
    experiment: Experiment,
    layout: Layout,
    precision: str,
    checkpoints: Path | None,
    saved: Path | None = None,
) -> tuple[list[tuple[float, float]], torch.Tensor]:
    """Loss and gradient norm of every step, and this rank's weights after the last."""
    from internlm_lib.training.checkpoint import Position, newest_whole, read_position, restore

    interval = SAVED_AT if checkpoints else None
    training = {"precision": precision, "save_interval": interval}
    experiment = experiment.model_copy(
        update={"training": experiment.training.model_copy(update=training)}
    )
    steps: list[tuple[float, float]] = []

    def record(event: str, **fields: Any) -> None:
        if event == "step":
            steps.append((fields["loss"], fields["grad_norm"]))

    part = build(folder, experiment, layout, saved)
    position, state = Position(), {}
    if saved:
        assert newest_whole(saved.parent, record) == saved
        position, state = read_position(saved)
        restore(part.engine, part.chunks, saved, experiment.model)
    loop(
        part, folder, experiment, layout, record,
        checkpoints=checkpoints, position=position,
        recent_losses=state.get("recent_losses", ()),
    ).run()  # fmt: skip
    with part.engine.whole_weights() as whole:
        parameters = [p.detach().float().flatten() for chunk in whole for p in chunk.parameters()]
        return steps, torch.cat(parameters)


def _everywhere(flag: bool) -> bool:
    everyone = [flag] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, flag)
    return all(everyone)


if __name__ == "__main__":
    rank_main(work)
