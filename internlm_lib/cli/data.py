"""Commands on data: records to token files."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from internlm_lib.cli.output import AsJson, console, print_result, reported

if TYPE_CHECKING:
    from internlm_lib.data.preprocess import Corpus


def preprocess(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Records: files, folders or globs.", metavar="INPUT..."),
    ],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.model, or its folder.")],
    output_prefix: Annotated[
        Path, typer.Option(help="Path of the files to be made, without suffix.")
    ],
    handler: Annotated[
        str | None,
        typer.Option(
            help="What makes documents of records: a name, or package.module:Class; by default "
            "the built-in one that fits the columns."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Documents encoded at a time; by default one per CPU.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Where columns have other names: instruction=question,output=answer."),
    ] = None,
    on_damage: Annotated[
        str, typer.Option(help="At a record that cannot be used: stop, or count it.")
    ] = "stop",
    dtype: Annotated[
        str, typer.Option(help="Of the token ids: smallest, or int32 as AscendSpeed has them.")
    ] = "smallest",
    append_eod: Annotated[
        bool, typer.Option("--append-eod/--no-append-eod", help="Close documents with </s>.")
    ] = True,
    pack_to: Annotated[
        int | None,
        typer.Option(min=1, help="Instruction data: several documents per row; the seq_length."),
    ] = None,
    split_longer_than: Annotated[
        int | None, typer.Option(min=1, help="Pre-training text: cut documents of more tokens.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also if nothing has changed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Records to token files (.bin, .idx) and their card: in parallel, resumable, not twice."""
    with reported(as_json):
        from internlm_lib.data.examples import examples, fitting_handler
        from internlm_lib.data.handlers import handler as make_handler
        from internlm_lib.data.inputs import options_of
        from internlm_lib.data.preprocess import preprocess as carry_out
        from internlm_lib.data.tokenizer import Tokenizer
        from internlm_lib.progress import DocumentProgress, print_examples

        options = options_of(
            append_eod=append_eod,
            dtype=dtype,
            on_damage=on_damage,
            columns=_columns(columns),
            pack_to=pack_to,
            split_longer_than=split_longer_than,
        )
        model = Tokenizer(tokenizer / "tokenizer.model" if tokenizer.is_dir() else tokenizer)
        chosen = make_handler(handler or fitting_handler(sources, options.columns), model)
        first = examples(sources, chosen, model, options)
        print_examples(chosen.name, first, console(stderr=True))
        progress = DocumentProgress(console(stderr=True))
        with progress:
            corpus = carry_out(
                sources,
                output_prefix,
                chosen,
                model,
                options,
                workers=workers or _cpus(),
                force=force,
                on_progress=progress.show,
            )
        print_result(_result(corpus), as_json)


def _columns(text: str | None) -> dict[str, str]:
    from internlm_lib.errors import InputError

    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    if not all(name and column for name, _, column in pairs):
        raise InputError(f"--columns {text!r}: give pairs like instruction=question,output=answer")
    return {name: column for name, _, column in pairs}


def _cpus() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _result(corpus: "Corpus") -> dict[str, Any]:
    """Rates are those of this call: 0 where there was nothing to do."""
    from internlm_lib.data.card import card_path

    counts = corpus.card.counts
    done = 0 if corpus.unchanged else counts.documents - corpus.resumed_documents
    tokens = 0 if corpus.unchanged else counts.tokens - corpus.resumed_tokens
    return {
        **counts.model_dump(),
        "seconds": round(corpus.seconds, 3),
        "documents_per_second": round(done / corpus.seconds, 1),
        "tokens_per_second": round(tokens / corpus.seconds, 1),
        "bin_sha256": corpus.card.bin_sha256,
        "output": str(corpus.prefix),
        "handler": corpus.card.inputs.handler.name,
        "unchanged": corpus.unchanged,
        "resumed_documents": corpus.resumed_documents,
        "packing_efficiency": corpus.card.packing and corpus.card.packing.efficiency,
        "files": [file.name for file in corpus.card.files],
        "card": str(card_path(corpus.prefix)),
    }
