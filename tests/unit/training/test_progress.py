"""What is shown of a training while its journal is written."""

from pathlib import Path

import pytest

from internlm_lib import journal as journals
from internlm_lib.journal import Journal
from internlm_lib.training import progress
from internlm_lib.training.progress import TrainingProgress, clock, step_text

START = {"time": 1000.0, "train_iters": 200, "first_step": 1, "world_size": 2}
STEP = {"time": 1100.0, "step": 50, "loss": 2.5, "tokens_per_second_per_device": 4935.2}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "training" / "journal.jsonl")


def write_start(journal: Journal, train_iters: int = 200) -> None:
    journal.write("start", train_iters=train_iters, first_step=1, world_size=2)


def write_step(journal: Journal, step: int, loss: float = 2.5) -> None:
    journal.write("step", step=step, loss=loss, tokens_per_second_per_device=5000.0)


def test_the_latest_step_is_shown(journal: Journal) -> None:
    shown = TrainingProgress(journal.path)
    assert shown.text() == ""
    write_start(journal)
    assert shown.text() == ""
    write_step(journal, 49)
    write_step(journal, 50)
    assert shown.text() == "step 50/200, loss 2.500, 10,000 tokens/s, 0:00 left"
    assert shown.text() == "step 50/200, loss 2.500, 10,000 tokens/s, 0:00 left"
    write_step(journal, 51, loss=2.4)
    assert shown.text().startswith("step 51/200, loss 2.400")


def test_an_earlier_trainings_steps_are_not_shown(journal: Journal) -> None:
    write_start(journal)
    write_step(journal, 200)
    shown = TrainingProgress(journal.path)
    assert shown.text() == ""
    write_start(journal, train_iters=30)
    write_step(journal, 3)
    assert shown.text().startswith("step 3/30")


def test_a_training_that_starts_again_shows_its_own_steps_only(journal: Journal) -> None:
    shown = TrainingProgress(journal.path)
    write_start(journal)
    write_step(journal, 50)
    assert shown.text().startswith("step 50/200")
    write_start(journal)
    assert shown.text() == ""


def test_steps_without_a_start_are_not_shown(journal: Journal) -> None:
    shown = TrainingProgress(journal.path)
    write_step(journal, 50)
    assert shown.text() == ""


def test_other_events_change_nothing(journal: Journal) -> None:
    shown = TrainingProgress(journal.path)
    write_start(journal)
    write_step(journal, 50)
    journal.write("validation", step=50, loss=9.0)
    assert shown.text().startswith("step 50/200, loss 2.500")


def test_a_torn_line_is_ignored_until_it_is_whole(journal: Journal) -> None:
    shown = TrainingProgress(journal.path)
    write_start(journal)
    write_step(journal, 50)
    whole = journal.path.read_bytes()
    write_step(journal, 51)
    line = journal.path.read_bytes()[len(whole) :]
    journal.path.write_bytes(whole + line[:-20])
    assert shown.text().startswith("step 50/200")
    journal.path.write_bytes(whole + line)
    assert shown.text().startswith("step 51/200")


def test_a_damaged_journal_shows_nothing(journal: Journal) -> None:
    shown = TrainingProgress(journal.path)
    write_start(journal)
    write_step(journal, 50)
    with journal.path.open("a") as file:
        file.write("not JSON\n")
    assert shown.text() == ""


def test_each_line_is_read_once(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(path: Path, offset: int = 0):
        for event, after in journals.read_journal(path, offset):
            read.append(f"{event['event']} {event.get('step', '')}".strip())
            yield event, after

    monkeypatch.setattr(progress, "read_journal", counted)
    write_step(journal, 200)
    shown = TrainingProgress(journal.path)
    write_start(journal)
    shown.text()
    write_step(journal, 1)
    shown.text()
    shown.text()
    write_step(journal, 2)
    shown.text()
    assert read == ["start", "step 1", "step 2"]


@pytest.mark.parametrize(
    ("start", "step", "text"),
    [
        ({}, {}, "step 50/200, loss 2.500, 9,870 tokens/s, 5:00 left"),
        ({}, {"step": 200}, "step 200/200, loss 2.500, 9,870 tokens/s, 0:00 left"),
        ({"first_step": 41}, {}, "step 50/200, loss 2.500, 9,870 tokens/s, 25:00 left"),
        ({"world_size": 8}, {}, "step 50/200, loss 2.500, 39,482 tokens/s, 5:00 left"),
        ({}, {"loss": float("nan")}, "step 50/200, loss nan, 9,870 tokens/s, 5:00 left"),
    ],
)
def test_a_step_in_words(start: dict, step: dict, text: str) -> None:
    assert step_text({**START, **start}, {**STEP, **step}) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"), (9.99, "0:09"), (83, "1:23"), (3599.5, "59:59"),
        (3600, "1:00:00"), (3723, "1:02:03"), (100 * 3600, "100:00:00"),
    ],
)  # fmt: skip
def test_a_clock_shows_hours_only_when_there_are_some(seconds: float, text: str) -> None:
    assert clock(seconds) == text
