"""Attempts and repetitions: what lines mean by their order."""

from internlm_lib.files import write_text
from internlm_lib.journal import training_steps


def in_force(log, tmp_path):
    """The steps that a journal of these events keeps."""
    import json

    journal = tmp_path / "journal.jsonl"
    write_text(journal, "".join(json.dumps(event) + "\n" for event in log.events))
    return {step["step"]: step["loss"] for step in training_steps(journal)}


def test_a_restart_that_prints_its_arguments_replaces_steps(read, shape, tmp_path):
    log = read(
        shape.dump() + "".join(shape.ascendspeed(n, loss=5.0) for n in (1, 2, 3, 4))
        + "Traceback (most recent call last):\n"
        + shape.dump(world_size="32") + "".join(shape.ascendspeed(n, loss=4.0) for n in (3, 4, 5))
    )  # fmt: skip
    assert [start["first_step"] for start in log.start] == [1, 3]
    assert [start["world_size"] for start in log.start] == [16, 32]
    assert in_force(log, tmp_path) == {1: 5.0, 2: 5.0, 3: 4.0, 4: 4.0, 5: 4.0}
    assert log.summary["restarts"] == 1 and log.summary["duplicates"] == 0


def test_a_restart_of_which_only_metrics_are_left(read, shape, tmp_path):
    log = read("".join(shape.ascendspeed(n, loss=5.0) for n in (1, 2, 3))
               + "".join(shape.ascendspeed(n, loss=4.0) for n in (2, 3)))  # fmt: skip
    assert [start["first_step"] for start in log.start] == [1, 2]
    assert in_force(log, tmp_path) == {1: 5.0, 2: 4.0, 3: 4.0}


def test_a_restart_far_back_with_the_same_numbers(read, shape):
    log = read("".join(shape.ascendspeed(n) for n in (*range(1, 101), *range(1, 3))))
    assert [start["first_step"] for start in log.start] == [1, 1]


def test_a_restart_that_repeats_nothing_begins_a_new_attempt(read, shape):
    marker = "[before the start of training step] datetime: 2024-05-01 10:00:00 \n"
    log = read(marker + shape.ascendspeed(1) + marker + shape.ascendspeed(2))
    assert [start["first_step"] for start in log.start] == [1, 2]
    assert [start["time"] for start in log.start] == [1714557600.0] * 2


def test_ranks_that_print_the_same_iteration_count_once(read, shape):
    lines = [
        f"[rank{rank}]:{shape.ascendspeed(n, loss=5.0 + rank)}"
        for n in (1, 2, 3)
        for rank in (0, 1)
    ]
    log = read("".join(lines))
    assert [step["loss"] for step in log.step] == [5.0, 5.0, 5.0]
    assert (log.summary["duplicates"], log.summary["restarts"]) == (3, 0)


def test_a_late_rank_is_no_restart(read, shape):
    order = [(0, 1), (0, 2), (1, 1), (0, 3), (1, 2), (1, 3)]
    labelled = [f"{rank}: {shape.ascendspeed(n, loss=5.0 + rank)}" for rank, n in order]
    same = [shape.ascendspeed(n, **{"samples per second": str(rank)}) for rank, n in order]
    for lines in (labelled, same):
        log = read("".join(lines))
        assert [step["step"] for step in log.step] == [1, 2, 3]
        assert (log.summary["duplicates"], log.summary["restarts"]) == (3, 0)


def test_a_repeated_validation_counts_once(read, shape):
    held_out = " validation loss at iteration 1 | lm loss value: 9.5E+00 | lm loss PPL: 1E+04 | \n"
    log = read(shape.ascendspeed(1) + 2 * held_out)
    assert len(log.validation) == 1 and log.summary["duplicates"] == 1


def test_events_before_the_first_step_come_after_the_start(read, shape):
    held_out = " validation loss at iteration 0 | lm loss value: 9.5E+00 | lm loss PPL: 1E+04 | \n"
    log = read(held_out + shape.ascendspeed(1))
    assert [event["event"] for event in log.events] == [
        "start", "validation", "step", "end", "import",
    ]  # fmt: skip


def test_the_end_of_an_earlier_attempt_stays_before_the_next(read, shape):
    end = "[exiting program after 2 minutes] datetime: 2024-05-01 10:00:00 \n"
    log = read(shape.dump() + shape.ascendspeed(1) + end + shape.dump() + shape.ascendspeed(2))
    assert [event["event"] for event in log.events] == [
        "start", "step", "end", "start", "step", "end", "import",
    ]  # fmt: skip
    assert [end["status"] for end in log.end] == ["stopped", "stopped"]
