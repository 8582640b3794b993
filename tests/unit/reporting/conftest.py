"""Trainings written down without training anything."""

from collections.abc import Callable, Sequence

import pytest

from internlm_lib.journal import Journal
from internlm_lib.run_folder import RunFolder, TrainingFolder


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.of("r", tmp_path)


@pytest.fixture
def write_training() -> Callable[..., TrainingFolder]:
    """Writes a training's journal with the given losses; returns its folder."""

    def write(
        folder: RunFolder, role: str, losses: Sequence[float], *, speed: float = 100.0, **start
    ) -> TrainingFolder:
        training = folder.training(role)
        journal = Journal(training.journal)
        values = {
            "role": role, "engine": "megatron", "layout": "megatron TP1 PP1 DP2", "world_size": 2,
            "device": "cpu", "device_name": "a CPU", "precision": "fp32",
            "train_iters": len(losses), "first_step": 1, "tokens_per_step": 64, "parameters": 10,
            "tags": {"data_sha256": "d1", "git_commit": role},
        }  # fmt: skip
        journal.write("start", **values | start)
        for step, loss in enumerate(losses, start=1):
            journal.write(
                "step", step=step, loss=loss, grad_norm=1.0, lr=1e-3, step_seconds=64 / speed,
                tokens_per_second_per_device=speed if step > 1 else 1.0,
                model_tflops_per_device=None, memory_bytes=1000 + step,
            )  # fmt: skip
        journal.write("end", status="done", seconds=1.0)
        return training

    return write
