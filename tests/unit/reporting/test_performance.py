import pytest

from internlm_lib.reporting.loss import read_training
from internlm_lib.reporting.performance import step_times, throughput, throughput_ratio


def test_warm_up_steps_do_not_count(folder, write_training):
    journal = write_training(folder, "candidate", [1.0] * 20, speed=80.0).journal
    row = throughput(read_training(journal, "candidate"), "candidate")
    assert row["steps"] == 18
    assert row["tokens_per_second_per_device"] == row["tokens_per_second_p5"] == 80.0
    assert row["step_seconds"] == pytest.approx(0.8)
    assert row["peak_memory_bytes"] == 1020
    assert row["model_tflops_per_device"] is None


def test_a_single_step_is_kept(folder, write_training):
    journal = write_training(folder, "candidate", [1.0]).journal
    row = throughput(read_training(journal, "candidate"), "candidate")
    assert (row["steps"], row["tokens_per_second_per_device"]) == (1, 1.0)


def test_times_of_a_step_are_medians_and_the_rest_is_named(folder, write_training):
    training = read_training(write_training(folder, "candidate", [1.0] * 3).journal, "candidate")
    for step, seconds in zip(training.steps, (0.2, 0.3, 0.1), strict=True):
        step |= {"step_seconds": 1.0, "forward_backward_seconds": seconds, "data_seconds": 0.1}
    row = step_times(training, "candidate")
    assert row["forward_backward_seconds"] == 0.2 and row["step_seconds"] == 1.0
    assert row["communication_seconds"] is row["optimizer_seconds"] is None
    assert row["other_seconds"] == pytest.approx(0.7)


def test_ratio_is_candidate_over_reference():
    slow, fast = ({"tokens_per_second_per_device": v} for v in (50.0, 75.0))
    assert throughput_ratio(slow, fast) == 1.5
    assert throughput_ratio({"tokens_per_second_per_device": None}, fast) is None
