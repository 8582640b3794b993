"""Commands on trainings from anywhere: hold two against each other, make a log a run."""

import sys
from pathlib import Path
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
    log_scale: Annotated[
        bool, typer.Option("--log-scale", help="Draw the losses on a logarithmic axis.")
    ] = False,
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
            log_scale=log_scale,
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


def import_log(
    file: Annotated[Path, typer.Argument(help="Training log, plain or gzip.")],
    format: Annotated[
        str, typer.Option(help="megatron (AscendSpeed, MindSpeed-LLM), internevo, huggingface.")
    ] = "auto",
    run_name: Annotated[
        str | None, typer.Option(help="Name of the run; the file's by default.")
    ] = None,
    seq_length: Annotated[int | None, typer.Option(help="Tokens per sample.")] = None,
    devices: Annotated[int | None, typer.Option(help="Number of devices trained on.")] = None,
    device: Annotated[str | None, typer.Option(help="npu, cuda or cpu.")] = None,
    device_name: Annotated[str | None, typer.Option(help='E.g. "Ascend 910B3".')] = None,
    global_batch_size: Annotated[int | None, typer.Option(help="Samples per step.")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32.")] = None,
    model: Annotated[str | None, typer.Option(help="A preset, e.g. internlm-7b.")] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow store of the run; the project's own by default.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that was imported before.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """A training log becomes a run of the kit, in its journal and in MLflow.

    Options state what the log lacks; what contradicts it is refused.
    """
    with reported(as_json):
        from internlm_lib.logs.facts import Facts
        from internlm_lib.logs.import_log import import_log as carry_out
        from internlm_lib.run_folder import RunFolder
        from internlm_lib.tracking.mlflow_replica import sync

        facts = Facts(
            seq_length=seq_length,
            devices=devices,
            device=device,
            device_name=device_name,
            global_batch_size=global_batch_size,
            precision=precision,
            model=model,
        )
        with stdout_for_json(as_json):
            result = carry_out(
                file,
                run_name,
                format=format,
                facts=facts,
                tracking_uri=tracking_uri,
                overwrite=overwrite,
            )
            sync(RunFolder.of(result["run"]))
        print_result(result, as_json)
