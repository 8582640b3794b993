"""What both engines must do alike beside plain steps: ramp-up, precisions, skipping, decay.

One job of two data parallel ranks does all of it (`optimizer_worker.py`).
"""

import math
from typing import Any

import pytest

from internlm_lib.experiment.load import load_experiment
from internlm_lib.files import read_json
from internlm_lib.ranks.launch import launch
from internlm_lib.run_folder import RunFolder
from internlm_lib.training.schedule import learning_rate
from tests.parity.make_run import make_run
from tests.parity.optimizer_worker import CASES, ENGINES

LOSS_TOLERANCE = 1e-6
NORM_TOLERANCE = 1e-5
OTHERS = [name for name in ENGINES if name != "megatron"]
SETTINGS = {"training.lr": 1e-2, "optimizer.clip_grad": 0.5}

Found = dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("optimizer"), ENGINES["megatron"], **SETTINGS)


@pytest.fixture(scope="module")
def found(run: RunFolder) -> Found:
    result = run.path / "found.json"
    launch("tests.parity.optimizer_worker", run, str(result), world_size=2, logs=run.path / "logs")
    return dict(read_json(result))


def column(steps: list[dict[str, Any]], name: str) -> list[Any]:
    return [step[name] for step in steps]


def test_a_batch_ramp_takes_megatrons_steps(found: Found) -> None:
    steps = found["ramp"]["megatron"]
    assert column(steps, "global_batch_size") == [4, 4, 4, 8, 8, 12]
    assert column(steps, "tokens") == [32 * size for size in (4, 4, 4, 8, 8, 12)]
    assert all(norm > 0.5 for norm in column(steps, "grad_norm"))  # measured without clipping
    assert "skipped" not in steps[0]


@pytest.mark.parametrize("case", ["ramp", "bf16"])
@pytest.mark.parametrize("engine", OTHERS)
def test_engines_agree(case: str, engine: str, found: Found) -> None:
    """In bf16 too: both round the same model alike, and sum its gradients in fp32."""
    reference, steps = found[case]["megatron"], found[case][engine]
    assert len(steps) == CASES[case]["training.train_iters"]
    for name, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", NORM_TOLERANCE)):
        assert column(steps, name) == pytest.approx(column(reference, name), rel=tolerance), name


@pytest.mark.parametrize("engine", OTHERS)
def test_fp16_scales_and_skips_alike_in_every_engine(engine: str, found: Found) -> None:
    reference, steps = found["fp16"]["megatron"], found["fp16"][engine]
    for name in ("loss_scale", "skipped", "lr"):
        assert column(steps, name) == column(reference, name), name
    # A gradient rounds by its scale, which rounding of weights turns into other losses.
    assert column(steps, "loss") == pytest.approx(column(reference, "loss"), rel=1e-5)
    assert column(steps, "grad_norm") == pytest.approx(column(reference, "grad_norm"), rel=1e-4)


def test_fp16_records_what_it_skipped_and_the_schedule_waits(found: Found, run: RunFolder) -> None:
    steps = found["fp16"]["megatron"]
    skipped = column(steps, "skipped")
    # Two overflows halve the scale (hysteresis 2), two sound steps double it (loss_scale_window 2).
    assert skipped == [True, True, False, False, True, True, False, False]
    high, low = 2.0**21, 2.0**20
    assert column(steps, "loss_scale") == [high, high, low, low, high, high, low, low]
    assert [math.isinf(norm) for norm in column(steps, "grad_norm")] == skipped
    training = load_experiment(run.experiment, CASES["fp16"])[1].training
    applied = [skipped[:n].count(False) for n in range(len(skipped))]
    assert column(steps, "lr") == [learning_rate(training, 1 + n) for n in applied]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_that_is_not_finite_is_never_applied(engine: str, found: Found) -> None:
    case, reference = found["broken"][engine], found["broken"]["megatron"]
    sound, broken, after = case["results"]
    assert case["unchanged"]
    assert [result["skipped"] for result in case["results"]] == [False, True, False]
    assert math.isnan(broken["loss"]) and not math.isfinite(broken["grad_norm"])
    for result, expected in ((sound, 0), (after, 2)):
        norm = reference["results"][expected]["grad_norm"]
        assert result["grad_norm"] == pytest.approx(norm, rel=NORM_TOLERANCE)


@pytest.mark.parametrize("engine", ENGINES)
def test_matrices_are_decayed_and_norms_only_as_the_predecessor(engine: str, found: Found) -> None:
    """A step without a gradient changes what is decayed, and nothing else."""
    ours, predecessors = (set(found[f"decay {flag}"][engine]) for flag in (False, True))
    matrices = ("embedding", "output_layer", "linear_")
    assert len(ours) == 2 + 2 * 4
    assert all(name.endswith(".weight") and any(m in name for m in matrices) for name in ours)
    assert ours < predecessors
    added = predecessors - ours
    assert len(added) == 2 * 2 + 1 and all(name.endswith("norm.weight") for name in added)
