"""The `internlm` command.

Every command takes `--json`: exactly one JSON object on stdout, progress on stderr. Exit codes:
0 done, 1 failed, 2 bad input, 3 verdict failed, 4 verdict inconclusive or not comparable, 5 stopped
on request after saving. Heavy imports are inside the commands, so that `--help` is quick.
"""

import typer

from internlm_lib.cli import checkpoints, comparison, data, machines, published, stages, tracking

app = typer.Typer(
    help="Reproduce InternLM training on NPUs, GPUs or a plain CPU, and prove what came out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for command in (
    machines.doctor,
    machines.selftest,
    stages.run,
    stages.prepare,
    data.preprocess,
    stages.convert_stage,
    stages.train,
    machines.launch,
    stages.infer,
    stages.evaluate,
    stages.compare_stage,
    comparison.compare,
    comparison.import_log,
    checkpoints.convert,
    checkpoints.verify,
    published.published,
    tracking.ui,
    tracking.sync,
):
    app.command()(command)


def main() -> None:
    app()
