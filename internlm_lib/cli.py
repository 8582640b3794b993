"""The `internlm` command.

Every command takes `--json`: exactly one JSON object on stdout, progress on stderr. Exit codes:
0 done, 1 failed, 2 bad input, 3 verdict failed, 4 verdict inconclusive or not comparable, 5 stopped
on request after saving. Heavy imports are inside the commands, so that `--help` is quick.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from internlm_lib.errors import KitError

if TYPE_CHECKING:
    from rich.console import Console

    from internlm_lib.experiment.schema import ModelSection
    from internlm_lib.stages.stage import Stage

app = typer.Typer(
    help="Reproduce InternLM training on NPUs, GPUs or a plain CPU, and prove what came out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Params = Annotated[Path, typer.Argument(help="Params file, e.g. params/tiny.yaml.")]
RunName = Annotated[str | None, typer.Option(help="Name of the run, instead of the params file's.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override of one key, e.g. training.lr=1e-5; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this machine and environment; each finding comes with its fix."""
    from internlm_lib.doctor import examine, print_findings

    with _stdout_for_json(as_json):
        findings = examine()
    failed = any(finding.status == "fail" for finding in findings)
    if as_json:
        _print_json({"ok": not failed, "findings": [vars(finding) for finding in findings]})
    else:
        print_findings(findings, _console())
    raise typer.Exit(1 if failed else 0)


@app.command()
def run(
    params: Params,
    run_name: RunName = None,
    assignments: Assignments = None,
    only: Annotated[
        str | None, typer.Option(help="Only these stages, e.g. 03_train,04_compare.")
    ] = None,
    start_from: Annotated[
        str | None, typer.Option("--from", help="Leave out the stages before this one.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Run stages that have not changed, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the six notebooks; skips what has not changed, resumes what failed."""
    with _reported(as_json):
        from internlm_lib.experiment.load import parse_assignments
        from internlm_lib.pipeline import run_pipeline
        from internlm_lib.progress import RunProgress, print_failure, print_summary

        progress = _console(stderr=True)
        with _stdout_for_json(as_json):
            summary = run_pipeline(
                params,
                run_name=run_name,
                overrides=parse_assignments(assignments or []),
                only=[name.strip() for name in only.split(",")] if only else (),
                start_from=start_from,
                force=force,
                on_event=RunProgress(progress).show,
            )
            print_summary(summary, progress if as_json else _console())
        if as_json:
            _print_json(summary)
        if error := summary.get("error"):
            print_failure(error, progress)
            raise typer.Exit(error["exit_code"])


@app.command()
def prepare(
    params: Params,
    run_name: RunName = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Stage 01 without a notebook: tokenizer and token files."""
    _run_stage("prepare", params, run_name, assignments, as_json)


@app.command("convert-stage")
def convert_stage(
    params: Params,
    run_name: RunName = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Stage 02 without a notebook: the weights to start from, checked in the candidate's layout."""
    _run_stage("convert", params, run_name, assignments, as_json, in_ranks=True)


@app.command()
def train(
    params: Params,
    run_name: RunName = None,
    assignments: Assignments = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Trace some steps of every rank; show slowest operators."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Stage 03 without a notebook: train the reference, if there is one, and the candidate."""
    if not profile:
        _run_stage("train", params, run_name, assignments, as_json, in_ranks=True)
        return

    def show(stage: "Stage", result: Mapping[str, Any]) -> None:
        from internlm_lib.notebook import table
        from internlm_lib.stages.train import profiles

        for role, rows in profiles(stage).items():
            traces = stage.folder.training(role).profile
            print(table(rows, caption=f"{role}: slowest operators ({traces})"), file=sys.stderr)

    _run_stage(
        "train", params, run_name, assignments, as_json, in_ranks=True, check=show,
        options={"profile": True},
    )  # fmt: skip


@app.command()
def launch(
    params: Params,
    nnodes: Annotated[int, typer.Option(help="Number of machines.")] = 1,
    nproc_per_node: Annotated[
        int | None, typer.Option(help="Ranks of each; by default the layout's, shared evenly.")
    ] = None,
    hosts: Annotated[
        str | None, typer.Option(help="Names of the nodes in rank order, e.g. a01,a02.")
    ] = None,
    master_addr: Annotated[
        str | None, typer.Option(help="Address of the first node; its name by default.")
    ] = None,
    master_port: Annotated[int | None, typer.Option(help="A free port there; 29500.")] = None,
    interface: Annotated[
        str | None, typer.Option(help="Network interface between the nodes, e.g. eth0.")
    ] = None,
    node_rank: Annotated[
        int | None, typer.Option(help="Start the ranks of this node, which is number 0, 1, …")
    ] = None,
    role: Annotated[str, typer.Option(help="candidate or reference.")] = "candidate",
    format: Annotated[
        str | None, typer.Option(help="torchrun, deepspeed or slurm; all by default.")
    ] = None,
    run_name: RunName = None,
    assignments: Assignments = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands; start nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """One training on several machines: print the commands for each, or start this one's ranks.

    Either way the resolved experiment is written to the run's folder, which all nodes share.
    """
    with _reported(as_json):
        from internlm_lib.experiment.load import load_experiment, parse_assignments
        from internlm_lib.notebook import LiveLine
        from internlm_lib.run_folder import RunFolder
        from internlm_lib.training.nodes import Nodes, launch_here, plan_training, write_commands

        named, experiment = load_experiment(params, parse_assignments(assignments or []))
        nodes = Nodes(
            nnodes=nnodes,
            nproc_per_node=nproc_per_node,
            hosts=tuple(hosts.split(",")) if hosts else (),
            master_addr=master_addr,
            master_port=master_port,
            interface=interface,
        )
        folder = RunFolder.of(run_name or named)
        with _stdout_for_json(as_json), LiveLine() as show:
            plan = plan_training(folder, experiment, role, nodes)
            if dry_run:
                result = write_commands(plan, experiment, role, format)
            else:
                result = launch_here(plan, experiment, role, node_rank, show)
        if as_json or not dry_run:
            _print_result(result, as_json)
        else:
            print(result["text"], end="")


@app.command()
def infer(
    params: Params,
    run_name: RunName = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Stage 05 without a notebook: greedy text from the trained weights."""
    _run_stage("infer", params, run_name, assignments, as_json, in_ranks=True)


@app.command()
def evaluate(
    params: Params,
    run_name: RunName = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Stage 06 without a notebook: the multiple-choice questions, before and after training."""
    _run_stage("evaluate", params, run_name, assignments, as_json, in_ranks=True)


@app.command("compare-stage")
def compare_stage(
    params: Params,
    run_name: RunName = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Stage 04 without a notebook: this run's candidate against its reference."""

    def check(stage: "Stage", result: Mapping[str, Any]) -> None:
        from internlm_lib.stages.compare import check_verdict

        print(check_verdict(result), file=sys.stderr)

    _run_stage("compare", params, run_name, assignments, as_json, check=check)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint, of any format.", metavar="SRC")],
    target: Annotated[Path, typer.Argument(help="Folder to be made.", metavar="DST")],
    to: Annotated[str, typer.Option(help="huggingface, megatron, classic or deepspeed.")],
    tensor_model_parallel_size: Annotated[int, typer.Option(help="Of the target.")] = 1,
    pipeline_model_parallel_size: Annotated[int, typer.Option(help="Of the target.")] = 1,
    num_layer_list: Annotated[
        str | None, typer.Option(help="Layers of each pipeline stage, e.g. 20,22,22,16.")
    ] = None,
    make_vocab_size_divisible_by: Annotated[
        int, typer.Option(help="Pad the vocabulary to a multiple of this × tensor parallel size.")
    ] = 1,
    merge_mlp: Annotated[
        bool, typer.Option("--merge-mlp", help="Gate and up as one tensor (classic, deepspeed).")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; as in the source by default.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Preset, params file or config.json, if the source does not say."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.model or its folder; the source's by default.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is written.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert weights: any format and layout to any other, streamed, hashed, bit-exact."""
    with _reported(as_json):
        from internlm_lib.progress import ByteProgress, print_plan
        from internlm_lib.weights.convert import Order, plan_conversion
        from internlm_lib.weights.convert import convert as carry_out

        order = Order(
            to=to,
            tensor_parallel=tensor_model_parallel_size,
            pipeline_parallel=pipeline_model_parallel_size,
            num_layer_list=_layer_list(num_layer_list),
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            merge_mlp=merge_mlp,
            dtype=dtype,
        )
        named = _named_model(model)
        plan = plan_conversion(
            source, target, order, model=named, tokenizer=tokenizer, overwrite=overwrite
        )
        if dry_run:
            files = plan.file_rows()
            print_plan(plan.target_path, files, _console(stderr=as_json))
            if as_json:
                _print_json({"files": files, "bytes": plan.nbytes})
            return
        with ByteProgress(_console(stderr=True)) as progress:
            result = carry_out(plan, progress)
        _print_result(result, as_json)


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Checkpoint, or a run's folder.")],
    model: Annotated[
        str | None,
        typer.Option(help="Preset, params file or config.json, if the checkpoint does not say."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check checkpoints against their manifests: files, names, shapes, and every tensor's hash."""
    with _reported(as_json):
        from internlm_lib.progress import ByteProgress
        from internlm_lib.weights.formats import checkpoints_below
        from internlm_lib.weights.verify import verify as check

        found = checkpoints_below(path)
        named = _named_model(model)
        with ByteProgress(_console(stderr=True)) as progress:
            reports = {str(at): check(at, named, progress) for at in found}
        only = next(iter(reports.values()))
        ok = all(report["ok"] for report in reports.values())
        _print_result({"ok": ok, "checkpoints": reports} if len(reports) > 1 else only, as_json)
        if not ok:
            raise typer.Exit(1)


@app.command()
def ui(port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000) -> None:
    """Open the MLflow user interface on this kit's own store; stop it with Ctrl-C."""
    from internlm_lib.run_folder import project_root
    from internlm_lib.tracking.mlflow_store import store_uri

    root = project_root()
    (root / "mlflow").mkdir(exist_ok=True)
    print(f"MLflow on http://127.0.0.1:{port} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store_uri(root)]
    address = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, [*command, *address])


@app.command()
def sync(
    name: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="All runs by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send to MLflow what an outage left behind, each point once."""
    with _reported(as_json):
        from internlm_lib.run_folder import RunFolder, project_root
        from internlm_lib.tracking.mlflow_replica import sync as sync_run

        found = (project_root() / "runs").glob("*/experiment.yaml")
        names = [name] if name else sorted(path.parent.name for path in found)
        with _stdout_for_json(as_json):
            sent = {run: sync_run(RunFolder.of(run)) for run in names}
        if as_json:
            _print_json({"events_sent": sent})
        for run, count in sent.items():
            print(f"{run}: {count} events sent", file=sys.stderr)


def main() -> None:
    app()


def _layer_list(text: str | None) -> tuple[int, ...]:
    from internlm_lib.errors import InputError

    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"--num-layer-list {text!r}: give numbers like 20,22,22,16") from None


def _named_model(name: str | None) -> "ModelSection | None":
    from internlm_lib.weights.model_config import named_model

    return named_model(name) if name else None


def _print_result(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(result)
    else:
        _console().print_json(json.dumps(result, default=str))


def _run_stage(
    module: str,
    params: Path,
    run_name: str | None,
    assignments: list[str] | None,
    as_json: bool,
    *,
    in_ranks: bool = False,
    check: "Callable[[Stage, Mapping[str, Any]], None]" = lambda stage, result: None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Run one stage in this process; prints its status record.

    Args:
        in_ranks: its `run` also takes a function that is told how far the ranks are.
        check: told the result after it is written down; what it raises fails the stage.
        options: further keyword arguments of its `run`.
    """
    with _reported(as_json):
        from importlib import import_module

        from internlm_lib.experiment.load import load_experiment, parse_assignments
        from internlm_lib.notebook import LiveLine
        from internlm_lib.run_folder import RunFolder
        from internlm_lib.stages.stage import STAGES, begin_stage

        named, experiment = load_experiment(params, parse_assignments(assignments or []))
        name = next(stage for stage in STAGES if stage.endswith(f"_{module}"))
        stage = begin_stage(name, RunFolder.of(run_name or named), experiment)
        work = partial(import_module(f"internlm_lib.stages.{module}").run, **(options or {}))
        with _stdout_for_json(as_json), LiveLine() as show:
            try:
                status = stage.finish(work(stage, show) if in_ranks else work(stage))
                check(stage, status["result"])
            except BaseException as error:
                stage.fail(error)
                raise
        _print_result(
            {"run": stage.folder.name, **status} if as_json else status["result"], as_json
        )


@contextlib.contextmanager
def _reported(as_json: bool) -> Iterator[None]:
    """Print a KitError without a traceback, and leave with its exit code."""
    try:
        yield
    except KitError as error:
        print(f"internlm: {error}", file=sys.stderr)
        kind, code = type(error).__name__, error.exit_code
        message = str(error)
    except KeyboardInterrupt:
        print("internlm: stopped", file=sys.stderr)
        kind, code, message = "Interrupted", 1, "stopped by a signal"
    else:
        return
    if as_json:
        _print_json({"error": {"kind": kind, "message": message, "exit_code": code}})
    raise typer.Exit(code)


@contextlib.contextmanager
def _stdout_for_json(as_json: bool) -> Iterator[None]:
    """With `--json`, whatever the work prints goes to stderr: stdout holds the object alone.

    Kernels and ranks inherit the file descriptor, so it is redirected, too.
    """
    if not as_json:
        yield
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def _print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps(value, default=str), flush=True)


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)


if __name__ == "__main__":
    main()
