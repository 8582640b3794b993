"""Rows that train unequally many tokens: loss and gradient are means over the step's tokens,
however its rows are spread over micro-batches and ranks."""

from typing import Any

import numpy
import pytest

from internlm_lib.experiment.schema import Layout
from internlm_lib.files import read_json
from internlm_lib.ranks.launch import launch
from internlm_lib.run_folder import RunFolder
from tests.parity.instruction_worker import CASES, REFERENCE, STEPS
from tests.parity.make_run import make_run
from tests.unit.data.corpora import write_rows

LOSS_TOLERANCE = 1e-6
NORM_TOLERANCE = 1e-5
OTHERS = [name for name in CASES if name != REFERENCE]
SETTINGS = {"model.num_layers": 4, "optimizer.clip_grad": 0.0}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = make_run(tmp_path_factory.mktemp("instruction"), Layout(), **SETTINGS)
    _write_rows(run)
    together: dict[str, Any] = {}
    for size in (1, 2):
        result, logs = run.path / f"{size}.json", run.path / "logs" / str(size)
        launch("tests.parity.instruction_worker", run, str(result), world_size=size, logs=logs)
        together |= read_json(result)
    return together


def _write_rows(run: RunFolder) -> None:
    """Every fourth row trains nothing, the others between one token and more than a sample has."""
    random = numpy.random.default_rng(4)
    rows = []
    for number in range(60):
        length = int(random.integers(4, 45))
        ids = random.integers(3, 500, length).tolist()
        prompt = length if number % 4 == 0 else int(random.integers(1, length))
        rows.append((ids, [-100] * prompt + ids[prompt:]))
    write_rows(run.corpus_prefix, rows)


def test_rows_of_a_step_train_unequally_many_tokens(found: dict[str, Any]) -> None:
    trained = found["counted token by token"]["trained"]
    assert min(trained) == 0 and max(trained) > 15 and len(set(trained)) > 4


def test_the_first_step_is_that_of_transformers(found: dict[str, Any]) -> None:
    expected, ours = found["counted token by token"], found[REFERENCE]
    assert ours["losses"][0] == pytest.approx(expected["loss"], rel=LOSS_TOLERANCE)
    assert ours["norms"][0] == pytest.approx(expected["norm"], rel=NORM_TOLERANCE)
    assert ours["validation"] == pytest.approx(expected["loss"], rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("name", OTHERS)
def test_however_rows_are_spread_the_steps_are_the_same(name: str, found: dict[str, Any]) -> None:
    ours, expected = found[name], found[REFERENCE]
    assert len(ours["losses"]) == STEPS
    assert ours["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    assert ours["norms"] == pytest.approx(expected["norms"], rel=NORM_TOLERANCE)
    assert ours["validation"] == pytest.approx(expected["validation"], rel=LOSS_TOLERANCE)
