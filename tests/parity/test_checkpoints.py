"""Checkpoints of the real engines, read by the kit, and the kit's, read by the real engines."""

import pytest
import torch

from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.files import read_json
from internlm_lib.ranks.launch import launch
from internlm_lib.run_folder import RunFolder
from internlm_lib.weights.checkpoint import Checkpoint
from internlm_lib.weights.convert import Order, convert, plan_conversion
from internlm_lib.weights.formats import open_checkpoint
from tests.parity.checkpoint_worker import STAGES, TP2_DP2
from tests.parity.make_run import make_run


def model_of(run: RunFolder) -> ModelSection:
    return load_experiment(run.experiment)[1].model


def differing(one: Checkpoint, other: Checkpoint) -> list[str]:
    """Names of tensors that are not bit-equal, in the dtype of `other`."""
    assert one.names() == other.names()
    return [
        name
        for name in one.names()
        if not torch.equal(one.read(name).to(other.tensors[name].dtype), other.read(name))
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    # An odd vocabulary: the engines hold a row more than the checkpoint. bf16: main weights differ
    # from the working copies.
    overrides = {"training.precision": "bf16", "model.vocab_size": 511}
    candidate = TP2_DP2.model_copy(update={"zero_stage": STAGES[0]})
    folder = make_run(tmp_path_factory.mktemp("checkpoints"), candidate, **overrides)
    convert(plan_conversion(folder.huggingface, folder.megatron, Order("megatron")))
    launch("tests.parity.checkpoint_worker", folder, world_size=4, logs=folder.path / "logs")
    return folder


def test_megatron_core_loads_what_the_kit_wrote(run: RunFolder) -> None:
    assert read_json(run.path / "differing.json") == []


def test_what_megatron_core_saved_is_read(run: RunFolder) -> None:
    with open_checkpoint(run.huggingface) as source, open_checkpoint(run.path / "saved") as saved:
        assert saved.format_name == "megatron"
        assert differing(source, saved) == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_zero_training_is_read_back_into_its_weights(stage: int, run: RunFolder) -> None:
    model, path = model_of(run), run.path / f"zero-{stage}"
    with (
        open_checkpoint(path, model) as trained,
        open_checkpoint(run.path / f"whole-{stage}") as whole,
        open_checkpoint(run.huggingface) as before,
    ):
        assert (trained.format_name, trained.layout) == ("deepspeed", "TP2 PP1")
        assert trained.dtype == "float32"
        assert whole.dtype == "bfloat16"
        assert differing(trained, whole) == []
        # A norm of 1 and a small step are 1 again in bf16.
        assert len(differing(before, whole)) > 0.8 * len(whole.names())
    order = Order("huggingface", dtype="bf16")
    converted = convert(plan_conversion(path, run.path / f"hf-{stage}", order, model=model))
    again = convert(plan_conversion(run.path / f"whole-{stage}", run.path / f"h-{stage}", order))
    assert converted["tensor_hash"] == again["tensor_hash"]
