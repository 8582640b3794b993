"""Commands that run stages: all of them through their notebooks, or one in this process."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from internlm_lib.cli.output import (
    AsJson,
    Assignments,
    Params,
    RunName,
    console,
    print_json,
    print_result,
    reported,
    stdout_for_json,
)

if TYPE_CHECKING:
    from internlm_lib.stages.stage import Stage


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
    with reported(as_json):
        from internlm_lib.experiment.load import parse_assignments
        from internlm_lib.pipeline import run_pipeline
        from internlm_lib.progress import RunProgress, print_failure, print_summary

        progress = console(stderr=True)
        with stdout_for_json(as_json):
            summary = run_pipeline(
                params,
                run_name=run_name,
                overrides=parse_assignments(assignments or []),
                only=[name.strip() for name in only.split(",")] if only else (),
                start_from=start_from,
                force=force,
                on_event=RunProgress(progress).show,
            )
            print_summary(summary, progress if as_json else console())
        if as_json:
            print_json(summary)
        if error := summary.get("error"):
            print_failure(error, progress)
            raise typer.Exit(error["exit_code"])


def prepare(
    params: Params,
    run_name: RunName = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Stage 01 without a notebook: tokenizer and token files."""
    _run_stage("prepare", params, run_name, assignments, as_json)


def convert_stage(
    params: Params,
    run_name: RunName = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Stage 02 without a notebook: the weights to start from, checked in the candidate's layout."""
    _run_stage("convert", params, run_name, assignments, as_json, in_ranks=True)


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


def infer(
    params: Params,
    run_name: RunName = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Stage 05 without a notebook: greedy text from the trained weights."""
    _run_stage("infer", params, run_name, assignments, as_json, in_ranks=True)


def evaluate(
    params: Params,
    run_name: RunName = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Stage 06 without a notebook: the multiple-choice questions, before and after training."""
    _run_stage("evaluate", params, run_name, assignments, as_json, in_ranks=True)


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
    with reported(as_json):
        from importlib import import_module

        from internlm_lib.experiment.load import load_experiment, parse_assignments
        from internlm_lib.notebook import LiveLine
        from internlm_lib.run_folder import RunFolder
        from internlm_lib.stages.stage import STAGES, begin_stage

        named, experiment = load_experiment(params, parse_assignments(assignments or []))
        name = next(stage for stage in STAGES if stage.endswith(f"_{module}"))
        stage = begin_stage(name, RunFolder.of(run_name or named), experiment)
        work = partial(import_module(f"internlm_lib.stages.{module}").run, **(options or {}))
        with stdout_for_json(as_json), LiveLine() as show:
            try:
                status = stage.finish(work(stage, show) if in_ranks else work(stage))
                check(stage, status["result"])
            except BaseException as error:
                stage.fail(error)
                raise
        print_result({"run": stage.folder.name, **status} if as_json else status["result"], as_json)
