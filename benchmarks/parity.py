"""Does every layout train the same model? Losses and gradient norms against one rank's.

    python benchmarks/parity.py [--json] [--steps 50] [--layouts TP2,PP2 …]

Trains one small InternLM from the same weights on the same data (the pocket world) in every layout
that fits four ranks, and in a plain PyTorch loop over transformers' LLaMA (AdamW, clip_grad_norm_),
which shares neither model nor engine with the rest. Each curve is held against megatron-core on one
rank: the largest relative difference of the loss and of the gradient norm over all steps, and of
the validation loss half way. fp32 on the CPU, under gloo.

The recipe is one that learns and is calm: warm-up, decay, and clipping at every step are at work,
the loss falls by more than a nat, and rounding does not grow into another trajectory. It is printed
with the result. Exit code 1 if a limit is missed; an error in any layout ends it without a result.
What is being done goes to stderr. A result for all layouts is also kept as reports/parity.json,
which 04_compare shows.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internlm_lib.data.handlers import handler
from internlm_lib.data.inputs import Options
from internlm_lib.data.pocket import make_pocket_world, write_pocket_world
from internlm_lib.data.preprocess import preprocess
from internlm_lib.data.records import read_rows
from internlm_lib.data.tokenizer import train_tokenizer
from internlm_lib.data.tokenizer_texts import texts_to_train_on
from internlm_lib.experiment.load import load_experiment, save_experiment
from internlm_lib.experiment.schema import Experiment, Layout
from internlm_lib.files import write_json
from internlm_lib.provenance import record
from internlm_lib.ranks.launch import LAUNCHER_VARIABLE, launch
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder
from internlm_lib.selftest.corpus import write_weights

if TYPE_CHECKING:
    from internlm_lib.data.batches import BatchStream

REPOSITORY = Path(__file__).resolve().parents[1]
LIMITS = {"loss": 1e-6, "grad_norm": 1e-5, "validation_loss": 1e-6}
"""Largest relative differences. Norms are sums over all elements, each rounded in another order."""

REFERENCE = "TP1"
TRANSFORMERS = "transformers, plain PyTorch"

RECIPE: dict[str, Any] = {
    "model.num_layers": 4,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 176,
    "model.num_attention_heads": 4,
    "model.direct_start": True,
    "data.split": "8,1,1",
    "training.precision": "fp32",
    "training.auto_recompute_device_memory_mib": None,
    "training.seq_length": 32,
    "training.micro_batch_size": 2,
    "training.global_batch_size": 8,
    "training.lr": 1.5e-3,
    "training.min_lr": 1.5e-4,
    "training.lr_warmup_fraction": 0.1,
    "training.eval_iters": 1,
    "optimizer.adam_eps": 1e-4,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_grad": 0.5,
    "parallel.reference": None,
}
"""What differs from params/tiny.yaml."""


def _megatron(tp: int = 1, pp: int = 1, dp: int = 1, vpp: int | None = None, **more: Any) -> Layout:
    return Layout(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, data_parallel_size=dp,
        virtual_pipeline_model_parallel_size=vpp, **more,
    )  # fmt: skip


def _zero(stage: int, tp: int = 1, dp: int = 1, **more: Any) -> Layout:
    return _megatron(tp, dp=dp, engine="deepspeed", zero_stage=stage, **more)


SP: dict[str, Any] = {"sequence_parallel": True}
WHOLE: dict[str, Any] = {"use_distributed_optimizer": False}
"""Every rank holds the whole optimizer."""
REDUCE: dict[str, Any] = {"overlap_grad_reduce": True}
OVERLAP: dict[str, Any] = {"overlap_grad_reduce": True, "overlap_param_gather": True}
STAGES = (1, 2, 3)

LAYOUTS: dict[str, Layout] = {
    REFERENCE: _megatron(),
    "TP2": _megatron(tp=2),
    "TP2 SP": _megatron(tp=2, **SP),
    "PP2": _megatron(pp=2),
    "PP2 VPP2": _megatron(pp=2, vpp=2),
    "DP2": _megatron(dp=2),
    "DP2 whole optimizer": _megatron(dp=2, **WHOLE),
    "DP2 overlap": _megatron(dp=2, **OVERLAP),
    "DP2 overlap whole optimizer": _megatron(dp=2, **WHOLE, **REDUCE),
    **{f"ZeRO-{stage} DP2": _zero(stage, dp=2) for stage in STAGES},
    "TP4": _megatron(tp=4),
    "TP4 SP": _megatron(tp=4, **SP),
    "PP4": _megatron(pp=4),
    "DP4": _megatron(dp=4),
    "DP4 overlap": _megatron(dp=4, **OVERLAP),
    "TP2 PP2": _megatron(tp=2, pp=2),
    "TP2 PP2 SP": _megatron(tp=2, pp=2, **SP),
    "TP2 PP2 VPP2 SP": _megatron(tp=2, pp=2, vpp=2, **SP),
    "TP2 DP2": _megatron(tp=2, dp=2),
    "TP2 DP2 SP": _megatron(tp=2, dp=2, **SP),
    "TP2 DP2 SP overlap": _megatron(tp=2, dp=2, **SP, **OVERLAP),
    "PP2 DP2": _megatron(pp=2, dp=2),
    "PP2 DP2 whole optimizer": _megatron(pp=2, dp=2, **WHOLE),
    "PP2 VPP2 DP2": _megatron(pp=2, vpp=2, dp=2),
    "PP2 VPP2 DP2 whole optimizer": _megatron(pp=2, vpp=2, dp=2, **WHOLE),
    "PP2 VPP2 DP2 overlap": _megatron(pp=2, vpp=2, dp=2, **OVERLAP),
    **{f"ZeRO-{stage} DP4": _zero(stage, dp=4) for stage in STAGES},
    **{f"ZeRO-{stage} TP2 DP2": _zero(stage, tp=2, dp=2) for stage in STAGES},
    **{f"ZeRO-{stage} TP2 DP2 SP": _zero(stage, tp=2, dp=2, **SP) for stage in STAGES},
}

Curve = dict[str, Any]
"""Of one training: `layout`, `losses`, `grad_norms`, `validation_loss`, `seconds` of all steps."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, not a table")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--layouts", default="", help="names, separated by commas; default: all")
    arguments = parser.parse_args()
    chosen = [name.strip() for name in arguments.layouts.split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in LAYOUTS]:
        parser.error(f"--layouts: {', '.join(unknown)}; choose from {', '.join(LAYOUTS)}")
    layouts = {name: layout for name, layout in LAYOUTS.items() if not chosen or name in chosen}
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
    )
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        result = measure(Path(folder), layouts, arguments.steps)
    if len(layouts) == len(LAYOUTS):
        write_json(RunFolder.of("parity").parity, result)
    print(json.dumps(result, indent=2) if arguments.json else as_text(result))
    sys.exit(0 if result["passed"] else 1)


def measure(folder: Path, layouts: dict[str, Layout], steps: int) -> dict[str, Any]:
    """Train every layout below an empty folder; returns what is printed."""
    load = os.getloadavg()[0]
    began = time.monotonic()
    tell("making data and weights")
    run = make_run(folder, steps)
    curves = train_layouts(run, {REFERENCE: LAYOUTS[REFERENCE], **layouts})
    rows = compare(curves)
    reference = curves[REFERENCE]
    clip = RECIPE["optimizer.clip_grad"]
    return {
        "benchmark": "parity",
        "limits": LIMITS,
        "reference": f"megatron-core, {REFERENCE}, one rank",
        "recipe": {"params": "params/tiny.yaml", **RECIPE, "training.train_iters": steps},
        "first_loss": reference["losses"][0],
        "last_loss": reference["losses"][-1],
        "steps_clipped": sum(norm > clip for norm in reference["grad_norms"]),
        "layouts": rows,
        "passed": all(all(row["within"].values()) for row in rows),
        "seconds": round(time.monotonic() - began, 1),
        "load_before": round(load, 2),
        "made_with": record(),
    }


def make_run(root: Path, steps: int, **overrides: Any) -> RunFolder:
    """A run folder ready to train: experiment, pocket corpus, and weights none of which is 0."""
    folder = RunFolder.of("parity", root)
    values = {**RECIPE, "training.train_iters": steps, "training.eval_interval": steps, **overrides}
    _, experiment = load_experiment(REPOSITORY / "params" / "tiny.yaml", values)
    save_experiment(folder.experiment, folder.name, experiment)
    _write_corpus(folder, experiment)
    write_weights(folder.huggingface, experiment.model, experiment.training.seed)
    return folder


def _write_corpus(folder: RunFolder, experiment: Experiment) -> None:
    data = experiment.data
    write_pocket_world(make_pocket_world(data.pocket_seed), folder.data)
    texts = texts_to_train_on(read_rows([folder.pocket_records]), data.handler)
    tokenizer = train_tokenizer(texts, experiment.model.vocab_size, folder.tokenizer)
    made = handler(data.handler, tokenizer)
    options = Options(append_eod=data.append_eod)
    preprocess([folder.pocket_records], folder.corpus_prefix, made, tokenizer, options)


def train_layouts(
    run: RunFolder, layouts: dict[str, Layout], *, save: tuple[str, ...] = ()
) -> dict[str, Curve]:
    """The curve of every layout and of transformers; ranks are started once per number of ranks.

    Args:
        save: layouts whose trained weights are saved, at `checkpoint_path`.
    """
    curves: dict[str, Curve] = {}
    for size in sorted({layout.world_size for layout in layouts.values()}):
        names = [name for name, layout in layouts.items() if layout.world_size == size]
        tell(f"starting {size} rank{'s' if size > 1 else ''} for {len(names)} layouts")
        order = {
            "layouts": {name: layouts[name].model_dump() for name in names},
            "save": [name for name in names if name in save],
        }
        write_json(_order_path(run), order)
        _curves_path(run).write_text("")
        logs = run.path / "logs" / f"{size}-ranks"
        launch("benchmarks.parity", run, world_size=size, logs=logs, on_tick=_follow(run))
        found = [json.loads(line) for line in _curves_path(run).read_text().splitlines()]
        curves |= {curve["layout"]: curve for curve in found}
    expected = {*layouts, TRANSFORMERS}
    if missing := expected - curves.keys():
        raise RuntimeError(f"no curve of {', '.join(sorted(missing))}; logs: {run.path / 'logs'}")
    return {name: curves[name] for name in [TRANSFORMERS, *layouts]}


def compare(curves: dict[str, Curve]) -> list[dict[str, Any]]:
    """A row per curve but the reference's: its largest relative differences, and whether within
    the limits."""
    reference = curves[REFERENCE]
    rows = []
    for name, curve in curves.items():
        if name == REFERENCE:
            continue
        found = {
            "loss": _difference(curve["losses"], reference["losses"]),
            "grad_norm": _difference(curve["grad_norms"], reference["grad_norms"]),
            "validation_loss": _difference(
                [curve["validation_loss"]], [reference["validation_loss"]]
            ),
        }
        rows.append(
            {
                "layout": name,
                "ranks": curve["ranks"],
                **{f"max_relative_{key}_difference": value for key, value in found.items()},
                "seconds": round(curve["seconds"], 1),
                "within": {key: found[key] <= limit for key, limit in LIMITS.items()},
            }
        )
    return rows


def _difference(found: list[float], expected: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


def checkpoint_path(run: RunFolder, name: str) -> Path:
    """Where `train_layouts` saves a layout's trained weights."""
    return run.path / "trained" / name.replace(" ", "-")


def as_text(result: dict[str, Any]) -> str:
    """The result as a Markdown table, with the recipe below it."""
    keys = [f"max_relative_{key}_difference" for key in LIMITS]
    lines = [
        "| layout | ranks | loss | gradient norm | validation loss | seconds | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["layouts"]:
        numbers = " | ".join(f"{row[key]:.1e}" for key in keys)
        mark = "" if all(row["within"].values()) else "**over the limit**"
        lines.append(
            f"| {row['layout']} | {row['ranks']} | {numbers} | {row['seconds']:.1f} | {mark} |"
        )
    limits = ", ".join(f"{key} {value:g}" for key, value in result["limits"].items())
    recipe = ", ".join(f"{key} {value}" for key, value in result["recipe"].items())
    lines += [
        "",
        f"Largest relative difference from {result['reference']}; limits: {limits}.",
        f"Loss {result['first_loss']:.4f} → {result['last_loss']:.4f}, clipped in "
        f"{result['steps_clipped']} steps; {result['seconds']:.0f} s in all.",
        f"Recipe: {recipe}.",
    ]
    return "\n".join(lines)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _follow(run: RunFolder) -> Callable[[], None]:
    told = 0

    def tick() -> None:
        nonlocal told
        lines = _curves_path(run).read_text().splitlines()
        for line in lines[told:]:
            curve = json.loads(line)
            tell(f"  {curve['layout']}: {curve['seconds']:.1f} s")
        told = len(lines)

    return tick


def _order_path(run: RunFolder) -> Path:
    return run.path / "order.json"


def _curves_path(run: RunFolder) -> Path:
    return run.path / "curves.jsonl"


# What follows runs in the ranks.


def train_in_rank(run: RunFolder) -> None:
    """Train the layouts that `train_layouts` ordered, one after another, in one job."""
    from internlm_lib.devices import select_device

    device = select_device("cpu")
    device.adapt_megatron()
    import torch

    from internlm_lib.model.parallel import (
        initialize_parallel,
        is_rank_zero,
        shutdown,
        split_ranks,
    )

    _, experiment = load_experiment(run.experiment)
    order = json.loads(_order_path(run).read_text())
    layouts = {name: Layout.model_validate(values) for name, values in order["layouts"].items()}
    initialize_parallel(next(iter(layouts.values())), device)
    for name, layout in layouts.items():
        split_ranks(layout)
        save = checkpoint_path(run, name) if name in order["save"] else None
        curve = _train(run, experiment, layout, device, save)
        if is_rank_zero():
            _report(run, {"layout": name, "ranks": layout.world_size, **curve})
    if torch.distributed.get_world_size() == 1:
        stream, validation = _streams(run, experiment, Layout(), device)
        curve = _train_transformers(run, experiment, stream, validation)
        _report(run, {"layout": TRANSFORMERS, "ranks": 1, **curve})
    shutdown()


def _report(run: RunFolder, curve: Curve) -> None:
    with _curves_path(run).open("a") as file:
        file.write(json.dumps(curve) + "\n")


def _streams(
    run: RunFolder, experiment: Experiment, layout: Layout, device: Any
) -> tuple["BatchStream", "BatchStream"]:
    """Training and validation batches of this rank."""
    from megatron.core import parallel_state

    from internlm_lib.data.batches import BatchStream, build_datasets

    training = experiment.training
    train, valid, _ = build_datasets(
        run.corpus_prefix, experiment.data, training, experiment.model.vocab_size
    )
    assert valid is not None

    def stream(dataset: Any) -> BatchStream:
        return BatchStream(
            dataset,
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=layout.data_parallel_size,
            device=device.current(),
        )

    return stream(train), stream(valid)


def _train(
    run: RunFolder, experiment: Experiment, layout: Layout, device: Any, save: Path | None
) -> Curve:
    from internlm_lib.model.build import build_chunks
    from internlm_lib.training.schedule import learning_rate
    from internlm_lib.training.worker import build_engine
    from internlm_lib.weights.megatron import load_weights, save_weights

    training, model = experiment.training, experiment.model
    stream, validation = _streams(run, experiment, layout, device)
    chunks = build_chunks(model, layout, training, device)
    load_weights(chunks, run.huggingface, model)
    engine = build_engine(chunks, layout, experiment)
    accumulate = training.num_micro_batches(layout)
    curve = _Curve()
    for step in range(1, training.train_iters + 1):
        result = engine.train_step(stream.step(step - 1), accumulate, learning_rate(training, step))
        curve.add(result.loss, result.grad_norm)
        if step == training.train_iters // 2:
            curve.validation_loss = engine.validation_loss(validation.step(0), accumulate)
    found = curve.found()
    if save:
        with engine.whole_weights() as weights:
            save_weights(weights, save, model)
    return found


class _Curve:
    """Numbers of one training, and the time since it was made."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._began = time.monotonic()
        self.validation_loss = float("nan")

    def add(self, loss: float, grad_norm: float) -> None:
        self._losses.append(loss)
        self._norms.append(grad_norm)

    def found(self) -> dict[str, Any]:
        return {
            "losses": self._losses,
            "grad_norms": self._norms,
            "validation_loss": self.validation_loss,
            "seconds": time.monotonic() - self._began,
        }


def _train_transformers(
    run: RunFolder, experiment: Experiment, stream: "BatchStream", validation: "BatchStream"
) -> Curve:
    from internlm_lib.training.plain_loop import PlainLoop

    loop, curve = PlainLoop(run.huggingface, experiment), _Curve()
    for step in range(1, experiment.training.train_iters + 1):
        curve.add(*loop.step(stream.step(step - 1), step))
        if step == experiment.training.train_iters // 2:
            curve.validation_loss = loop.validation_loss(validation.step(0))
    return curve.found()


if __name__ == "__main__":
    # torchrun's ranks get the launcher's variable, a person's shell has none.
    if LAUNCHER_VARIABLE in os.environ and "RANK" in os.environ:
        rank_main(train_in_rank)
    else:
        main()
