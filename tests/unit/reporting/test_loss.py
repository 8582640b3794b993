import math

import pytest

from internlm_lib.errors import InputError, NotComparableError
from internlm_lib.reporting.loss import compare_losses, find_differences, read_training


@pytest.fixture
def pair(folder, write_training):
    """Reads a reference with the first losses and a candidate with the second."""

    def read(reference, candidate, **start):
        ours = write_training(folder, "reference", reference)
        theirs = write_training(folder, "candidate", candidate, **start)
        return read_training(ours.journal, "reference"), read_training(theirs.journal, "candidate")

    return read


def test_statistics_are_those_computed_by_hand(pair):
    comparison = compare_losses(*pair([4.0, 2.0, 1.0], [4.4, 1.9, 1.0]), tolerance=0.06)
    statistics = comparison.statistics()
    assert statistics == pytest.approx(
        {
            "mean_relative_error": 0.05,  # (0.1 + 0.05 + 0) / 3
            "max_relative_error": 0.1,
            "max_absolute_error": 0.4,
            "mean_signed_error": 0.05 / 3,
            "late_mean_relative_error": 0.0,
        }
    )
    assert comparison.verdict == "pass"


def test_the_verdict_turns_at_the_tolerance(pair):
    trainings = pair([2.0, 2.0], [2.5, 2.5])
    assert compare_losses(*trainings, tolerance=0.25).verdict == "pass"
    assert compare_losses(*trainings, tolerance=0.2499).verdict == "fail"


def test_a_late_drift_shows_although_the_mean_passes(pair):
    reference = [1.0] * 100
    comparison = compare_losses(*pair(reference, reference[:90] + [1.1] * 10), tolerance=0.02)
    assert comparison.verdict == "pass"
    assert comparison.statistics()["late_mean_relative_error"] == pytest.approx(0.1)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0, None])
def test_a_loss_without_a_relative_error_fails_and_is_named(pair, loss):
    comparison = compare_losses(*pair([2.0, 2.0, 2.0], [2.0, loss, 2.0]), tolerance=1e9)
    assert comparison.verdict == "fail"
    assert "the candidate's loss is" in comparison.broken
    assert "at step 2 (1 of 3 steps" in comparison.broken
    assert all(math.isnan(value) for value in comparison.statistics().values())


def test_equal_nan_on_both_sides_is_no_agreement(pair):
    comparison = compare_losses(*pair([1.0, math.nan], [1.0, math.nan]), tolerance=1e9)
    assert comparison.verdict == "fail"


def test_different_experiments_are_refused_with_all_that_differs(pair):
    trainings = pair(
        [1.0, 1.0], [1.0], tokens_per_step=32, tags={"data_sha256": "d2", "git_commit": "other"}
    )
    with pytest.raises(NotComparableError) as caught:
        compare_losses(*trainings, tolerance=0.1)
    text = str(caught.value)
    assert "tokens_per_step: reference 64, candidate 32" in text
    assert "train_iters: reference 2, candidate 1" in text
    assert "data_sha256: reference d1, candidate d2" in text
    assert "reference has 2 (1 to 2), candidate has 1 (1 to 1)" in text
    assert "git_commit" not in text


def test_a_hash_that_only_one_side_recorded_is_no_difference(pair):
    trainings = pair([1.0], [1.0], tags={"weights_sha256": "w"})
    assert find_differences(*trainings) == []


def test_a_training_without_steps_says_what_to_do(folder, write_training):
    training = write_training(folder, "candidate", [])
    with pytest.raises(InputError, match=r"candidate training recorded no step; run .*03_train"):
        read_training(training.journal, "candidate")
