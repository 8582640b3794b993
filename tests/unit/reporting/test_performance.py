import numpy as np
import pytest

from internlm_lib.errors import InputError
from internlm_lib.experiment.presets import PRESETS
from internlm_lib.reporting.performance import (
    conventions,
    measured,
    performance,
    speed_ratio,
    step_times,
)
from internlm_lib.reporting.training import LoggedTraining, read_training

SEVEN_B = {name: PRESETS["internlm-7b"][name] for name in PRESETS["internlm-7b"]}


def timed(seconds, **start) -> LoggedTraining:
    """A training whose steps took these seconds, of 8 devices and 32 samples of 2048 tokens."""
    seconds = np.asarray(seconds, dtype=float)
    facts = {
        "layout": "DP8", "device": "npu", "device_name": "Ascend 910B1", "precision": "bf16",
        "world_size": 8, "tokens_per_step": 32 * 2048, "seq_length": 2048, **start,
    }  # fmt: skip
    columns = {"loss": np.ones(len(seconds)), "step_seconds": seconds}
    steps = np.arange(1, len(seconds) + 1)
    return LoggedTraining("t", facts, steps, columns, np.zeros(len(seconds), bool))


def test_warm_up_steps_do_not_count(folder, write_training):
    journal = write_training(folder, "candidate", [1.0] * 20, speed=80.0).journal
    row = performance(read_training(journal, "candidate"), "candidate")
    assert (row["steps"], row["left_out_as_warm_up"]) == (18, 2)
    assert row["tokens_per_second_per_device"] == row["tokens_per_second_p5"] == 80.0
    assert row["step_seconds"] == pytest.approx(0.8)
    assert row["peak_memory_bytes"] == 1020
    assert row["tflops_per_device"] is None and row["mfu"] is None


def test_a_single_step_is_kept(folder, write_training):
    journal = write_training(folder, "candidate", [1.0]).journal
    row = performance(read_training(journal, "candidate"), "candidate")
    assert (row["steps"], row["tokens_per_second_per_device"]) == (1, 1.0)


def test_rates_have_the_units_their_names_say():
    row = performance(timed([2.0] * 10), "candidate")
    assert row["samples_per_second"] == 16.0
    assert row["samples_per_second_per_device"] == 2.0
    assert row["tokens_per_second_per_device"] == 2 * 2048
    assert row["step_seconds"] == 2.0


def test_steps_that_contain_evaluation_or_saving_are_left_out_and_counted():
    training = timed([1.0] * 10 + [9.0] * 5 + [1.0] * 5)
    training.spoiled[10:15] = True
    row = performance(training, "candidate")
    assert (row["step_seconds"], row["step_seconds_p95"], row["left_out_as_spoiled"]) == (1, 1, 5)
    assert measured(training).sum() == 13  # 20 less 2 of warm-up and 5


def test_flops_follow_the_convention_and_the_models_shape():
    training = timed([19.6846] * 10, tokens_per_step=256 * 2048, model=SEVEN_B)
    row = performance(training, "candidate")
    assert row["tokens_per_second_per_device"] == pytest.approx(3329.3, abs=0.1)
    found = {r["convention"]: r["tflops_per_device"] for r in conventions(training)}
    multiplied = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 103168 * 4096
    assert found["6N"] == pytest.approx(6 * multiplied * 3329.3e-12, rel=1e-4)
    attention = 3 * 4 * 32 * 4096 * 2048 * 3329.3e-12
    assert found["6N + full attention"] - found["6N"] == pytest.approx(attention, rel=1e-4)
    assert found["AscendSpeed"] == pytest.approx(145.75, abs=0.01)  # its README: 145.69
    assert row["tflops_per_device"] == found[row["flop_convention"]]
    assert performance(training, "candidate", "6N")["tflops_per_device"] == found["6N"]


def test_mfu_names_its_peak_and_more_than_all_of_it_is_an_error():
    training = timed([20.0] * 10, tokens_per_step=256 * 2048, model=SEVEN_B, device_name="A100")
    row = performance(training, "candidate")
    assert row["peak_tflops"] == 312 and row["peak_source"]
    assert row["mfu"] == pytest.approx(row["tflops_per_device"] / 312)
    hardware = performance(training, "candidate", "hardware, full recompute")
    assert "mfu" not in hardware and hardware["hfu"] > row["mfu"]
    with pytest.raises(InputError, match="MFU of .* on A100.* cannot be above 100 %"):
        performance(timed([2.0] * 10, **training.start), "candidate")


def test_a_name_that_several_devices_share_has_no_peak_and_says_which():
    row = performance(timed([2.0] * 10, model=SEVEN_B, device_name="Ascend 910B"), "candidate")
    assert row["mfu"] is None and row["peak_tflops"] is None
    assert "910B4" in row["peak_source"] and "910B1" in row["peak_source"]


def test_what_a_training_does_not_tell_is_none_and_no_error():
    training = timed([1.0] * 10, world_size=None, tokens_per_step=None, device_name=None)
    row = performance(training, "candidate")
    assert row["tokens_per_second_per_device"] is row["samples_per_second"] is row["mfu"] is None
    assert row["step_seconds"] == 1.0
    assert speed_ratio(training, training)["ratio"] is None
    assert conventions(training) == []


def test_the_ratio_is_candidate_over_reference_with_an_interval_that_holds_it():
    random = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        slow, fast = (timed(s * random.lognormal(0, 0.1, 400)) for s in (1.5, 1.0))
        found = speed_ratio(slow, fast)
        low, high = found["ratio_ci95"]
        held += low <= 1.5 <= high
        assert low < found["ratio"] < high
    assert 0.88 <= held / 200 <= 0.99
    few = speed_ratio(timed([2.0] * 3), timed([1.0] * 3))
    assert few == {"ratio": 2.0, "ratio_ci95": None, "ratio_of": "tokens/s/device"}


def test_without_the_number_of_devices_the_ratio_is_the_whole_jobs():
    slow, fast = timed([2.0] * 9, world_size=None), timed([1.0] * 9)
    found = speed_ratio(slow, fast)
    assert (found["ratio"], found["ratio_of"]) == (2.0, "tokens/s of the whole job")


def test_times_of_a_step_are_medians_and_the_rest_is_named():
    training = timed([1.0] * 3)
    columns = {"forward_backward_seconds": [0.2, 0.3, 0.1], "data_seconds": [0.1] * 3}
    training.columns.update({name: np.array(values) for name, values in columns.items()})
    row = step_times(training, "candidate")
    assert row["forward_backward_seconds"] == 0.2 and row["step_seconds"] == 1.0
    assert row["communication_seconds"] is row["optimizer_seconds"] is None
    assert row["other_seconds"] == pytest.approx(0.7)
