"""Our model against transformers' LLaMA with the same weights: logits, loss and every gradient.

Tolerances are for fp32 on a CPU: sums in another order differ by some 1e-7 of the logits' scale.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from internlm_lib.experiment.schema import Layout
from internlm_lib.files import read_json
from internlm_lib.ranks.launch import launch
from internlm_lib.run_folder import RunFolder
from tests.parity.make_run import make_run

LOGIT_TOLERANCE = 1e-5
"""Largest absolute difference; a wrong layout gives 0.01 and more."""
GRADIENT_TOLERANCE = 1e-5
"""Largest difference of a gradient tensor, relative to that tensor's largest element."""
LOSS_TOLERANCE = 1e-6
"""Relative."""

LAYOUTS = {
    "TP1": Layout(),
    "TP2": Layout(tensor_model_parallel_size=2),
    "TP2+SP": Layout(tensor_model_parallel_size=2, sequence_parallel=True),
    "PP2": Layout(pipeline_model_parallel_size=2),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("parity"), LAYOUTS["TP1"])


@pytest.fixture(scope="module", params=LAYOUTS)
def differences(request: pytest.FixtureRequest, run: RunFolder) -> dict[str, Any]:
    layout: Layout = LAYOUTS[request.param]
    found: Path = run.path / "differences.json"
    shutil.rmtree(run.path / "logs", ignore_errors=True)
    launch(
        "tests.parity.model_worker",
        run,
        layout.model_dump_json(),
        str(found),
        world_size=layout.world_size,
        logs=run.path / "logs",
    )
    return dict(read_json(found))


def test_logits_and_loss_are_those_of_transformers(differences: dict[str, Any]) -> None:
    assert differences["logits"] <= LOGIT_TOLERANCE
    assert differences["loss"] <= LOSS_TOLERANCE
    # The logits are spread enough for the tolerance to mean something.
    assert differences["logit_std"] > 1000 * LOGIT_TOLERANCE


def test_every_gradient_is_that_of_transformers(differences: dict[str, Any]) -> None:
    gradients = differences["gradients"]
    assert len(gradients) == differences["tensors"]
    wrong = {name: value for name, value in gradients.items() if not value <= GRADIENT_TOLERANCE}
    assert wrong == {}
