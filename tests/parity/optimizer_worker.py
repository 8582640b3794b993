"""One rank of `test_optimizer.py`: `python -m tests.parity.optimizer_worker RUN_FOLDER RESULT`."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from internlm_lib.devices import select_device
from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import Experiment, Layout
from internlm_lib.files import write_json
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder
from tests.parity.in_ranks import build, loop, stream

ENGINES = {
    "megatron": Layout(data_parallel_size=2),
    "megatron, plain optimizer": Layout(data_parallel_size=2, use_distributed_optimizer=False),
    "ZeRO-1": Layout(engine="deepspeed", zero_stage=1, data_parallel_size=2),
    "ZeRO-2": Layout(engine="deepspeed", zero_stage=2, data_parallel_size=2),
    "ZeRO-3": Layout(engine="deepspeed", zero_stage=3, data_parallel_size=2),
}
CASES: dict[str, dict[str, Any]] = {
    # No clipping; 1, 1, 1, 2, 2 and 3 micro-batches per rank.
    "ramp": {
        "training.rampup_batch_size": [4, 4, 24],
        "training.global_batch_size": 12,
        "training.train_iters": 6,
        "optimizer.clip_grad": 0,
    },
    "bf16": {
        "training.precision": "bf16",
        "training.global_batch_size": 16,
        "training.train_iters": 3,
    },
    # Overflows, is scaled down, grows into another overflow after two sound steps.
    "fp16": {
        "training.precision": "fp16",
        "training.train_iters": 8,
        "optimizer.initial_loss_scale": 2.0**21,
        "optimizer.loss_scale_window": 2,
    },
}
"""What differs from the run's experiment, whose steps hold 8 samples: 2 micro-batches per rank."""


def work(folder: RunFolder, result: str) -> None:
    device = select_device("cpu")
    device.adapt_megatron()
    from internlm_lib.model.parallel import initialize_parallel, is_rank_zero, shutdown

    initialize_parallel(ENGINES["megatron"], device)
    found: dict[str, Any] = {}
    for case, changes in CASES.items():
        _, experiment = load_experiment(folder.experiment, changes)
        found[case] = {name: _train(folder, experiment, layout) for name, layout in ENGINES.items()}
    for name, layout in ENGINES.items():
        found.setdefault("broken", {})[name] = _broken_step(folder, layout)
        for predecessor in (False, True):
            found.setdefault(f"decay {predecessor}", {})[name] = _decayed(
                folder, layout, predecessor
            )
    if is_rank_zero():
        write_json(Path(result), found)
    shutdown()


def _train(folder: RunFolder, experiment: Experiment, layout: Layout) -> list[dict[str, Any]]:
    """The training loop's own record of every step."""
    steps: list[dict[str, Any]] = []

    def record(event: str, **fields: Any) -> None:
        steps.append(fields)

    loop(build(folder, experiment, layout), folder, experiment, layout, record).run()
    return steps


def _broken_step(folder: RunFolder, layout: Layout) -> Any:
    """A sound step, one whose loss is NaN, and the sound one again; what became of the weights."""
    _, experiment = load_experiment(folder.experiment)
    engine = build(folder, experiment, layout).engine
    batches = stream(folder, experiment, layout)
    take = partial(engine.train_step, num_micro_batches=2, lr=1e-3)

    def without_tokens() -> Iterator[Any]:
        for batch in batches.step(1):
            yield dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))

    results = [take(batches.step(0))]
    before = _weights(engine)
    results.append(take(without_tokens()))
    unchanged = all(torch.equal(before[name], after) for name, after in _weights(engine).items())
    results.append(take(batches.step(1)))
    return {"results": [dataclasses.asdict(r) for r in results], "unchanged": unchanged}


def _decayed(folder: RunFolder, layout: Layout, predecessor: bool) -> Any:
    """Names of the parameters that a step without a gradient changes."""
    from internlm_lib.engines import base, megatron, zero

    changes = {"optimizer.predecessor_decay": predecessor, "optimizer.weight_decay": 0.5}
    _, experiment = load_experiment(folder.experiment, changes)
    engine = build(folder, experiment, layout).engine
    before = _weights(engine)
    for module in (megatron, zero):
        module.masked_mean = lambda *given: base.masked_mean(*given) * 0
    engine.train_step(stream(folder, experiment, layout).step(0), 2, 1e-2)
    for module in (megatron, zero):
        module.masked_mean = base.masked_mean
    return sorted(
        name for name, after in _weights(engine).items() if not torch.equal(before[name], after)
    )


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    with engine.whole_weights() as (gpt,):
        return {name: p.detach().clone() for name, p in gpt.named_parameters()}


if __name__ == "__main__":
    rank_main(work)
