"""Engines and layouts against each other: the same ten losses and gradient norms.

The learning rate is high enough that ten steps change the loss by more than a hundred tolerances.
"""

import shutil

import pytest

from internlm_lib.experiment.load import load_experiment, save_experiment
from internlm_lib.experiment.schema import Layout
from internlm_lib.journal import events, training_steps
from internlm_lib.ranks.launch import launch
from internlm_lib.run_folder import RunFolder, TrainingFolder
from tests.parity.make_run import make_run

LOSS_TOLERANCE = 1e-6
NORM_TOLERANCE = 1e-5
"""Both relative; norms are sums over all elements, each rounded in another order."""

MEGATRON_DP2 = Layout(data_parallel_size=2)
OTHERS = {
    "ZeRO-1": Layout(engine="deepspeed", zero_stage=1, data_parallel_size=2),
    "ZeRO-2": Layout(engine="deepspeed", zero_stage=2, data_parallel_size=2),
    "ZeRO-3": Layout(engine="deepspeed", zero_stage=3, data_parallel_size=2),
    "ZeRO-2 TP2+SP": Layout(
        engine="deepspeed", zero_stage=2, tensor_model_parallel_size=2, sequence_parallel=True
    ),
    "megatron, plain optimizer": Layout(data_parallel_size=2, use_distributed_optimizer=False),
    "megatron TP2+SP": Layout(tensor_model_parallel_size=2, sequence_parallel=True),
    "megatron PP2": Layout(pipeline_model_parallel_size=2),
}
SETTINGS = {
    "training.lr": 1e-2,
    "training.lr_warmup_fraction": 0.2,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_grad": 0.5,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("engines"), Layout(), **SETTINGS)


def train(run: RunFolder, layout: Layout, **overrides: object) -> TrainingFolder:
    """The run's experiment trained in a layout; what an earlier layout left is removed."""
    name, experiment = load_experiment(
        run.experiment, {"parallel.candidate": layout.model_dump(), **overrides}
    )
    save_experiment(run.experiment, name, experiment)
    files = run.training("candidate")
    shutil.rmtree(files.path, ignore_errors=True)
    launch(
        "internlm_lib.training.worker",
        run,
        "candidate",
        world_size=layout.world_size,
        logs=files.logs,
    )
    return files


def curves(run: RunFolder, layout: Layout) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of ten steps in a layout."""
    steps = training_steps(train(run, layout).journal)
    return [step["loss"] for step in steps], [step["grad_norm"] for step in steps]


@pytest.fixture(scope="module")
def reference(run: RunFolder) -> tuple[list[float], list[float]]:
    losses, norms = curves(run, MEGATRON_DP2)
    assert len(losses) == 10
    # Clipping is at work, and so is learning: else agreement would prove little.
    assert max(norms) > SETTINGS["optimizer.clip_grad"]
    assert abs(losses[-1] / losses[0] - 1) > 100 * LOSS_TOLERANCE
    return losses, norms


@pytest.mark.parametrize("layout", OTHERS.values(), ids=OTHERS.keys())
def test_every_engine_trains_the_same_ten_steps(
    layout: Layout, run: RunFolder, reference: tuple[list[float], list[float]]
) -> None:
    losses, norms = curves(run, layout)
    assert losses == pytest.approx(reference[0], rel=LOSS_TOLERANCE)
    assert norms == pytest.approx(reference[1], rel=NORM_TOLERANCE)


def test_engines_agree_on_validation_and_test_and_save_on_the_way(run: RunFolder) -> None:
    """Last in this module: it changes the run's data split."""
    overrides = {
        "data.split": "8,1,1",
        "training.deterministic_mode": True,
        "training.eval_interval": 5,
        "training.eval_iters": 2,
        "training.save_interval": 4,
    }
    found = []
    for layout in (OTHERS["megatron PP2"], OTHERS["ZeRO-3"]):
        files = train(run, layout, **overrides)
        held_out = [*events(files.journal, "validation"), *events(files.journal, "test")]
        assert [event["step"] for event in held_out] == [5, 10, 10]
        found.append([event["loss"] for event in held_out])
        (start,) = events(files.journal, "start")
        assert (start["seed"], start["deterministic_mode"]) == (1234, True)
        assert start["environment"]["HCCL_DETERMINISTIC"] == "true"
        saved = [files.checkpoint_of(4), files.checkpoint_of(8), files.checkpoint]
        assert all((path / "metadata.json").is_file() for path in saved)
    assert len(set(found[0])) == 3
    assert found[0] == pytest.approx(found[1], rel=LOSS_TOLERANCE)
