"""One rank of `test_instruction_loss.py`.

`python -m tests.parity.instruction_worker RUN_FOLDER RESULT`, with one rank or two.
"""

from pathlib import Path
from typing import Any

import torch

from internlm_lib.devices import select_device
from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import Experiment, Layout
from internlm_lib.files import write_json
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder
from tests.parity.in_ranks import build, stream

STEPS = 3
REFERENCE = "megatron, micro-batches of 8"
CASES: dict[str, tuple[Layout, int]] = {
    REFERENCE: (Layout(), 8),
    "megatron, micro-batches of 2": (Layout(), 2),
    "megatron, micro-batches of 1": (Layout(), 1),
    "megatron TP2": (Layout(tensor_model_parallel_size=2), 2),
    "megatron PP2": (Layout(pipeline_model_parallel_size=2), 1),
    "megatron PP2 VPP2": (
        Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        2,
    ),
    "megatron DP2": (Layout(data_parallel_size=2), 2),
    "megatron DP2, micro-batches of 1": (Layout(data_parallel_size=2), 1),
    "ZeRO-2 DP2": (Layout(engine="deepspeed", zero_stage=2, data_parallel_size=2), 2),
    "ZeRO-2 DP2, micro-batches of 1": (
        Layout(engine="deepspeed", zero_stage=2, data_parallel_size=2),
        1,
    ),
    "ZeRO-3 DP2": (Layout(engine="deepspeed", zero_stage=3, data_parallel_size=2), 1),
}
"""Layout and micro-batch size."""


def work(folder: RunFolder, result: str) -> None:
    device = select_device("cpu")
    device.adapt_megatron()
    from internlm_lib.model.parallel import initialize_parallel, is_rank_zero, shutdown, split_ranks

    _, experiment = load_experiment(folder.experiment)
    initialize_parallel(Layout(), device)
    size = torch.distributed.get_world_size()
    found: dict[str, Any] = {}
    for name, (layout, micro) in CASES.items():
        if layout.world_size == size:
            split_ranks(layout)
            training = experiment.training.model_copy(update={"micro_batch_size": micro})
            changed = experiment.model_copy(update={"training": training})
            found[name] = _train(folder, changed, layout)
    if size == 1:
        found["counted token by token"] = _spelled_out(folder, experiment)
    if is_rank_zero():
        write_json(Path(result), found)
    shutdown()


def _train(folder: RunFolder, experiment: Experiment, layout: Layout) -> dict[str, Any]:
    engine = build(folder, experiment, layout).engine
    batches = stream(folder, experiment, layout, "instruction")
    count = experiment.training.num_micro_batches(layout)
    before = engine.validation_loss(batches.step(0), count)
    steps = [engine.train_step(batches.step(n), count, 1e-3) for n in range(STEPS)]
    return {
        "validation": before,
        "losses": [step.loss for step in steps],
        "norms": [step.grad_norm for step in steps],
    }


def _spelled_out(folder: RunFolder, experiment: Experiment) -> dict[str, Any]:
    """Loss and gradient norm of the first step by transformers and plain torch, over all samples
    at once; and how many tokens each sample trains."""
    from internlm_lib.weights.huggingface import open_huggingface, transformers_model

    llama = transformers_model(open_huggingface(folder.huggingface)).train()
    training = experiment.training.model_copy(update={"micro_batch_size": 8})
    whole = experiment.model_copy(update={"training": training})
    (batch,) = stream(folder, whole, Layout(), "instruction").step(0)
    logits = llama(batch.tokens, use_cache=False).logits
    labels = batch.labels.masked_fill(batch.loss_mask == 0, -100)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(llama.parameters(), float("inf"))
    trained = batch.loss_mask.sum(dim=1).int().tolist()
    return {"loss": loss.item(), "norm": norm.item(), "trained": trained}


if __name__ == "__main__":
    rank_main(work)
