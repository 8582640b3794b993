"""Commands that hold trainings against each other."""

import sys
from typing import Annotated

import typer

from internlm_lib.cli.output import AsJson, print_result, reported, stdout_for_json

_SOURCE = "run's name (RUN/reference for its reference), MLflow run id, or a log file"


def compare(
    reference: Annotated[str, typer.Option(help=f"What is compared with: a {_SOURCE}.")],
    candidate: Annotated[str, typer.Option(help=f"What is to be judged: a {_SOURCE}.")],
    tolerance: Annotated[
        float, typer.Option(help="Of the mean relative error and of the bias; 0.02 is 2 %.")
    ] = 0.02,
    noise_floor: Annotated[
        list[str] | None,
        typer.Option(help="A repeat on one device; give two or more, one option each."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Judge although the experiments differ.")
    ] = False,
    flops: Annotated[
        str | None, typer.Option(help="Convention of FLOPs, e.g. 6N; the kit's own by default.")
    ] = None,
    run_name: Annotated[
        str | None, typer.Option(help="Folder below reports/; CANDIDATE-vs-REFERENCE by default.")
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow server of the run ids, and of the record made.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Two trainings, from anywhere: figures, tables, a report, and a verdict.

    Exit code 0 is a pass, 3 a fail, 4 inconclusive or not comparable.
    """
    with reported(as_json):
        from internlm_lib.errors import KitError
        from internlm_lib.model.arithmetic import MODEL_FLOPS_CONVENTION
        from internlm_lib.run_folder import project_root
        from internlm_lib.stages.compare import check_verdict
        from internlm_lib.stages.comparison import Comparison, compare_sources

        comparison = Comparison(
            reference=reference,
            candidate=candidate,
            run_name=run_name,
            tolerance=tolerance,
            repeats=noise_floor or (),
            force=force,
            convention=flops or MODEL_FLOPS_CONVENTION,
            tracking_uri=tracking_uri,
        )
        with stdout_for_json(as_json):
            result = compare_sources(comparison, project_root())
        print_result(result, as_json)
        try:
            print(check_verdict(result), file=sys.stderr)
        except KitError as error:
            # The object on stdout is the result, whatever it is: no second one for the error.
            print(f"internlm: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
