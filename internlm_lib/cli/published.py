"""The command on what others have published: throughput computed again, loss claims, peaks."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from internlm_lib.cli.output import AsJson, console, print_json, reported

if TYPE_CHECKING:
    from rich.console import Console

_SHORT = {
    "tokens_per_second_per_device": "tokens/s/device",
    "tokens_per_second": "tokens/s",
    "samples_per_second_per_device": "samples/s/device",
    "samples_per_second": "samples/s",
    "seconds_per_step": "s/step",
    "tflops_per_device": "TFLOPs",
    "mfu_percent": "MFU %",
    "hfu_percent": "HFU %",
}


def published(as_json: AsJson = False) -> None:
    """Published throughput, computed again: FLOP conventions, MFU, cells that contradict."""
    with reported(as_json):
        from internlm_lib.published import loss_claims
        from internlm_lib.published.peaks import peak_rows
        from internlm_lib.reporting.published import published_table

        rows = published_table()
        losses = [claim.model_dump() for claim in loss_claims()]
        if as_json:
            print_json({"rows": rows, "loss": losses, "peaks": peak_rows()})
            return
        out = console()
        _print_rows(rows, out)
        _print_contradictions(rows, out)
        _print_losses(losses, out)


def _print_rows(rows: list[dict[str, Any]], out: "Console") -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("row", "system", "printed", title="Published throughput, computed again")
    table.add_column("tokens/s/device", justify="right")
    table.add_column("MFU", justify="right")
    table.add_column("TFLOPs are", overflow="fold")
    table.add_column("ratio", justify="right")
    for row in rows:
        cells = ", ".join(f"{text} {_SHORT[column]}" for column, text in row["printed"].items())
        speed = row["derived"].get("tokens_per_second_per_device")
        ratio = row["ratio_to_reference"]
        table.add_row(
            row["name"], escape(row["system"]), cells,
            f"{speed:.5g}" if speed else "", _mfu_range(row["mfu"]), _convention(row),
            f"{ratio:.1%}" if ratio else "",
        )  # fmt: skip
    out.print(table)
    out.print("MFU counts 6N + causal attention; a range: the device's name is several devices'.")


def _mfu_range(utilisations: list[dict[str, Any]]) -> str:
    from internlm_lib.model.arithmetic import MODEL_FLOPS_CONVENTION

    shares = [entry["mfu"][MODEL_FLOPS_CONVENTION] for entry in utilisations]
    doubt = "" if all(entry["peak"]["confirmed"] for entry in utilisations) else "?"
    ends = (min(shares), max(shares)) if shares else ()
    return "–".join(dict.fromkeys(f"{share:.1%}" for share in ends)) + doubt


def _convention(row: Mapping[str, Any]) -> str:
    best = row["best_convention"]
    return f"{best['convention']} ({best['error']:+.1%})" if best else ""


def _print_contradictions(rows: list[dict[str, Any]], out: "Console") -> None:
    from rich.markup import escape

    out.print("\n[bold]Cells that contradict their row[/]")
    for line in _contradiction_lines(rows):
        out.print(escape(line), highlight=False, soft_wrap=True)


def _contradiction_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line a cell, and after a table's the table's note."""
    for _, table in groupby(rows, key=itemgetter("table")):
        note = ""
        for row in table:
            for found in row["contradictions"]:
                cell = f"{found['printed']} {_SHORT[found['column']]}"
                yield f"{row['name']}: {cell} ({found['kind']}): {found['why']}"
                note = row["note"]
        if note:
            yield f"    {note}"


def _print_losses(losses: list[dict[str, Any]], out: "Console") -> None:
    out.print("\n[bold]Published claims about losses[/]")
    for claim in losses:
        out.print(
            f"{claim['name']}: mean relative error {claim['mean_relative_error']}"
            f" (allowed {claim['mean_relative_error_allowed']}), largest relative"
            f" {claim['max_relative_error']}, largest absolute {claim['max_absolute_error']}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
