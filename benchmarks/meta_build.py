"""The big models, rank by rank, on the meta device: parameters and bytes, without an accelerator.

    python benchmarks/meta_build.py [--json] [PARAMS ...]

Builds the first rank of every pipeline stage of each params file's candidate layout (by default
7B with ZeRO-2 on 8 ranks, 65B with TP8, PP4 and sequence parallelism on 32) as one process that
pretends to be it, and takes it through one forward and backward pass of a micro-batch. The other
ranks of a stage hold as much. Prints a table, or with --json one JSON object.

`activation_bytes` are the saved tensors of one micro-batch, as an accelerator's fused operators
keep them, under the file's `recompute_granularity`: what `auto_recompute_device_memory_mib` would
choose needs times, which the meta device does not have. `memory_bytes` are states and activations
of all micro-batches in flight then.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from internlm_lib.devices.meta import MetaDevice
from internlm_lib.experiment.load import load_experiment
from internlm_lib.model.parts import PARTS, WHOLE_LAYER
from internlm_lib.training.recompute import MIB, memory_bytes

PARAMS = Path(__file__).resolve().parents[1] / "params"
DEFAULT = [PARAMS / "internlm_7b.yaml", PARAMS / "internlm_65b.yaml"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("params", nargs="*", type=Path, default=DEFAULT)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    MetaDevice().adapt_megatron()
    found = {path.stem: build(path) for path in arguments.params}
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def build(params: Path) -> dict[str, Any]:
    """One row per pipeline stage, and what one layer of them keeps."""
    from internlm_lib.training.meta import build_stages

    _, experiment = load_experiment(params)
    layout = experiment.parallel.candidate
    stages = []
    for built in build_stages(experiment, layout):
        nothing = dict.fromkeys((*PARTS, WHOLE_LAYER), 0)
        stages.append(
            {
                "rank": built.rank,
                "pipeline_stage": built.stage,
                "parameters": built.parameters,
                "parameter_bytes": built.parameter_bytes,
                "state_bytes": built.state_bytes,
                "activation_bytes": built.activation_bytes,
                "predicted_activation_bytes": built.predicted_activation_bytes,
                "micro_batches_in_flight": built.memory.in_flight,
                "memory_bytes": memory_bytes(built.layer, built.memory, nothing),
                "seconds": round(built.seconds, 3),
            }
        )
        print(f"{params.stem}: rank {built.rank} in {built.seconds:.1f} s", file=sys.stderr)
    return {
        "layout": layout.label,
        "ranks": layout.world_size,
        "ranks_per_stage": layout.world_size // layout.pipeline_model_parallel_size,
        "stages": stages,
        "layer": {
            "activation_bytes": built.layer.kept_bytes,
            "saved_bytes": {part.name: part.saved_bytes for part in built.layer.parts},
        },
    }


def show(found: dict[str, Any]) -> None:
    print("| model, layout | rank | parameters | states MiB | activations MiB × micro-batches |")
    print("|---|---|---|---|---|")
    for name, model in found.items():
        for stage in model["stages"]:
            print(
                f"| {name}, {model['layout']} | {stage['rank']} | {stage['parameters']:,} "
                f"| {sum(stage['state_bytes'].values()) / MIB:,.0f} "
                f"| {stage['activation_bytes'] / MIB:,.0f} × {stage['micro_batches_in_flight']} |"
            )


if __name__ == "__main__":
    main()
