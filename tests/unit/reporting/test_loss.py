"""Statistics by hand, and verdicts on simulated pairs whose truth is known."""

import math

import numpy as np
import pytest

from internlm_lib.errors import InputError, NotComparableError
from internlm_lib.reporting.loss import compare_losses, noise_floor
from internlm_lib.reporting.training import LoggedTraining, read_training

STEPS = 1000
REPEATS = 200


@pytest.fixture
def pair(folder, write_training):
    """Reads a reference with the first losses and a candidate with the second."""

    def read(reference, candidate, **start):
        ours = write_training(folder, "reference", reference)
        theirs = write_training(folder, "candidate", candidate, **start)
        return read_training(ours.journal, "reference"), read_training(theirs.journal, "candidate")

    return read


def logged(losses, **start) -> LoggedTraining:
    losses = np.asarray(losses, dtype=float)
    steps = np.arange(1, len(losses) + 1)
    facts = {"layout": "TP1", "device": "cpu", **start}
    return LoggedTraining("t", facts, steps, {"loss": losses}, np.zeros(len(losses), bool))


def simulated(seed: int, *, other_order: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Two losses of one experiment [STEPS]: 2 % noise of the batches, which both share unless the
    order differs, and 0.4 % of each device, wandering with ρ = 0.8."""
    random = np.random.default_rng(seed)
    curve = 2.5 + 7 * np.exp(-np.arange(STEPS) / 150)
    batches = random.normal(0, 0.02, (2, STEPS))
    losses = []
    for device in range(2):
        draws = random.normal(0, 0.004 * math.sqrt(1 - 0.8**2), STEPS)
        wander = np.empty(STEPS)
        value = random.normal(0, 0.004)
        for step, draw in enumerate(draws):
            wander[step] = value = 0.8 * value + draw
        losses.append(curve * (1 + batches[device if other_order else 0] + wander))
    return losses[0], losses[1]


def verdicts(change, **settings) -> list:
    """Comparisons of `REPEATS` simulated pairs, the candidate changed by a factor per step."""
    found = []
    for seed in range(REPEATS):
        reference, candidate = simulated(seed)
        candidate = candidate * change(np.arange(STEPS) / STEPS)
        found.append(compare_losses(logged(reference), logged(candidate), 0.02, **settings))
    return found


def share(found, words: str) -> float:
    return float(np.mean([any(words in reason for reason in c.reasons) for c in found]))


def counted(found) -> dict[str, float]:
    names = [comparison.verdict for comparison in found]
    return {name: names.count(name) / len(names) for name in set(names)}


def test_statistics_are_those_computed_by_hand(pair):
    comparison = compare_losses(*pair([4.0, 2.0, 1.0, 1.0], [4.4, 1.9, 1.0, 1.0]), tolerance=0.06)
    statistics = comparison.statistics()
    expected = {
        "steps": 4,
        "mean_relative_error": 0.0375,  # (0.1 + 0.05 + 0 + 0) / 4
        "max_relative_error": 0.1,
        "max_relative_error_step": 1,
        "max_absolute_error": 0.4,
        "max_absolute_error_step": 1,
        "signed_mean": 0.0125,
        "steps_outside": 1,
    }
    assert {name: statistics[name] for name in expected} == pytest.approx(expected)


def test_no_effect_passes_and_a_bias_is_claimed_as_rarely_as_said():
    found = verdicts(lambda t: 1.0)
    assert counted(found).get("pass", 0) >= 0.93
    assert share(found, "that is no chance") <= 0.07


@pytest.mark.parametrize(("bias", "seen"), [(0.001, 0.35), (0.005, 1.0), (0.015, 1.0)])
def test_a_bias_within_the_tolerance_passes_and_is_named(bias, seen):
    found = verdicts(lambda t: 1 + bias)
    assert counted(found).get("pass", 0) >= 0.93
    assert share(found, "lies above the reference") >= seen


@pytest.mark.parametrize(("bias", "tolerance"), [(0.001, 0.0005), (0.005, 0.0025), (0.015, 0.0075)])
def test_a_bias_beyond_the_tolerance_never_passes(bias, tolerance):
    for seed in range(20):
        reference, candidate = simulated(seed)
        comparison = compare_losses(logged(reference), logged(candidate * (1 + bias)), tolerance)
        assert comparison.verdict in ("fail", "not-comparable")


def test_a_bias_is_a_failure_although_the_mean_error_is_small():
    reference = np.full(200, 2.0)
    comparison = compare_losses(logged(reference), logged(reference * 0.97), 0.02)
    assert comparison.verdict == "fail"
    assert "the bias is outside the tolerance: -0.03" in "; ".join(comparison.reasons)


def test_a_late_drift_fails_although_the_mean_passes():
    found = verdicts(lambda t: 1 + 0.06 * np.clip((t - 0.8) / 0.2, 0, 1))
    assert all(c.loss.relative.mean() < 0.02 for c in found)
    assert counted(found) == {"fail": 1.0}
    assert np.median([c.band_left_step for c in found]) == pytest.approx(867, abs=20)


def test_a_drift_that_has_not_left_the_tolerance_yet_is_no_pass():
    found = verdicts(lambda t: 1 + 0.018 * np.clip((t - 0.8) / 0.2, 0, 1))
    assert counted(found)["inconclusive"] >= 0.5
    assert share(found, "train longer") >= 0.5


def test_a_drift_that_has_just_left_the_tolerance_hardly_ever_passes():
    found = verdicts(lambda t: 1 + 0.03 * np.clip((t - 0.8) / 0.2, 0, 1))
    assert all(c.loss.relative.mean() < 0.02 for c in found)
    assert counted(found).get("pass", 0) <= 0.07


def test_spikes_that_come_back_pass_and_are_named():
    def spikes(t):
        return np.where(np.isin(np.arange(STEPS), (300, 600, 601)), 1.5, 1.0)

    found = verdicts(spikes)
    assert counted(found).get("pass", 0) >= 0.93
    assert share(found, "leave the tolerance and come back; the largest error is 0.5") >= 0.93
    assert {c.statistics()["max_relative_error_step"] for c in found} <= {301, 601, 602}


def test_another_order_of_the_data_is_not_called_a_failure():
    for seed in range(20):
        comparison = compare_losses(*map(logged, simulated(seed, other_order=True)), 0.02)
        assert comparison.loss.relative.mean() > 0.02
        assert comparison.verdict == "not-comparable"
        assert "the order of the data differs" in comparison.reasons[0]


def test_the_noise_floor_is_the_error_between_repeats():
    repeats = [logged([2.0, 2.0]), logged([2.2, 1.8]), logged([2.0, 2.0])]
    assert noise_floor(repeats) == pytest.approx((0.1 + 0.0 + (0.2 / 2.2 + 0.2 / 1.8) / 2) / 3)
    comparison = compare_losses(logged([2.0] * 4), logged([2.1] * 4), 0.1, repeats=repeats)
    assert comparison.noise_ratio == pytest.approx(0.05 / comparison.noise_floor)
    assert noise_floor(repeats[:1]) is None


def test_few_steps_are_inconclusive():
    comparison = compare_losses(logged([2.0] * 3), logged([2.0] * 3), 0.02)
    assert comparison.verdict == "inconclusive"
    assert "too few steps for an interval of the bias: 3" in comparison.reasons[0]


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0, None])
def test_a_loss_without_a_relative_error_fails_and_is_named(pair, loss):
    trainings = pair([2.0] * 6, [2.0, loss, 2.0, 2.0, 2.0, 2.0])
    comparison = compare_losses(*trainings, tolerance=1e9)
    assert comparison.verdict == "fail"
    assert "the candidate's loss is" in comparison.broken
    assert "at step 2 (1 of 6 steps" in comparison.broken


def test_equal_nan_on_both_sides_is_no_agreement(pair):
    comparison = compare_losses(*pair([1.0, math.nan], [1.0, math.nan]), tolerance=1e9)
    assert comparison.verdict == "fail"
    assert compare_losses(*pair([math.nan], [math.nan]), tolerance=1.0).statistics()["steps"] == 0


def test_a_step_skipped_for_an_overflow_may_lack_its_loss():
    ours, theirs = logged([2.0] * 6), logged([math.nan] + [2.0] * 5)
    theirs.columns["skipped"] = np.array([1.0, 0, 0, 0, 0, 0])
    assert compare_losses(ours, theirs, 0.02).verdict == "pass"


@pytest.mark.parametrize("tag", ["data_sha256", "weights_sha256", "config_sha256"])
def test_another_experiment_is_not_comparable_unless_forced(tag):
    ours, theirs = (logged([2.0] * 8, tags={tag: value}) for value in ("a" * 64, "b" * 64))
    comparison = compare_losses(ours, theirs, 0.02)
    assert comparison.verdict == "not-comparable"
    assert f"{tag} is aaaaaaaaaaaa in the reference, bbbbbbbbbbbb" in comparison.reasons[0]
    forced = compare_losses(ours, theirs, 0.02, force=True)
    assert forced.verdict == "pass"
    assert any(tag in reason for reason in forced.reasons)


def test_a_hash_that_only_one_side_recorded_is_taken_on_trust():
    comparison = compare_losses(
        logged([2.0] * 8, tags={"data_sha256": "d"}), logged([2.0] * 8), 0.02
    )
    assert comparison.verdict == "pass"
    assert any("on trust" in r and "data_sha256" in r for r in comparison.reasons)


def test_steps_without_a_partner_are_left_out_and_named():
    comparison = compare_losses(logged([2.0] * 10), logged([2.0] * 6), 0.02)
    assert comparison.statistics()["steps"] == 6
    assert any("4 of the reference's 10 steps" in reason for reason in comparison.reasons)
    other = logged([2.0] * 5)
    late = LoggedTraining("t", other.start, other.steps + 10, other.columns, other.spoiled)
    with pytest.raises(NotComparableError, match="steps 1 to 5 in the reference, steps 11 to 15"):
        compare_losses(other, late, 0.02)


def test_batches_of_another_size_are_paired_by_tokens():
    ours = logged(np.linspace(4.0, 2.0, 41), tokens_per_step=100)  # 4.0 at 100 tokens, 2.0 at 4100
    theirs = logged(4.0 - 2.0 * (250 * np.arange(1, 18) - 100) / 4000, tokens_per_step=250)
    comparison = compare_losses(ours, theirs, 0.02)
    assert comparison.pairing.by == "consumed tokens"
    assert comparison.statistics()["steps"] == 16  # the 17th is at 4250 tokens
    assert any("1 of the candidate's 17 steps" in reason for reason in comparison.reasons)
    assert comparison.loss.relative.max() < 1e-12


def test_a_training_started_again_counts_its_last_attempt(folder, write_training):
    files = write_training(folder, "candidate", [3.0, 2.0, 9.0, 9.0])
    from internlm_lib.journal import Journal

    journal = Journal(files.journal)
    journal.write("start", layout="TP1", device="cpu", first_step=3)
    journal.write("step", step=3, loss=1.5)
    training = read_training(files.journal, "candidate")
    assert training.steps.tolist() == [1, 2, 3]
    assert training.losses.tolist() == [3.0, 2.0, 1.5]
    assert math.isnan(training.column("grad_norm")[2]) and training.start["layout"] == "TP1"


def test_a_training_without_steps_says_what_to_do(folder, write_training):
    training = write_training(folder, "candidate", [])
    with pytest.raises(InputError, match=r"candidate training recorded no step; run .*03_train"):
        read_training(training.journal, "candidate")
