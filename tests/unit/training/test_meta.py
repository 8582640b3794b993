"""The big models built rank by rank on the meta device: `benchmarks/meta_build.py`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from internlm_lib.experiment.presets import PRESETS
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.model.arithmetic import layer_parameter_count, parameter_count

MODELS = {"internlm_7b": "internlm-7b", "internlm_65b": "internlm-65b"}
TENSOR = {"internlm_7b": 1, "internlm_65b": 8}
STAGES = {"internlm_7b": [0], "internlm_65b": [0, 8, 16, 24]}
"""First ranks of the pipeline stages."""

RELATIVE = 1e-6
"""Tolerance of predicted activation bytes. They are the measured layer's times layers: exact."""


def model(name: str) -> ModelSection:
    return ModelSection(preset=MODELS[name], **PRESETS[MODELS[name]])


@pytest.fixture(scope="module")
def built(repository_root: Path) -> Any:
    done = subprocess.run(
        [sys.executable, "benchmarks/meta_build.py", "--json"],
        cwd=repository_root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def repository_root() -> Path:
    return Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", MODELS)
def test_every_stage_is_built(name: str, built: Any) -> None:
    assert [stage["rank"] for stage in built[name]["stages"]] == STAGES[name]
    assert built[name]["ranks"] == {"internlm_7b": 8, "internlm_65b": 32}[name]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_counted_by_hand(name: str, built: Any) -> None:
    """Matrices and the biases of q, k, v are cut by TP; norms and the bias of o are on every rank:
    20·((4h² + 3hf + 3h)/8 + 3h) + Vh/8, and h more for the last norm of 65B."""
    shape, tensor, stages = model(name), TENSOR[name], built[name]["stages"]
    h, f = shape.hidden_size, shape.ffn_hidden_size
    layer = (4 * h * h + 3 * h * f + 3 * h) // tensor + 3 * h
    embedding = shape.vocab_size * h // tensor
    expected = [shape.num_layers // len(stages) * layer for _ in stages]
    expected[0] += embedding
    expected[-1] += embedding + h
    assert [stage["parameters"] for stage in stages] == expected
    assert [stage["parameter_bytes"] for stage in stages] == [2 * number for number in expected]

    # Over all tensor parallel ranks, less the copies, it is the whole model.
    copies = (tensor - 1) * (shape.num_layers * 3 * h + h)
    assert tensor * sum(expected) - copies == parameter_count(shape)
    assert tensor * layer - (tensor - 1) * 3 * h == layer_parameter_count(shape)


def test_known_counts(built: Any) -> None:
    assert [s["parameters"] for s in built["internlm_7b"]["stages"]] == [7_321_948_160]
    stages = [stage["parameters"] for stage in built["internlm_65b"]["stages"]]
    assert stages[0] == 2_129_948_672 and stages[3] == 2_129_956_864


@pytest.mark.parametrize("name", MODELS)
def test_activations_are_those_of_one_layer_times_layers(name: str, built: Any) -> None:
    for stage in built[name]["stages"]:
        assert stage["activation_bytes"] > 0
        assert stage["predicted_activation_bytes"] == pytest.approx(
            stage["activation_bytes"], rel=RELATIVE
        )
    layer = built[name]["layer"]
    parts = {part: saved for part, saved in layer["saved_bytes"].items() if part != "layer"}
    assert all(saved > 0 for saved in parts.values())
    assert sum(parts.values()) < layer["saved_bytes"]["layer"] < layer["activation_bytes"]


def test_a_layer_of_the_7b_keeps_what_is_counted_term_by_term(built: Any) -> None:
    """With fused operators, in bf16, 2 × 2048 tokens, per token and in values of two bytes: the two
    norms' inputs and outputs 4h, qkv 3h, turned q and k 2h, the output of attention h; fc1 2f, the
    product f. Beside it rstd, the log of the softmax's sum, and the rotary angles [s, head_dim]."""
    shape, tokens = model("internlm_7b"), 2 * 2048
    h, f = shape.hidden_size, shape.ffn_hidden_size
    values = tokens * (10 * h + 3 * f)
    rest = 4 * tokens * (2 + shape.num_attention_heads) + 4 * 2048 * shape.head_dim
    assert built["internlm_7b"]["layer"]["activation_bytes"] == 2 * values + rest


def test_states_are_shared_as_zero_2_shares_them(built: Any) -> None:
    """bf16 weights whole; fp32 gradients, main weights and two moments over eight ranks."""
    (stage,) = built["internlm_7b"]["stages"]
    share = stage["parameters"] // 8
    assert stage["state_bytes"] == {
        "weights": 2 * stage["parameters"], "gradients": 4 * share, "optimizer": 12 * share,
    }  # fmt: skip


def test_earlier_pipeline_stages_hold_more_micro_batches(built: Any) -> None:
    stages = built["internlm_65b"]["stages"]
    assert [stage["micro_batches_in_flight"] for stage in stages] == [4, 3, 2, 1]
    memory = [stage["memory_bytes"] for stage in stages]
    assert memory == sorted(memory, reverse=True)
