"""Commands on checkpoints: convert them, check them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from internlm_lib.cli.output import AsJson, console, print_json, print_result, reported

if TYPE_CHECKING:
    from internlm_lib.experiment.schema import ModelSection


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
    with reported(as_json):
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
            print_plan(plan.target_path, files, console(stderr=as_json))
            if as_json:
                print_json({"files": files, "bytes": plan.nbytes})
            return
        with ByteProgress(console(stderr=True)) as progress:
            result = carry_out(plan, progress)
        print_result(result, as_json)


def verify(
    path: Annotated[Path, typer.Argument(help="Checkpoint, or a run's folder.")],
    model: Annotated[
        str | None,
        typer.Option(help="Preset, params file or config.json, if the checkpoint does not say."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check checkpoints against their manifests: files, names, shapes, and every tensor's hash."""
    with reported(as_json):
        from internlm_lib.progress import ByteProgress
        from internlm_lib.weights.formats import checkpoints_below
        from internlm_lib.weights.verify import verify as check

        found = checkpoints_below(path)
        named = _named_model(model)
        with ByteProgress(console(stderr=True)) as progress:
            reports = {str(at): check(at, named, progress) for at in found}
        only = next(iter(reports.values()))
        ok = all(report["ok"] for report in reports.values())
        print_result({"ok": ok, "checkpoints": reports} if len(reports) > 1 else only, as_json)
        if not ok:
            raise typer.Exit(1)


def _layer_list(text: str | None) -> tuple[int, ...]:
    from internlm_lib.errors import InputError

    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"--num-layer-list {text!r}: give numbers like 20,22,22,16") from None


def _named_model(name: str | None) -> "ModelSection | None":
    from internlm_lib.weights.model_config import named_model

    return named_model(name) if name else None
