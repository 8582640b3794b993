"""The learning rate is megatron-core's, step for step."""

from types import SimpleNamespace
from typing import Any

import pytest

from internlm_lib.experiment.schema import TrainingSection
from internlm_lib.training.schedule import learning_rate

STEPS = 40
BATCH = 6


def section(**keys: Any) -> TrainingSection:
    base = {"train_iters": STEPS, "global_batch_size": BATCH, "lr": 3e-3, "min_lr": 3e-4}
    return TrainingSection(**{**base, **keys})


def ours(training: TrainingSection) -> list[float]:
    return [learning_rate(training, step) for step in range(1, training.train_iters + 1)]


def megatrons(training: TrainingSection) -> list[float]:
    """The rate in force at each step when Megatron-LM drives the scheduler: it counts samples, and
    calls `step` after the optimizer's step."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    group: dict[str, float] = {}
    decay = training.decay_samples
    # As Megatron-LM's `get_optimizer_param_scheduler` multiplies them out.
    warmup = training.lr_warmup_fraction * decay
    if training.lr_warmup_iters:
        warmup = training.lr_warmup_iters * training.global_batch_size
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=training.lr_decay_style,
        start_wd=0.01,
        end_wd=0.01,
        wd_incr_steps=decay,
        wd_incr_style="constant",
    )
    rates = []
    for step in range(1, training.train_iters + 1):
        rates.append(group["lr"])
        scheduler.step(training.batch_size(step))
    return rates


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.05, 0.29, 0.33, 0.975])
@pytest.mark.parametrize("decay", [None, STEPS - 13, 3 * STEPS])
@pytest.mark.parametrize("min_lr", [0.0, 3e-4, 3e-3])
def test_every_step_has_megatrons_rate(
    style: str, warmup: float, decay: int | None, min_lr: float
) -> None:
    training = section(
        lr_decay_style=style, lr_warmup_fraction=warmup, lr_decay_iters=decay, min_lr=min_lr
    )
    assert ours(training) == pytest.approx(megatrons(training), rel=1e-12, abs=0)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [1, 7, STEPS - 14])
@pytest.mark.parametrize("decay", [None, STEPS - 13, 3 * STEPS])
def test_a_warm_up_in_steps_is_megatrons(style: str, warmup: int, decay: int | None) -> None:
    training = section(lr_decay_style=style, lr_warmup_iters=warmup, lr_decay_iters=decay)
    assert ours(training) == pytest.approx(megatrons(training), rel=1e-12, abs=0)
    assert max(ours(training)) == ours(training)[warmup] == pytest.approx(3e-3)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [{}, {"lr_warmup_iters": 3}, {"lr_warmup_fraction": 0.3}])
@pytest.mark.parametrize("decay", [None, STEPS - 13])
def test_a_batch_ramp_moves_the_schedule_by_samples_as_megatron(
    style: str, warmup: dict[str, Any], decay: int | None
) -> None:
    training = section(
        lr_decay_style=style, lr_decay_iters=decay, rampup_batch_size=[1, 1, 50], **warmup
    )
    assert ours(training) == pytest.approx(megatrons(training), rel=1e-12, abs=0)


def test_a_decay_over_a_ramp_ends_with_the_training() -> None:
    """As Megatron's lr_decay_samples, which are train_samples where they are not given."""
    training = section(lr_decay_style="linear", rampup_batch_size=[2, 2, 60], min_lr=0.0)
    assert training.decay_samples == training.train_samples < STEPS * BATCH
    assert ours(training)[-1] == pytest.approx(3e-3 * BATCH / training.train_samples)


def test_a_skipped_step_does_not_move_the_schedule() -> None:
    training = section(lr_warmup_iters=10)
    assert learning_rate(training, 6, skipped_samples=2 * BATCH) == learning_rate(training, 4)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_a_decay_starts_at_lr_and_falls_towards_min_lr(style: str) -> None:
    rates = ours(section(lr_decay_style=style))
    assert rates[0] == 3e-3
    assert all(later < earlier for earlier, later in zip(rates, rates[1:], strict=False))
    assert rates[-1] > 3e-4  # step k is taken with k - 1 steps done


def test_a_warm_up_starts_at_zero_and_reaches_lr_when_its_steps_are_done() -> None:
    rates = ours(section(lr_warmup_fraction=0.25))
    assert rates[0] == 0
    assert rates[1] == pytest.approx(3e-4)
    assert rates[10] == max(rates) == 3e-3


def test_the_rate_stays_at_min_lr_after_the_decay() -> None:
    rates = ours(section(lr_decay_iters=20))
    assert rates[19] > 3e-4
    assert rates[20:] == [3e-4] * 20


def test_a_constant_rate_does_not_end_with_the_decay() -> None:
    assert ours(section(lr_decay_style="constant", lr_decay_iters=20)) == [3e-3] * STEPS


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
def test_a_warm_up_over_the_whole_training_never_decays(style: str) -> None:
    """Megatron-LM refuses it; here it is what it says."""
    rates = ours(section(lr_decay_style=style, lr_warmup_fraction=1.0))
    assert rates == pytest.approx([3e-3 * done / STEPS for done in range(STEPS)])


def test_the_number_of_warm_up_steps_is_not_rounded() -> None:
    rates = ours(section(lr_warmup_fraction=2.5 / STEPS))
    assert rates[2] == pytest.approx(3e-3 * 2 / 2.5)
