"""Commands about machines: what one lacks, what it computes, and one training on several."""

import sys
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
    from rich.console import Console


def doctor(
    device: Annotated[
        str | None,
        typer.Option(help="npu, cuda or cpu: what training on it lacks here is then a failure."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine and environment; each finding comes with its fix."""
    with reported(as_json):
        from internlm_lib.doctor import examine, print_findings

        with stdout_for_json(as_json):
            findings = examine(device)
        failed = any(finding.status == "fail" for finding in findings)
        if as_json:
            print_json({"ok": not failed, "findings": [vars(finding) for finding in findings]})
        else:
            print_findings(findings, console())
    raise typer.Exit(1 if failed else 0)


def launch(
    params: Params,
    nnodes: Annotated[
        int | None, typer.Option(help="Number of machines; the cluster's, or 1.")
    ] = None,
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
        int | None,
        typer.Option(help="Start the ranks of this node, which is number 0, 1, …; the cluster's."),
    ] = None,
    ignore_cluster: Annotated[
        bool, typer.Option("--ignore-cluster", help="Read no variables of a cluster.")
    ] = False,
    role: Annotated[str, typer.Option(help="candidate or reference.")] = "candidate",
    format: Annotated[
        str | None, typer.Option(help="torchrun, deepspeed, slurm or volcano; all by default.")
    ] = None,
    run_name: RunName = None,
    assignments: Assignments = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands; start nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """One training on several machines: print the commands for each, or start this one's ranks.

    Nodes that no option names are those of the job that this is part of: RANK_TABLE_FILE,
    ModelArts, MindCluster, Volcano, Slurm, torchrun's names. Either way the resolved experiment is
    written to the run's folder, which all nodes share.
    """
    with reported(as_json):
        from internlm_lib.experiment.load import load_experiment, parse_assignments
        from internlm_lib.notebook import LiveLine
        from internlm_lib.ranks.cluster import cluster_from_environment
        from internlm_lib.run_folder import RunFolder
        from internlm_lib.training.nodes import Nodes, launch_here, plan_training, write_commands

        cluster = None if ignore_cluster else cluster_from_environment()
        named, experiment = load_experiment(params, parse_assignments(assignments or []))
        nodes = Nodes(
            nnodes=nnodes,
            nproc_per_node=nproc_per_node,
            hosts=tuple(hosts.split(",")) if hosts else (),
            master_addr=master_addr,
            master_port=master_port,
            interface=interface,
        )
        nodes, node_rank = nodes.within(cluster, node_rank)
        folder = RunFolder.of(run_name or named)
        with stdout_for_json(as_json), LiveLine() as show:
            plan = plan_training(folder, experiment, role, nodes, cluster=cluster)
            if dry_run:
                result = write_commands(plan, experiment, role, format)
            else:
                if cluster:
                    print(f"internlm: {cluster.summary()}", file=sys.stderr)
                result = launch_here(plan, experiment, role, node_rank, show)
        if as_json or not dry_run:
            print_result(result, as_json)
        else:
            print(result["text"], end="")


def selftest(
    device: Annotated[str, typer.Option(help="auto, npu, cuda or cpu.")] = "auto",
    ranks: Annotated[
        int | None, typer.Option(help="Devices to test; all by default, on a CPU two ranks.")
    ] = None,
    run_name: Annotated[
        str | None, typer.Option(help="Name of the run; selftest-DEVICE by default.")
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow store of the run; the project's own by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """This machine's devices against the reference: kernels, collectives, memory, a short training.

    Exit code 1 if a check failed. The table also goes to MLflow.
    """
    with reported(as_json):
        from internlm_lib.errors import KitError
        from internlm_lib.notebook import LiveLine
        from internlm_lib.selftest.run import Selftest, check_passed
        from internlm_lib.selftest.run import selftest as carry_out

        asked = Selftest(device, ranks, run_name, tracking_uri)
        with stdout_for_json(as_json), LiveLine() as show:
            result = carry_out(asked, show)
        if as_json:
            print_json(result)
        else:
            _print_checks(result["checks"], console())
        try:
            print(check_passed(result), file=sys.stderr)
        except KitError as error:
            # The object on stdout is the result: no second one for the error.
            print(f"internlm: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None


def _print_checks(rows: list[dict[str, Any]], out: "Console") -> None:
    from itertools import groupby

    from rich.markup import escape
    from rich.table import Table

    table = Table("", "check")
    for heading in ("figure", "tolerance"):
        table.add_column(heading, justify="right")
    table.add_column("measured", overflow="fold")
    for group, members in groupby(rows, key=lambda row: f"{row['group']}, {row['unit']}"):
        table.add_section()
        table.add_row("", f"[bold]{group}[/]")
        for row in members:
            table.add_row(
                "[green]ok[/]" if row["passed"] else "[red]fail[/]",
                escape(row["name"]),
                "error" if row["figure"] is None else f"{row['figure']:.2g}",
                f"{row['tolerance']:.2g}",
                escape(_measured(row)),
            )
    out.print(table)
    for row in rows:
        if row["error"]:
            out.print(escape(f"{row['name']}:\n{row['error']}"), highlight=False)


def _measured(row: dict[str, Any]) -> str:
    numbers = [f"{name} {value:.4g}" for name, value in row["measured"].items()]
    return ", ".join([*numbers, *([f"rank {row['rank']}"] if row["rank"] else [])])
