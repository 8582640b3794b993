"""A short training on this device against the same in a plain PyTorch loop on the CPU.

Import only after `Device.adapt_megatron()`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from internlm_lib.data.batches import BatchStream, build_datasets
from internlm_lib.devices import Device
from internlm_lib.experiment.schema import Experiment, Layout
from internlm_lib.model.build import build_chunks
from internlm_lib.model.parallel import data_parallel_rank
from internlm_lib.selftest.checks import Check, Outcome
from internlm_lib.selftest.recipe import STEPS, parity_experiment, parity_layout
from internlm_lib.training.plain_loop import train_plain
from internlm_lib.training.schedule import learning_rate
from internlm_lib.training.worker import build_engine
from internlm_lib.weights.megatron import load_weights


@dataclass(frozen=True)
class Tolerance:
    """Largest relative difference over all steps."""

    loss: float
    grad_norm: float


TOLERANCES: dict[tuple[str, bool], Tolerance] = {
    ("fp32", True): Tolerance(1e-6, 1e-5),
    ("fp32", False): Tolerance(1e-4, 1e-3),
    ("bf16", True): Tolerance(5e-3, 5e-2),
    ("bf16", False): Tolerance(5e-3, 5e-2),
}
"""By precision, and whether both trainings run on a CPU: those of `benchmarks/parity.py` there. An
accelerator's float32 may round a product's factors; bfloat16 is held against float32, from which it
differs in the third digit."""


def parity_checks(device: Device, ranks: int, folder: Path) -> Iterator[Check]:
    """Losses and gradient norms, in float32 and as InternLM is trained.

    Args:
        folder: with the `corpus` and the `weights` that `corpus.py` has put there.
    """
    curves = cache(partial(_train, device, ranks, folder))
    reference = cache(partial(_train_plain, ranks, folder))
    for precision in ("fp32", "bf16"):
        allowed = TOLERANCES[precision, device.name == "cpu"]
        for quantity in ("loss", "grad_norm"):

            def find(precision: str = precision, quantity: str = quantity) -> Outcome:
                # Every rank trains; the plain loop needs no other.
                found, expected = curves(precision)[quantity], reference()[quantity]
                return Outcome(
                    max(abs(a / b - 1) for a, b in zip(found, expected, strict=True)),
                    {"first": found[0], "last": found[-1], "plain loop's last": expected[-1]},
                )

            what = quantity.replace("grad_norm", "gradient norm")
            name = f"{STEPS} steps, {what}, {precision}, {parity_layout(ranks).label}"
            yield Check(
                "parity", name, "largest relative difference", getattr(allowed, quantity), find
            )


def _train(device: Device, ranks: int, folder: Path, precision: str) -> dict[str, list[float]]:
    experiment, layout = parity_experiment(ranks, precision), parity_layout(ranks)
    stream = _stream(folder, experiment, device.current(), data_parallel_rank(), layout)
    chunks = build_chunks(experiment.model, layout, experiment.training, device)
    load_weights(chunks, folder / "weights", experiment.model)
    engine = build_engine(chunks, layout, experiment)
    results = [
        engine.train_step(
            stream.step(step - 1),
            experiment.training.num_micro_batches(layout),
            learning_rate(experiment.training, step),
        )
        for step in range(1, STEPS + 1)
    ]
    return {
        "loss": [result.loss for result in results],
        "grad_norm": [result.grad_norm for result in results],
    }


def _train_plain(ranks: int, folder: Path) -> dict[str, list[float]]:
    experiment = parity_experiment(ranks, "fp32")
    stream = _stream(folder, experiment, torch.device("cpu"), 0, Layout())
    steps = list(train_plain(folder / "weights", experiment, stream))
    return {"loss": [loss for loss, _ in steps], "grad_norm": [norm for _, norm in steps]}


def _stream(
    folder: Path, experiment: Experiment, device: torch.device, rank: int, layout: Layout
) -> BatchStream:
    training = experiment.training
    data = build_datasets(folder / "corpus", experiment.data, training, experiment.model.vocab_size)
    return BatchStream(
        data.train,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        data_parallel_rank=rank,
        data_parallel_size=layout.data_parallel_size,
        device=device,
    )
