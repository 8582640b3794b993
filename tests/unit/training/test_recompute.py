"""What is recomputed: the cheapest choice that fits, against trying all of them."""

import random
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from internlm_lib.errors import InputError
from internlm_lib.experiment.presets import PRESETS
from internlm_lib.experiment.schema import Layout, ModelSection, TrainingSection
from internlm_lib.files import write_json
from internlm_lib.model.arithmetic import parameter_count, rank_state_bytes, training_state_bytes
from internlm_lib.model.parts import PARTS, WHOLE_LAYER
from internlm_lib.run_folder import RunFolder
from internlm_lib.stages.train import recompute_rows
from internlm_lib.training.recompute import (
    MIB,
    Choice,
    LayerCost,
    PartCost,
    RankMemory,
    choice_record,
    choose,
    kept_bytes,
    kept_bytes_of_choice,
    memory_bytes,
    micro_batches_in_flight,
    rows,
)

LAYOUT = Layout()
NOTHING = dict.fromkeys((*PARTS, WHOLE_LAYER), 0)
PRESENT = ("qkv", "linear_fc1", "activation")
"""Parts that save anything in the small cases, so that all choices can be tried."""


def layer_cost(saved: dict[str, tuple[int, float]], kept: int) -> LayerCost:
    """From part → (MiB saved, seconds); parts left out save nothing."""
    parts = [PartCost(name, *_bytes(saved.get(name, (0, 1.0)))) for name in (*PARTS, WHOLE_LAYER)]
    return LayerCost(kept * MIB, 0, 0, tuple(parts))


def _bytes(part: tuple[int, float]) -> tuple[int, float]:
    return part[0] * MIB, part[1]


def rank(states: int = 100, around: int = 5, layers: int = 4, in_flight: int = 1) -> RankMemory:
    return RankMemory(states * MIB, around * MIB, layers, in_flight)


def all_choices(layers: int) -> list[dict[str, int]]:
    """Every number of whole layers, and of layers of each part after these."""
    return [
        NOTHING | {WHOLE_LAYER: whole} | dict(zip(PRESENT, numbers, strict=True))
        for whole in range(layers + 1)
        for numbers in product(range(layers - whole + 1), repeat=len(PRESENT))
    ]


def seconds(layer: LayerCost, layers: dict[str, int]) -> float:
    return sum(layer.part(name).seconds * number for name, number in layers.items())


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_that_fits_is_cheaper(seed: int) -> None:
    """Sizes and times drawn at random, ranks with more and with fewer micro-batches in flight."""
    draw = random.Random(seed)
    saved = {name: (draw.randint(1, 30), draw.uniform(0.1, 3)) for name in PRESENT}
    inside = sum(part[0] for part in saved.values())
    whole = (inside + draw.randint(1, 10), sum(part[1] for part in saved.values()) + draw.random())
    layer = layer_cost({**saved, WHOLE_LAYER: whole}, whole[0] + 8)
    ranks = [rank(in_flight=2), rank(states=draw.randint(80, 160), around=draw.randint(0, 60))]

    def needed(layers: dict[str, int]) -> int:
        return max(memory_bytes(layer, each, layers) for each in ranks)

    tried = {tuple(c.items()): needed(c) for c in all_choices(4)}
    for limit in range(min(tried.values()) // MIB, max(tried.values()) // MIB + 2, 7):
        fitting = [dict(c) for c, memory in tried.items() if memory <= limit * MIB]
        if not fitting:
            with pytest.raises(InputError):
                choose(layer, ranks, limit, LAYOUT)
            continue
        choice = choose(layer, ranks, limit, LAYOUT)
        assert choice.memory_bytes == needed(choice.layers) <= limit * MIB
        assert choice.added_seconds == pytest.approx(seconds(layer, choice.layers))
        assert choice.added_seconds == pytest.approx(min(seconds(layer, c) for c in fitting))


LAYER = layer_cost(
    {"qkv": (10, 4.0), "linear_fc1": (20, 10.0), "activation": (30, 1.0), WHOLE_LAYER: (70, 20.0)},
    80,
)


def test_with_plenty_of_memory_nothing_is_recomputed() -> None:
    choice = choose(LAYER, [rank()], 1000, LAYOUT)
    assert choice == Choice(NOTHING, (100 + 5 + 4 * 80 + 5) * MIB, 0.0)


def test_the_part_that_saves_most_per_second_is_taken_first() -> None:
    # 430 are needed; what the activation saves, 30 a layer, comes back twice for one layer.
    choice = choose(LAYER, [rank()], 425, LAYOUT)
    assert choice.layers == NOTHING | {"activation": 2}
    assert choice.memory_bytes == (100 + 5 + 4 * 80 - 2 * 30 + 60) * MIB


def test_what_fits_every_rank_is_decided_by_the_fullest() -> None:
    first, last = rank(in_flight=4), rank(around=50)
    alone = choose(LAYER, [last], 900, LAYOUT)
    together = choose(LAYER, [first, last], 900, LAYOUT)
    assert alone.layers == NOTHING != together.layers
    assert together == choose(LAYER, [first], 900, LAYOUT)


@pytest.mark.parametrize("limit", [1, 150, 204])
def test_too_little_memory_says_by_how_many_mib(limit: int) -> None:
    """All whole: states 100, around 5, inputs 4 × 10, one layer 70 comes back: 215."""
    with pytest.raises(InputError) as caught:
        choose(LAYER, [rank()], limit, LAYOUT)
    assert str(caught.value).startswith(
        f"training.auto_recompute_device_memory_mib = {limit}: megatron TP1 PP1 DP1 needs 215 MiB "
        f"per device, {215 - limit} MiB more, even with all recomputed"
    )
    assert choose(LAYER, [rank()], 215, LAYOUT).layers == NOTHING | {WHOLE_LAYER: 4}
    with pytest.raises(InputError):
        choose(LAYER, [rank()], 214, LAYOUT)


def test_eighty_layers_are_searched_quickly() -> None:
    """The shape of 65B; each limit within a second or so."""
    parts = {
        "input_layernorm": (24, 0.31), "qkv": (42, 2.9), "core_attention": (8, 2.2),
        "pre_mlp_layernorm": (24, 0.32), "linear_fc1": (43, 5.1), "activation": (64, 0.4),
        WHOLE_LAYER: (214, 18.0),
    }  # fmt: skip
    layer = layer_cost(parts, 222)
    for limit in (20_000, 30_000, 50_000, 70_000):
        choice = choose(layer, [rank(states=5_000, layers=80, in_flight=4)], limit, LAYOUT)
        assert choice.memory_bytes <= limit * MIB
        # What one more MiB of limit would be used for is small: the search leaves no slack unused.
        assert choice.memory_bytes > (limit - 4 * 2 * 214) * MIB


def test_layers_are_recomputed_from_the_first_on_whole_ones_before_others() -> None:
    choice = Choice(NOTHING | {WHOLE_LAYER: 1, "activation": 2, "qkv": 1}, 0, 0.0)
    assert [sorted(choice.parts_of(index)) for index in range(4)] == [
        [WHOLE_LAYER], ["activation", "qkv"], ["activation"], [],
    ]  # fmt: skip


def test_the_table_says_what_each_part_saves_and_takes() -> None:
    choice = choose(LAYER, [rank()], 425, LAYOUT)
    found = {row["part"]: row for row in rows(LAYER, choice)}
    assert list(found) == [*PARTS, WHOLE_LAYER]
    assert found["activation"] == {
        "part": "activation", "saves MiB per layer": 30, "adds ms per layer": 1000,
        "layers recomputed": 2, "saves MiB": 60, "adds ms": 2000,
    }  # fmt: skip
    assert found["linear_fc1"]["saves MiB per layer"] == 20
    assert found["linear_fc1"]["layers recomputed"] == found["linear_fc1"]["adds ms"] == 0


def test_a_record_holds_what_the_choice_was_made_of() -> None:
    choice = choose(LAYER, [rank()], 425, LAYOUT)
    record = choice_record({"device": "cpu"}, LAYER, [rank()], choice)
    assert Choice(**record["choice"]) == choice
    assert LayerCost.of(record["layer"]) == LAYER
    assert [RankMemory(**each) for each in record["ranks"]] == [rank()]


def test_03_train_shows_what_each_training_chose(tmp_path: Path) -> None:
    choice = choose(LAYER, [rank()], 425, LAYOUT)
    folder = RunFolder.of("run", tmp_path)
    record = folder.training("candidate").recompute
    write_json(record, choice_record({}, LAYER, [rank()], choice))

    def shown(limit: int | None) -> list[dict[str, Any]]:
        training = TrainingSection(auto_recompute_device_memory_mib=limit)
        experiment = SimpleNamespace(training=training, roles=["reference", "candidate"])
        return recompute_rows(SimpleNamespace(folder=folder, experiment=experiment))

    assert shown(425) == [{"training": "candidate", **row} for row in rows(LAYER, choice)]
    # What an earlier training chose says nothing about one that has no limit.
    assert shown(None) == []


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({}, 5 + 4 * 80),
        ({"recompute_granularity": "full"}, 5 + 4 * 10),
        ({"recompute_granularity": "full", "recompute_num_layers": 2}, 5 + 2 * 10),
        (
            {
                "recompute_granularity": "full", "recompute_method": "block",
                "recompute_num_layers": 3,
            },
            5 + 80 + 3 * 10,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_policy_keeps(keys: dict[str, Any], kept: int) -> None:
    assert kept_bytes(LAYER, rank(), TrainingSection(**keys)) == kept * MIB


def test_whole_layers_chosen_keep_what_full_block_keeps() -> None:
    block = TrainingSection(
        recompute_granularity="full", recompute_method="block", recompute_num_layers=3
    )
    chosen = kept_bytes_of_choice(LAYER, rank(), NOTHING | {WHOLE_LAYER: 3})
    assert chosen == kept_bytes(LAYER, rank(), block)


def test_1f1b_holds_one_micro_batch_per_stage_that_follows() -> None:
    layout = Layout(pipeline_model_parallel_size=4)
    assert [micro_batches_in_flight(layout, s, 64) for s in range(4)] == [4, 3, 2, 1]
    assert [micro_batches_in_flight(layout, s, 2) for s in range(4)] == [2, 2, 2, 1]
    assert micro_batches_in_flight(Layout(), 0, 64) == 1


def test_interleaving_holds_more() -> None:
    """Four stages of two chunks: 11, 9, 7, 5 passes through half of a stage's layers."""
    layout = Layout(pipeline_model_parallel_size=4)
    assert [micro_batches_in_flight(layout, s, 64, chunks=2) for s in range(4)] == [6, 5, 4, 3]


def zero(stage: int) -> Layout:
    return Layout(engine="deepspeed", zero_stage=stage, data_parallel_size=8)


@pytest.mark.parametrize(
    ("layout", "weights", "gradients", "optimizer"),
    [
        (Layout(data_parallel_size=8, use_distributed_optimizer=False), 800, 800, 800),
        (Layout(data_parallel_size=8), 800, 800, 100),
        (zero(1), 800, 800, 100),
        (zero(2), 800, 100, 100),
        (zero(3), 100, 100, 100),
    ],
)
def test_states_are_shared_over_data_parallel_ranks(
    layout: Layout, weights: int, gradients: int, optimizer: int
) -> None:
    assert rank_state_bytes(800, layout, "bf16") == {
        "weights": 2 * weights, "gradients": 4 * gradients, "optimizer": 12 * optimizer,
    }  # fmt: skip
    assert rank_state_bytes(800, layout, "fp32") == {
        "weights": 4 * weights, "gradients": 4 * gradients, "optimizer": 8 * optimizer,
    }  # fmt: skip
    assert rank_state_bytes(801, zero(3), "fp32")["weights"] == 4 * 101


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_rank_holds_all_states(precision: Any) -> None:
    model = ModelSection(preset="internlm-7b", **PRESETS["internlm-7b"])
    states = rank_state_bytes(parameter_count(model), Layout(), precision)
    assert sum(states.values()) == training_state_bytes(model, precision)
