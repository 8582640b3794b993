"""The order of samples in a real job: one, whatever the number of ranks and the state of caches."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from internlm_lib.experiment.schema import Layout
from internlm_lib.files import read_json
from internlm_lib.ranks.launch import launch
from internlm_lib.run_folder import RunFolder
from tests.parity.make_run import make_run
from tests.parity.order_worker import STEPS
from tests.unit.data.corpora import write, write_rows

KINDS = ("pretrain", "instruction", "blend")
Found = dict[int, list[Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank of a job of one rank and of one of two has read."""
    run = make_run(tmp_path_factory.mktemp("order"), Layout())
    write_rows(run.corpus_prefix, [([n] * 20, [-100] * 9 + [n] * 11) for n in range(3, 60)])
    write(run.corpus_prefix.with_name("more"), [[n] * 50 for n in range(3, 60)])
    return {size: _launched(run, size) for size in (1, 2)}


def _launched(run: RunFolder, size: int) -> list[Any]:
    shutil.rmtree(run.data / "index", ignore_errors=True)
    result, logs = run.path / f"order-{size}", run.path / "logs" / str(size)
    launch("tests.parity.order_worker", run, str(result), world_size=size, logs=logs)
    return [read_json(Path(f"{result}.{rank}")) for rank in range(size)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["empty", "empty again", "cut off"])
def test_every_rank_reads_its_part_of_one_order(kind: str, cache: str, found: Found) -> None:
    (alone,) = (rank["empty"][kind] for rank in found[1])
    ranks = [rank[cache][kind] for rank in found[2]]
    assert {rank["sha256"] for rank in ranks} == {alone["sha256"]}
    for step in range(STEPS):
        parts = zip(*(rank["steps"][step] for rank in ranks), strict=True)
        together = [batch for part in parts for batch in part]
        assert together == alone["steps"][step]
