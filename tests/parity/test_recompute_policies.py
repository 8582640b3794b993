"""Every policy of recomputation: bitwise the same training, and the memory that was predicted.

One launch trains under all policies and settings, each from the same weights.
"""

from typing import Any

import pytest

from internlm_lib.files import read_json
from internlm_lib.model.parts import PARTS, WHOLE_LAYER
from internlm_lib.ranks.launch import launch
from internlm_lib.training.recompute import MIB
from tests.parity.make_run import make_run
from tests.parity.recompute_worker import CHOSEN, POLICIES, SEQUENCE_PARALLEL, SETTINGS, STEPS

MEMORY_TOLERANCE = 1e-6
"""Relative; bytes of one layer times layers are exact."""


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("recompute")
    run = make_run(root, SEQUENCE_PARALLEL, **{"model.num_layers": 4, "training.seq_length": 64})
    result = root / "found.json"
    launch(
        "tests.parity.recompute_worker", run, str(result), world_size=2, logs=run.path / "logs"
    )  # fmt: skip
    return read_json(result)


@pytest.fixture(scope="module", params=SETTINGS)
def found(request: pytest.FixtureRequest, everything: Any) -> Any:
    return everything[request.param]


def test_losses_gradients_and_weights_are_bitwise_those_without_recomputation(found: Any) -> None:
    runs = {**found["policies"], "adaptive": found["trained"]}
    expected = runs.pop("none")
    assert len(expected["losses"]) == STEPS and len(set(expected["losses"])) == STEPS
    for name, run in runs.items():
        for numbers in ("losses", "norms", "weights"):
            assert run[numbers] == expected[numbers], name


def test_a_policy_keeps_the_activations_it_was_predicted_to(found: Any) -> None:
    for name, run in found["policies"].items():
        assert run["predicted"] == pytest.approx(run["measured"], rel=MEMORY_TOLERANCE), name


def test_policies_save_memory(everything: Any) -> None:
    policies = everything["megatron TP2 SP"]["policies"]
    kept = {name: run["measured"] for name, run in policies.items()}
    assert set(kept) == {*POLICIES, *CHOSEN}
    assert all(kept[name] < kept["none"] for name in kept if name != "none")
    assert kept["full uniform 2"] < kept["full uniform 1"] < kept["full block 3"]
    assert kept[WHOLE_LAYER] < kept["all parts"] < min(kept[part] for part in PARTS)


def test_the_cheapest_choice_that_fits_is_the_same_on_all_ranks_and_after_a_restart(
    found: Any,
) -> None:
    record = found["record"]
    chosen = record["choice"]["layers"]
    assert record["choice"]["memory_bytes"] <= found["limit"] * MIB
    assert sum(chosen.values()) > 0
    assert {row["part"]: row["layers recomputed"] for row in record["rows"]} == chosen
    assert all(row["adds ms per layer"] > 0 for row in record["rows"])
    for first, second, layers in found["choices"]:
        assert first == second == chosen
        assert {part: sum(part in names for names in layers) for part in chosen} == chosen
    assert found["trained"]["measured"] < found["policies"]["none"]["measured"]


def test_a_limit_that_nothing_fits_says_by_how_many_mib(found: Any) -> None:
    assert found["refusal"].startswith("training.auto_recompute_device_memory_mib = 1: ")
    words = found["refusal"].split()
    assert int(words[words.index("MiB") - 1]) == 1 + int(words[words.index("more,") - 2])
