"""The selftest as a run of its own: its ranks, its table, its record in journal and MLflow."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from internlm_lib import provenance
from internlm_lib.devices import Device, select_device
from internlm_lib.devices.base import check_world_size
from internlm_lib.errors import InputError, KitError, RanksHangError
from internlm_lib.experiment.load import record_kind
from internlm_lib.files import write_text
from internlm_lib.ranks.launch import launch
from internlm_lib.run_folder import RunFolder
from internlm_lib.selftest.checks import Row, as_values, worst_of_ranks
from internlm_lib.selftest.corpus import write_corpus, write_weights
from internlm_lib.selftest.recipe import parity_experiment
from internlm_lib.selftest.worker import rows_path
from internlm_lib.stages.stage import Record, begin_record

RECORD = "selftest"

_HEADER = "# A selftest, made by `internlm selftest`; there is nothing here to train.\n"
_SEED = 1234
_CPU_RANKS = 2
"""Enough that collectives have somebody to talk to."""
_HANG_SECONDS = 900.0
"""A collective that waits for a rank fails before that by itself."""


@dataclass(frozen=True)
class Selftest:
    """What is asked for; meanings as the command line's."""

    device: str = "auto"
    ranks: int | None = None
    run_name: str | None = None
    tracking_uri: str | None = None
    tracking_experiment: str = "internlm"


def selftest(asked: Selftest, show: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Carry out all checks on all ranks, and write down what came out.

    Args:
        show: told how far it is, in a line of text.
    Returns:
        `passed`, `device`, `device_name`, `ranks`, `seconds`, `run`, `table` (the CSV's path) and
        `checks`: the fields of `checks.Row`, of every check the worst rank's.
    Raises:
        InputError: the device is not there, has not that many, or the name is another run's.
        WorkerError: a rank died or hung.
    """
    device = select_device(asked.device)
    ranks = _ranks(asked, device)
    folder = RunFolder.of(asked.run_name or f"{RECORD}-{device.name}")
    if folder.experiment.exists() and record_kind(folder.experiment) != RECORD:
        raise InputError(f"{folder.path}: this run is no selftest; give another --run-name")
    write_text(folder.experiment, _HEADER + yaml.safe_dump(_described(asked, device, ranks)))
    record = begin_record(RECORD, folder)
    try:
        begin = time.monotonic()
        rows = _carry_out(record.folder, device, ranks, show)
        result = _result(device, ranks, rows, folder, time.monotonic() - begin)
        _write_down(record, result)
        record.finish({name: value for name, value in result.items() if name != "checks"})
    except BaseException as error:
        record.fail(error)
        raise
    return result


def check_passed(result: dict[str, Any]) -> str:
    """Says that all checks passed. Raises KitError, naming those that did not."""
    failed = [row for row in result["checks"] if not row["passed"]]
    if failed:
        names = "; ".join(f"{row['group']}: {row['name']}" for row in failed)
        raise KitError(
            f"{len(failed)} of {len(result['checks'])} checks failed on {result['device_name']}: "
            f"{names}. The table says by how much; a kernel can be switched off by its "
            "training.use_… key, the rest is the machine's, its driver's or its libraries'"
        )
    return f"{len(result['checks'])} checks passed on {result['ranks']} × {result['device_name']}"


def _ranks(asked: Selftest, device: Device) -> int:
    ranks = asked.ranks if asked.ranks is not None else device.count() or _CPU_RANKS
    if ranks < 1:
        raise InputError(f"--ranks {ranks}: give 1 or more")
    check_world_size(device, ranks, "--ranks")
    return ranks


def _carry_out(
    folder: RunFolder, device: Device, ranks: int, show: Callable[[str], None]
) -> list[Row]:
    rows_path(folder, 0).parent.mkdir(parents=True, exist_ok=True)
    for old in rows_path(folder, 0).parent.glob("rank*.jsonl"):
        old.unlink()
    show("making weights and data")
    model = parity_experiment(ranks, "fp32").model
    write_weights(folder.path / "weights", model, _SEED)
    write_corpus(folder.path / "corpus", _SEED)
    logs = folder.path / "logs"
    launch(
        "internlm_lib.selftest.worker", folder, device.name, world_size=ranks, logs=logs,
        on_tick=_watch(folder, ranks, logs, show), device=device.name,
    )  # fmt: skip
    return worst_of_ranks([_rows(folder, rank) for rank in range(ranks)])


def _watch(
    folder: RunFolder, ranks: int, logs: Path, show: Callable[[str], None]
) -> Callable[[], None]:
    """Shows what rank 0 did last, and notices that no rank gets any further."""
    files = [rows_path(folder, rank) for rank in range(ranks)]
    size, since = 0, time.monotonic()

    def tick() -> None:
        nonlocal size, since
        now = sum(file.stat().st_size for file in files if file.exists())
        if now != size:
            size, since = now, time.monotonic()
            done = _rows(folder, 0)
            show(f"{len(done)} checks; {done[-1].group}: {done[-1].name}" if done else "starting")
        elif time.monotonic() - since > _HANG_SECONDS:
            raise RanksHangError(
                f"no check ended for {_HANG_SECONDS:g} s: the ranks hang and are stopped; the "
                f"stacks of their threads are in {logs}/rank*.log"
            )

    return tick


def _rows(folder: RunFolder, rank: int) -> list[Row]:
    """What a rank has done so far; a line in the making is left out."""
    path = rows_path(folder, rank)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [Row(**json.loads(line)) for line in text.split("\n")[:-1]]


def _result(
    device: Device, ranks: int, rows: list[Row], folder: RunFolder, seconds: float
) -> dict[str, Any]:
    return {
        "passed": all(row.passed for row in rows),
        "device": device.name,
        "device_name": device.description(),
        "ranks": ranks,
        "seconds": round(seconds, 1),
        "run": folder.name,
        "table": str(folder.tables / f"{RECORD}.csv"),
        "made_with": provenance.record(),
        "checks": [as_values(row) for row in rows],
    }


def _write_down(record: Record, result: dict[str, Any]) -> None:
    """Every figure and every measured number as a metric, the table as an artifact."""
    rows = result["checks"]
    record.tags({name: str(result[name]) for name in ("device", "device_name", "ranks", "passed")})
    figures = {_metric(row): row["figure"] for row in rows if row["figure"] is not None}
    measured = {
        _metric(row, name): value for row in rows for name, value in row["measured"].items()
    }
    record.metrics(figures | measured)
    record.table(RECORD, [_as_table_row(row) for row in rows])


def _as_table_row(row: dict[str, Any]) -> dict[str, Any]:
    measured = ", ".join(f"{name} {value:.4g}" for name, value in row["measured"].items())
    return {**row, "measured": measured}


def _metric(row: dict[str, Any], measured: str = "") -> str:
    """MLflow takes letters, digits and `_-. /`."""
    words = "_".join(filter(None, (row["name"], measured)))
    return f"selftest/{row['group']}/{re.sub(r'[^A-Za-z0-9]+', '_', words).strip('_')}"


def _described(asked: Selftest, device: Device, ranks: int) -> dict[str, Any]:
    """What `experiment.yaml` of a selftest says."""
    return {
        "tracking": {"uri": asked.tracking_uri, "experiment": asked.tracking_experiment},
        RECORD: {"device": device.name, "ranks": ranks},
    }
