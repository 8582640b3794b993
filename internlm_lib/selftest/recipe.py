"""What the selftest trains: a small InternLM over bytes, at any number of ranks."""

import math
from typing import Any

from internlm_lib.experiment.load import resolve
from internlm_lib.experiment.schema import Experiment, Layout

STEPS = 20
_HEADS = 8

RECIPE: dict[str, Any] = {
    "model": {
        "preset": "internlm-tiny",
        "num_layers": 4,
        "hidden_size": 128,
        "ffn_hidden_size": 344,
        "num_attention_heads": _HEADS,
        "vocab_size": 320,  # some rows more than bytes need: no tokenizer has fewer
    },
    "data": {"split": "1,0,0"},
    "training": {
        "seq_length": 64,
        "micro_batch_size": 2,
        "train_iters": STEPS,
        "lr": 1.5e-3,
        "min_lr": 1.5e-4,
        "lr_warmup_fraction": 0.1,
    },
    "optimizer": {"adam_eps": 1e-4, "weight_decay": 0.1, "clip_grad": 0.5},
}
"""Calm, with warm-up, decay, weight decay and clipping at work (see benchmarks/parity.py)."""

_MICRO_BATCHES = 4


def parity_layout(ranks: int) -> Layout:
    """Tensor parallel as far as heads can be shared, the rest data parallel."""
    tensor_parallel = math.gcd(ranks, _HEADS)
    return Layout(
        tensor_model_parallel_size=tensor_parallel,
        data_parallel_size=ranks // tensor_parallel,
        sequence_parallel=tensor_parallel > 1,
    )


def parity_experiment(ranks: int, precision: str) -> Experiment:
    layout = parity_layout(ranks)
    samples = RECIPE["training"]["micro_batch_size"] * layout.data_parallel_size * _MICRO_BATCHES
    overrides = {"training.precision": precision, "training.global_batch_size": samples}
    values = {**RECIPE, "parallel": {"candidate": layout.model_dump()}}
    _, experiment = resolve(values, overrides, source="selftest", default_run_name="selftest")
    return experiment
