"""Engines and layouts against one rank: the benchmark's trainings, fewer of them and shorter."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.parity import (
    LAYOUTS,
    LIMITS,
    RECIPE,
    REFERENCE,
    TRANSFORMERS,
    Curve,
    checkpoint_path,
    compare,
    make_run,
    train_layouts,
)
from internlm_lib.experiment.load import load_experiment, save_experiment
from internlm_lib.journal import events, training_steps
from internlm_lib.ranks.launch import launch
from internlm_lib.run_folder import RunFolder, state_name
from internlm_lib.weights.formats import open_checkpoint
from internlm_lib.weights.verify import verify

STEPS = 6
KINDS = (
    "TP2 SP",
    "PP2",
    "PP2 VPP2",
    "DP2",
    "DP2 overlap whole optimizer",
    "ZeRO-1 DP2",
    "ZeRO-2 DP2",
    "ZeRO-3 DP2",
    "TP2 PP2 VPP2 SP",
    "TP2 DP2 SP overlap",
    "PP2 VPP2 DP2 overlap",
    "ZeRO-2 TP2 DP2 SP",
    "ZeRO-3 TP2 DP2 SP",
)
"""Every kind of split, and together those that could be in each other's way."""
SAVED = (REFERENCE, "PP2 VPP2 DP2 overlap", "ZeRO-3 TP2 DP2 SP")
WEIGHT_TOLERANCE = 1e-6
"""Of the largest element of a tensor."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("engines"), STEPS)


@pytest.fixture(scope="module")
def curves(run: RunFolder) -> dict[str, Curve]:
    return train_layouts(run, {name: LAYOUTS[name] for name in (REFERENCE, *KINDS)}, save=SAVED)


def test_the_trainings_compared_learn_and_clip(curves: dict[str, Curve]) -> None:
    """Else that they agree would prove little."""
    losses, norms = curves[REFERENCE]["losses"], curves[REFERENCE]["grad_norms"]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.2
    assert min(norms) > RECIPE["optimizer.clip_grad"]


@pytest.mark.parametrize("name", [*KINDS, TRANSFORMERS])
def test_every_layout_trains_the_same_steps(name: str, curves: dict[str, Curve]) -> None:
    (row,) = compare({REFERENCE: curves[REFERENCE], name: curves[name]})
    assert row["within"] == dict.fromkeys(LIMITS, True), row


@pytest.mark.parametrize("name", SAVED[1:])
def test_every_layout_saves_the_same_weights(
    name: str, run: RunFolder, curves: dict[str, Curve]
) -> None:
    with (
        open_checkpoint(checkpoint_path(run, name)) as found,
        open_checkpoint(checkpoint_path(run, REFERENCE)) as expected,
        open_checkpoint(run.huggingface) as before,
    ):
        assert found.names() == expected.names() == before.names()
        for tensor in found.names():
            trained, scale = expected.read(tensor), expected.read(tensor).abs().max()
            if trained.dim() > 1:  # a bias of the keys alone hardly moves: it hardly matters
                moved = (trained - before.read(tensor)).abs().max()
                assert moved > 100 * WEIGHT_TOLERANCE * scale, tensor
            assert (found.read(tensor) - trained).abs().max() <= WEIGHT_TOLERANCE * scale, tensor


def test_a_training_validates_tests_and_saves_on_the_way(
    run: RunFolder, curves: dict[str, Any]
) -> None:
    """Last in this module: it changes the run's experiment. By way of 03_train's own worker."""
    overrides = {
        "parallel.candidate": LAYOUTS["PP2 VPP2"].model_dump(),
        "training.deterministic_mode": True,
        "training.eval_interval": STEPS // 2,
        "training.save_interval": 4,
    }
    name, experiment = load_experiment(run.experiment, overrides)
    save_experiment(run.experiment, name, experiment)
    files = run.training("candidate")
    launch("internlm_lib.training.worker", run, "candidate", world_size=2, logs=files.logs)
    expected = curves["PP2 VPP2"]
    steps = training_steps(files.journal)
    assert [step["loss"] for step in steps] == pytest.approx(expected["losses"], LIMITS["loss"])
    validation = [event["loss"] for event in events(files.journal, "validation")]
    assert len(validation) == 2
    assert validation[0] == pytest.approx(expected["validation_loss"], LIMITS["validation_loss"])
    assert [event["step"] for event in events(files.journal, "test")] == [STEPS]
    (start,) = events(files.journal, "start")
    assert (start["seed"], start["deterministic_mode"]) == (1234, True)
    assert int(start["environment"]["OMP_NUM_THREADS"]) >= 1
    saved = [files.checkpoints / state_name(4) / "state.json", files.checkpoint / "metadata.json"]
    assert all(path.is_file() for path in saved)
    _check_state(files.checkpoints / state_name(4), run)


def _check_state(state: Path, run: RunFolder) -> None:
    """A state to resume from is a checkpoint like others: recognised, read, verified."""
    with open_checkpoint(state) as weights, open_checkpoint(run.huggingface) as before:
        assert (weights.format_name, weights.layout, weights.dtype) == (
            "training",
            "TP1",
            "float32",
        )
        assert weights.names() == before.names()
        for name in weights.names():
            assert weights.read(name).shape == before.read(name).shape
    assert verify(state)["ok"]
    with (state / "rank-00000.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    report = verify(state)
    assert not report["ok"]
    assert "rank-00000.safetensors is not what was written" in report["problems"][0]
