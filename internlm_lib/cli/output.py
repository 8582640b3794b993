"""What all commands share: their common options, errors with exit codes, one JSON object."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from internlm_lib.errors import KitError

if TYPE_CHECKING:
    from rich.console import Console

Params = Annotated[Path, typer.Argument(help="Params file, e.g. params/tiny.yaml.")]
RunName = Annotated[str | None, typer.Option(help="Name of the run, instead of the params file's.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override of one key, e.g. training.lr=1e-5; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@contextlib.contextmanager
def reported(as_json: bool) -> Iterator[None]:
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
        print_json({"error": {"kind": kind, "message": message, "exit_code": code}})
    raise typer.Exit(code)


@contextlib.contextmanager
def stdout_for_json(as_json: bool) -> Iterator[None]:
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


def print_result(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        console().print_json(json.dumps(result, default=str))


def print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps(value, default=str), flush=True)


def console(stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)
