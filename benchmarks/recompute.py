"""What recomputation saves and costs: predicted from one measured layer, and measured.

    python benchmarks/recompute.py [--limit-mib 640] [--json]

A model of 8 layers (hidden 512, ffn 1376, 8 heads, vocabulary 8192; 512 tokens, fp32), one
rank, on the CPU. Prints the table `auto_recompute_device_memory_mib` chooses by, then for every
policy the activations kept for the backward pass, predicted and measured, and the seconds of a
forward and backward pass (median) against none. Limits: a prediction may be off by 0.1 %.
"""

import argparse
import json
import sys
import time
from statistics import median
from typing import Any

import torch

from internlm_lib.devices import select_device
from internlm_lib.devices.meta import pretend_to_be
from internlm_lib.experiment.load import resolve
from internlm_lib.experiment.schema import Layout, TrainingSection
from internlm_lib.model.parts import PARTS, WHOLE_LAYER
from internlm_lib.training.recompute import (
    MIB,
    Choice,
    LayerCost,
    RankMemory,
    choose,
    kept_bytes,
    kept_bytes_of_choice,
    rows,
)

SHAPE = {
    "num_layers": 8, "hidden_size": 512, "ffn_hidden_size": 1376, "num_attention_heads": 8,
    "vocab_size": 8192,
}  # fmt: skip
TRAINING = {"seq_length": 512, "micro_batch_size": 1, "precision": "fp32"}
FULL = {"recompute_granularity": "full"}
POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full block 4": {**FULL, "recompute_method": "block", "recompute_num_layers": 4},
    "full uniform 1": FULL,
    "full uniform 4": {**FULL, "recompute_num_layers": 4},
}
REPEATS = 2
LIMITS = {"prediction_error": 1e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--limit-mib", type=int, default=640)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = select_device("cpu")
    device.adapt_megatron()
    # Alone in its job, a rank's collectives have nothing to exchange.
    with pretend_to_be(0, 1):
        found = measure(arguments.limit_mib, device)
    print(json.dumps(found, indent=2)) if arguments.json else show(found)


def measure(limit_mib: int, device: Any) -> dict[str, Any]:
    from megatron.core import parallel_state, tensor_parallel

    from internlm_lib.training.activations import apply_recompute, measure_layer, measure_rank

    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    layout, (model, training) = Layout(), sections({})
    gpt = built(model, training, device)
    layer = measure_layer(gpt, training, device)
    rank = measure_rank([gpt], training, layout, device)
    choice = choose(layer, [rank], limit_mib, layout)
    results = []
    for name, keys in POLICIES.items():
        model, training = sections(keys)
        predicted = kept_bytes(layer, rank, training)
        results.append(taken(name, built(model, training, device), training, device, predicted))
    apply_recompute([gpt], choice)
    predicted = kept_bytes_of_choice(layer, rank, choice.layers)
    name = f"adaptive, {limit_mib} MiB"
    results.append(taken(name, gpt, sections({})[1], device, predicted))
    return {
        "limit_mib": limit_mib,
        "memory_mib": choice.memory_bytes / MIB,
        "states_mib": rank.state_bytes / MIB,
        "choice": rows(layer, choice),
        "policies": [
            {**each, "added_seconds": each["seconds"] - results[0]["seconds"]} for each in results
        ],
        "predicted_added_seconds": predicted_seconds(layer, rank, choice),
        "limits": LIMITS,
        "within_limits": all(
            abs(each["predicted_mib"] / each["measured_mib"] - 1) <= LIMITS["prediction_error"]
            for each in results
        ),
    }


def sections(keys: dict[str, Any]) -> tuple[Any, TrainingSection]:
    """Model and training of the benchmark's experiment, with some keys of training."""
    values = {"model": {"preset": "internlm-tiny", **SHAPE}, "training": {**TRAINING, **keys}}
    _, experiment = resolve(values, {}, source="benchmark", default_run_name="benchmark")
    return experiment.model, experiment.training


def built(model: Any, training: TrainingSection, device: Any) -> Any:
    """The model with small random weights."""
    from internlm_lib.model.build import build_gpt_model

    gpt = build_gpt_model(model, Layout(), training, device)
    with torch.no_grad():
        for weight in gpt.parameters():
            weight.normal_(std=0.02) if weight.dim() > 1 else weight.fill_(0.1)
    return gpt


def taken(
    name: str, gpt: Any, training: TrainingSection, device: Any, predicted: int
) -> dict[str, Any]:
    from internlm_lib.training.activations import forward_pass, saved_bytes

    forward = forward_pass(gpt, training, device)
    measured = saved_bytes(forward, gpt.parameters())
    seconds = []
    for _ in range(1 + REPEATS):
        begin = time.perf_counter()
        forward().mean().backward()
        seconds.append(time.perf_counter() - begin)
    print(f"{name}: {measured / MIB:.1f} MiB", file=sys.stderr)
    return {
        "policy": name,
        "predicted_mib": predicted / MIB,
        "measured_mib": measured / MIB,
        "seconds": median(seconds[1:]),
    }


def predicted_seconds(layer: LayerCost, rank: RankMemory, choice: Choice) -> dict[str, float]:
    """What recomputing adds to a step of one micro-batch, by the measured forward passes."""
    return {
        "full uniform 1": rank.layers * layer.part(WHOLE_LAYER).seconds,
        "adaptive": choice.added_seconds,
        "all parts": rank.layers * sum(layer.part(name).seconds for name in PARTS),
    }


def show(found: dict[str, Any]) -> None:
    """The two tables, as Markdown."""
    table(found["choice"])
    table(found["policies"])


def table(lines: list[dict[str, Any]]) -> None:
    print(f"| {' | '.join(lines[0])} |\n|{'---|' * len(lines[0])}")
    for line in lines:
        cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in line.values())
        print(f"| {' | '.join(cells)} |")
    print()


if __name__ == "__main__":
    main()
