"""What goes wrong in a training costs the steps since the last checkpoint, and nothing else."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import Layout
from internlm_lib.files import write_json
from internlm_lib.journal import events, read_journal, training_steps
from internlm_lib.run_folder import RunFolder, saved_states, state_name
from internlm_lib.training.nodes import Nodes, plan_training
from internlm_lib.training.supervise import train_role
from tests.conftest import heed_interrupts
from tests.parity.make_run import make_run

STEPS = 12
SECONDS = 240.0
FAULTS = {
    # Of each attempt: what happens at which step, to which rank (null: to all).
    "1": {"full disk": [3, 1], "kill": [6, 1]},
    "2": {"hang": [9, 1]},
    "3": {"nan": [11, None]},
}
SETTINGS = {
    "training.train_iters": STEPS,
    "training.global_batch_size": 4,
    "training.save_interval": 2,
    "training.keep_checkpoints": 3,
    "training.async_save": False,  # else it depends on the disk which step was saved last
    "training.max_restarts": 3,
    "training.hang_timeout_seconds": 20,
    "training.bad_step_policy": "rollback",
}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[dict[str, Any]]]:
    """A training of four attempts, and its journal."""
    folder = make_run(tmp_path_factory.mktemp("faults"), Layout(data_parallel_size=2), **SETTINGS)
    write_json(folder.path / "faults.json", FAULTS)
    _, experiment = load_experiment(folder.experiment)
    plan = plan_training(folder, experiment, "candidate", Nodes())
    plan = dataclasses.replace(plan, module="tests.faults.training_worker")
    logs: dict[int, list[str]] = {}

    def keep_logs(text: str) -> None:
        if "starting again" in text:
            own = folder.training("candidate").logs
            logs[len(logs) + 1] = [(own / f"rank{rank}.log").read_text() for rank in (0, 1)]

    train_role(plan, experiment, "candidate", keep_logs)
    journal = [event for event, _ in read_journal(folder.training("candidate").journal)]
    return folder, [*journal, {"event": "logs", "logs": logs}]


def of_kind(story: tuple[RunFolder, list[dict[str, Any]]], kind: str) -> list[dict[str, Any]]:
    return [event for event in story[1] if event["event"] == kind]


def attempts(events: list[dict[str, Any]]) -> list[dict[int, float]]:
    """Step → loss, of each attempt."""
    found: list[dict[int, float]] = []
    for event in events:
        if event["event"] == "start":
            found.append({})
        elif event["event"] == "step":
            found[-1][event["step"]] = event["loss"]
    return found


def test_every_attempt_goes_on_after_the_last_step_saved(story: Any) -> None:
    starts = of_kind(story, "start")
    assert [start["resumed_from"] for start in starts] == [
        None, "step-0000002", "step-0000008", "step-0000010"
    ]  # fmt: skip
    assert [start["first_step"] for start in starts] == [1, 3, 9, 11]
    assert [start["steps_repeated"] for start in starts] == [0, 3, 0, 0]
    steps = training_steps(story[0].training("candidate").journal)
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert of_kind(story, "end")[-1]["status"] == "done"


def test_a_step_that_is_repeated_has_the_same_loss_bit_for_bit(story: Any) -> None:
    first, second, *_ = attempts(story[1])
    assert sorted(first) == [1, 2, 3, 4, 5]
    assert [first[step] for step in (3, 4, 5)] == [second[step] for step in (3, 4, 5)]


def test_a_killed_rank_ends_the_others_within_seconds_and_is_named(story: Any) -> None:
    restart = of_kind(story, "restart")[0]
    assert "rank1 was killed by SIGKILL" in restart["error"]
    last = max(event["time"] for event in of_kind(story, "step") if event["time"] < restart["time"])
    assert restart["time"] - last < 28  # torchrun itself would kill them after 30 s


def test_every_attempt_s_devices_are_sampled_and_the_samples_say_whose_they_are(story: Any) -> None:
    journal = story[0].training("candidate").devices()
    starts = [start["time"] for start in of_kind(story, "start")]
    assert len(events(journal, "device_sampling")) == len(starts)
    samples = events(journal, "device_sample")
    assert [sample["sample"] for sample in samples] == list(range(1, len(samples) + 1))
    whose = [sample["start"] for sample in samples if sample["start"] is not None]
    assert list(dict.fromkeys(whose)) == starts
    assert any(sample["host"]["ranks_memory_mib"] for sample in samples)
    assert events(journal, "device_sample_failed") == []


def test_a_hang_is_noticed_with_the_stacks_of_all_ranks(story: Any) -> None:
    restart = of_kind(story, "restart")[1]
    assert restart["error"].startswith(
        "no step for 20 s (training.hang_timeout_seconds) after step 8"
    )
    (logs,) = of_kind(story, "logs")
    zero, one = logs["logs"][2]
    assert "Current thread" in zero and "_take_step" in zero
    assert "in _hang" in one


def test_a_loss_that_is_not_finite_goes_back_and_on_after_its_batch(story: Any) -> None:
    (bad,) = of_kind(story, "bad_step")
    assert (bad["step"], bad["policy"], bad["fault"]) == (11, "rollback", "the loss is nan")
    restart = of_kind(story, "restart")[2]
    assert "step 11: the loss is nan; going back to the last checkpoint" in restart["error"]
    assert bad["consumed_samples"] == 11 * SETTINGS["training.global_batch_size"]


def test_a_full_disk_costs_its_checkpoint_and_no_older_one(story: Any) -> None:
    (failed,) = of_kind(story, "checkpoint_failed")
    assert failed["step"] == 4 and "File too large" in failed["error"]
    written = [event["step"] for event in of_kind(story, "checkpoint")]
    assert written[0] == 2 and STEPS not in written
    left = [path.name for path in saved_states(story[0].training("candidate").checkpoints)]
    assert left == ["step-0000010", "step-0000008", "step-0000006"]
    assert not list(story[0].training("candidate").checkpoints.glob(".step*"))


# One after the other: asked to stop, and the newest checkpoint damaged before it goes on.


def command(folder: RunFolder) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "internlm_lib.cli", "train", str(folder.experiment)],
        env={**os.environ, "INTERNLM_HOME": str(folder.root)},
        cwd=folder.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed_interrupts,
    )


def wait_for(condition: Callable[[], Any], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_saves_and_the_same_command_goes_on_past_a_damaged_checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    zero = Layout(engine="deepspeed", zero_stage=2, data_parallel_size=2)
    many = {"training.train_iters": 400, "training.save_interval": 10}
    folder = make_run(tmp_path_factory.mktemp("stopped"), zero, **{**SETTINGS, **many})
    files = folder.training("candidate")
    first = command(folder)
    wait_for(lambda: len(training_steps(files.journal)) > 11, first)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=SECONDS)
    assert first.returncode == 5, said
    before = training_steps(files.journal)
    newest = saved_states(files.checkpoints)[0]
    assert newest.name == state_name(len(before))
    assert f"stopped as asked after step {len(before)}" in " ".join(said.split())

    state = newest / "rank-00001.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    second = command(folder)
    wait_for(lambda: len(training_steps(files.journal)) > len(before), second)
    second.send_signal(signal.SIGTERM)
    said, _ = second.communicate(timeout=SECONDS)
    assert second.returncode == 5, said
    events = [event for event, _ in read_journal(files.journal)]
    (broken,) = [event for event in events if event["event"] == "broken_checkpoint"]
    assert (broken["path"], broken["error"]) == (
        newest.name,
        f"{state.name} is not what was written",
    )
    resumed = [event for event in events if event["event"] == "start"][-1]
    # The newest checkpoint is of the last step, which may be one of those that are saved anyway.
    assert resumed["first_step"] == (len(before) - 1) // 10 * 10 + 1
    after = training_steps(files.journal)[: len(before)]
    assert [step["loss"] for step in after] == [step["loss"] for step in before]
