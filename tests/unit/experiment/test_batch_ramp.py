"""Batch sizes of a ramp-up are megatron-core's, step for step."""

from collections.abc import Iterator

import pytest

from internlm_lib.experiment.schema import Layout, TrainingSection

RAMPS = [
    (12, (4, 4, 24)),
    (12, (4, 4, 25)),
    (12, (4, 4, 1)),
    (12, (4, 8, 100)),
    (16, (2, 2, 97)),
    (256, (16, 16, 3000)),
    (1536, (64, 32, 29297)),
]
"""(global_batch_size, rampup_batch_size)"""


def section(full: int, ramp: tuple[int, int, int] | None, steps: int) -> TrainingSection:
    return TrainingSection(global_batch_size=full, rampup_batch_size=ramp, train_iters=steps)


def megatrons(full: int, ramp: tuple[int, int, int], steps: int) -> Iterator[tuple[int, int]]:
    """Batch size and number of micro-batches (of 1 sample on 2 ranks) of each step."""
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    calculator = RampupBatchsizeNumMicroBatchesCalculator(full, 1, 2, False, 1, *ramp)
    consumed = 0
    for _ in range(steps):
        calculator.update(consumed, consistency_check=True)
        yield calculator.get_current_running_global_batch_size(), calculator.get()
        consumed += calculator.get_current_running_global_batch_size()


@pytest.mark.parametrize(("full", "ramp"), RAMPS)
def test_every_step_has_megatrons_batch(full: int, ramp: tuple[int, int, int]) -> None:
    steps = 120
    training, layout = section(full, ramp, steps), Layout(data_parallel_size=2)
    found = [
        (training.batch_size(step), training.num_micro_batches(layout, step))
        for step in range(1, steps + 1)
    ]
    assert found == list(megatrons(full, ramp, steps))
    assert (found[0][0], found[-1][0]) == (ramp[0], full)


@pytest.mark.parametrize(("full", "ramp"), RAMPS)
def test_samples_are_counted_on_from_step_to_step(full: int, ramp: tuple[int, int, int]) -> None:
    training = section(full, ramp, 120)
    sizes = [training.batch_size(step) for step in range(1, 121)]
    assert [training.samples_before(step) for step in range(1, 122)] == [
        sum(sizes[:done]) for done in range(121)
    ]
    assert training.train_samples == sum(sizes)


def test_a_training_that_ends_within_its_ramp_counts_as_a_longer_one_does() -> None:
    short, long = section(16, (2, 2, 400), 5), section(16, (2, 2, 400), 200)
    assert [short.batch_size(n) for n in range(1, 6)] == [long.batch_size(n) for n in range(1, 6)]
    assert short.train_samples == long.samples_before(6) < 5 * 16


def test_without_a_ramp_all_steps_are_full() -> None:
    training = section(16, None, 10)
    assert {training.batch_size(step) for step in range(1, 11)} == {16}
    assert (training.samples_before(4), training.train_samples) == (48, 160)
    assert training.num_micro_batches(Layout(data_parallel_size=2)) == 8
