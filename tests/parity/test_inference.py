"""A model spread over ranks, asked through its driver, against transformers in one process."""

from pathlib import Path

import pytest

from internlm_lib.experiment.schema import Layout
from internlm_lib.files import read_json
from internlm_lib.ranks.launch import launch
from internlm_lib.weights.convert import Order, convert, plan_conversion
from tests.parity.make_run import make_run

TOLERANCE = 1e-5
"""Largest absolute difference of logits, and of log-probabilities in nats, in fp32."""

LAYOUTS = {
    "TP2": Layout(tensor_model_parallel_size=2, sequence_parallel=True),
    "PP2": Layout(pipeline_model_parallel_size=2),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_answers_as_transformers_does(layout: Layout, tmp_path: Path) -> None:
    # An odd vocabulary: the last tensor parallel rank holds a row that no token belongs to.
    overrides = {"model.vocab_size": 511, "model.direct_start": layout is LAYOUTS["PP2"]}
    run = make_run(tmp_path, layout, **overrides)
    convert(plan_conversion(run.huggingface, run.megatron, Order("megatron")))
    result, logs = tmp_path / "found.json", run.path / "logs"
    launch("internlm_lib.stages.convert_worker", run, world_size=2, logs=logs)
    launch("tests.parity.inference_worker", run, str(result), world_size=2, logs=logs)
    found = read_json(result)
    assert found["logits"] <= TOLERANCE
    assert found["logits_at_the_end"] <= TOLERANCE
    assert found["log_probabilities"] <= TOLERANCE
    assert found["greedy"] == found["most_likely"] >= 3
    record = read_json(run.conversion_record)
    assert (record["missing"], record["unexpected"], record["differing"]) == ([], [], [])
