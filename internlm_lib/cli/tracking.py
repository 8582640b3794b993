"""Commands on MLflow: open its interface, send it what an outage left behind."""

import os
import sys
from typing import Annotated

import typer

from internlm_lib.cli.output import AsJson, print_json, reported, stdout_for_json


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


def sync(
    name: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="All runs by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send to MLflow what an outage left behind, each point once."""
    with reported(as_json):
        from internlm_lib.run_folder import RunFolder, project_root
        from internlm_lib.tracking.mlflow_replica import sync as sync_run

        found = (project_root() / "runs").glob("*/experiment.yaml")
        names = [name] if name else sorted(path.parent.name for path in found)
        with stdout_for_json(as_json):
            sent = {run: sync_run(RunFolder.of(run)) for run in names}
        if as_json:
            print_json({"events_sent": sent})
        for run, count in sent.items():
            print(f"{run}: {count} events sent", file=sys.stderr)
