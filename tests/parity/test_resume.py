"""An interrupted training is the uninterrupted one: bit for bit, and in another layout closely."""

from typing import Any

import pytest

from internlm_lib.experiment.schema import Layout
from internlm_lib.files import read_json
from internlm_lib.ranks.launch import launch
from tests.parity.make_run import make_run
from tests.parity.resume_worker import CASES, MOVES, SAVED_AT, STEPS

LOSS_TOLERANCE = 1e-6
NORM_TOLERANCE = 1e-5
"""Both relative, of a state continued in another layout, whose sums have another order."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_run(
        tmp_path_factory.mktemp("resume"),
        Layout(data_parallel_size=2),
        **{
            "training.train_iters": STEPS,
            "model.num_layers": 4,
            "training.global_batch_size": 4,
            "training.micro_batch_size": 1,
            "training.lr": 1e-2,
            "training.lr_warmup_fraction": 0.2,
            "optimizer.weight_decay": 0.1,
            "optimizer.clip_grad": 0.5,
            # An odd number of rows, so that vocabularies are padded, differently for each layout.
            "model.vocab_size": 509,
            "model.make_vocab_size_divisible_by": 4,
        },
    )
    result = folder.path / "result.json"
    launch(
        "tests.parity.resume_worker", folder, str(result), world_size=2, logs=folder.path / "logs"
    )
    return read_json(result)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_repeats_the_whole_one_bit_for_bit(found: Any, case: str) -> None:
    whole = found["whole"][case]
    assert len(whole) == STEPS and len({loss for loss, _ in whole}) == STEPS
    assert found["resumed"][case] == whole[SAVED_AT:]
    assert found["same weights"][case]


@pytest.mark.parametrize("move", [f"{source} -> {target}" for source, target in MOVES])
def test_a_state_goes_on_in_another_layout_and_engine(found: Any, move: str) -> None:
    source, moved = found["moved"][move]
    expected = found["whole"][source][SAVED_AT:]
    assert [loss for loss, _ in moved] == pytest.approx(
        [loss for loss, _ in expected], rel=LOSS_TOLERANCE
    )
    assert [norm for _, norm in moved] == pytest.approx(
        [norm for _, norm in expected], rel=NORM_TOLERANCE
    )
