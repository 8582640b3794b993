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
        found[case] = {
            name: _train(folder, experiment, layout, device) for name, layout in ENGINES.items()
        }
    for name, layout in ENGINES.items():
        found.setdefault("broken", {})[name] = _broken_step(folder, layout, device)
        for predecessor in (False, True):
            found.setdefault(f"decay {predecessor}", {})[name] = _decayed(
                folder, layout, device, predecessor
            )
    if is_rank_zero():
        write_json(Path(result), found)
    shutdown()


def _engine(folder: RunFolder, experiment: Experiment, layout: Layout, device: Any) -> Any:
    from internlm_lib.model.build import build_gpt_model
    from internlm_lib.training.worker import _engine
    from internlm_lib.weights.megatron import load_weights

    gpt = build_gpt_model(experiment.model, layout, experiment.training, device)
    load_weights(gpt, folder.huggingface, experiment.model)
    return _engine(gpt, layout, experiment)


def _stream(folder: RunFolder, experiment: Experiment, layout: Layout, device: Any) -> Any:
    from megatron.core import parallel_state

    from internlm_lib.data.batches import BatchStream, build_datasets

    training = experiment.training
    data = build_datasets(
        folder.corpus_prefix, experiment.data, training, experiment.model.vocab_size
    )
    return BatchStream(
        data.train, global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=layout.data_parallel_size, device=device.current(),
    )  # fmt: skip


def _train(folder: RunFolder, experiment: Experiment, layout: Layout, device: Any) -> Any:
    """The training loop's own record of every step."""
    from internlm_lib.training.loop import Throughput, train

    steps: list[dict[str, Any]] = []

    def record(event: str, **fields: Any) -> None:
        steps.append(fields)

    train(
        _engine(folder, experiment, layout, device),
        _stream(folder, experiment, layout, device), None,
        training=experiment.training, optimizer=experiment.optimizer, layout=layout, device=device,
        throughput=Throughput(2, 1.0), record=record, save=lambda step: None,
    )  # fmt: skip
    return steps


def _broken_step(folder: RunFolder, layout: Layout, device: Any) -> Any:
    """A sound step, one whose loss is NaN, and the sound one again; what became of the weights."""
    _, experiment = load_experiment(folder.experiment)
    engine = _engine(folder, experiment, layout, device)
    batches = _stream(folder, experiment, layout, device)
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


def _decayed(folder: RunFolder, layout: Layout, device: Any, predecessor: bool) -> Any:
    """Names of the parameters that a step without a gradient changes."""
    from internlm_lib.engines import base, megatron, zero

    changes = {"optimizer.predecessor_decay": predecessor, "optimizer.weight_decay": 0.5}
    _, experiment = load_experiment(folder.experiment, changes)
    engine = _engine(folder, experiment, layout, device)
    before = _weights(engine)
    for module in (megatron, zero):
        module.masked_mean = lambda losses, mask: base.masked_mean(losses, mask) * 0
    engine.train_step(_stream(folder, experiment, layout, device).step(0), 2, 1e-2)
    for module in (megatron, zero):
        module.masked_mean = base.masked_mean
    return sorted(
        name for name, after in _weights(engine).items() if not torch.equal(before[name], after)
    )


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    with engine.whole_weights() as gpt:
        return {name: p.detach().clone() for name, p in gpt.named_parameters()}


if __name__ == "__main__":
    rank_main(work)
