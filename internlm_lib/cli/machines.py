"""Commands about machines: what one lacks, and one training on several."""

from typing import Annotated

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
    with reported(as_json):
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
        with stdout_for_json(as_json), LiveLine() as show:
            plan = plan_training(folder, experiment, role, nodes)
            if dry_run:
                result = write_commands(plan, experiment, role, format)
            else:
                result = launch_here(plan, experiment, role, node_rank, show)
        if as_json or not dry_run:
            print_result(result, as_json)
        else:
            print(result["text"], end="")
