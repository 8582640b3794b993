"""What the loop asks of an engine and writes down, with an engine that only takes notes."""

import math
from typing import Any

import pytest

from internlm_lib.errors import KitError
from internlm_lib.experiment.schema import Layout, OptimizerSection, TrainingSection
from internlm_lib.training.schedule import learning_rate

KEYS = {"train_iters": 6, "global_batch_size": 12, "seq_length": 8, "lr": 1e-2}


class Batches:
    """Says which samples were asked for."""

    def samples(self, consumed: int, count: int) -> range:
        return range(consumed, consumed + count)

    def step(self, index: int) -> str:
        return f"batch {index}"


class Notebook:
    """An engine whose steps end as they are told to."""

    def __init__(self, **results: Any) -> None:
        self.results = results
        self.steps: list[tuple[Any, int, float]] = []
        self.validations: list[tuple[Any, int]] = []

    def train_step(self, batches: Any, num_micro_batches: int, lr: float) -> Any:
        from internlm_lib.engines.base import StepResult

        self.steps.append((batches, num_micro_batches, lr))
        values = {"loss": 2.0, "grad_norm": 1.0}
        return StepResult(**(values | self.results.get(f"step_{len(self.steps)}", {})))

    def validation_loss(self, batches: Any, num_micro_batches: int) -> float:
        self.validations.append((batches, num_micro_batches))
        return float(len(self.validations))


@pytest.fixture(autouse=True, scope="module")
def megatron_on_cpu() -> None:
    from internlm_lib.devices import select_device

    select_device("cpu").adapt_megatron()


def run(engine: Notebook, **keys: Any) -> list[dict[str, Any]]:
    """The events of a training."""
    from internlm_lib.devices import select_device
    from internlm_lib.training.loop import Throughput, train

    found: list[dict[str, Any]] = []
    optimizer = OptimizerSection(min_loss_scale=2.0)
    train(
        engine, Batches(), Batches(), training=TrainingSection(**(KEYS | keys)),
        optimizer=optimizer, layout=Layout(data_parallel_size=2), device=select_device("cpu"),
        throughput=Throughput(2, 1.0),
        record=lambda event, **fields: found.append({"event": event, **fields}),
        save=lambda step: None,
    )  # fmt: skip
    return found


def test_a_ramp_takes_samples_one_after_the_other_in_growing_steps() -> None:
    engine = Notebook()
    steps = run(engine, rampup_batch_size=(4, 4, 24))
    assert [(s[0].start, s[0].stop, s[1]) for s in engine.steps] == [
        (0, 4, 2), (4, 8, 2), (8, 12, 2), (12, 20, 4), (20, 28, 4), (28, 40, 6)
    ]  # fmt: skip
    assert [step["global_batch_size"] for step in steps] == [4, 4, 4, 8, 8, 12]
    assert [step["tokens"] for step in steps] == [32, 32, 32, 64, 64, 96]
    for step in steps:  # the rate counts the tokens of the step
        rate = step["tokens_per_second_per_device"]
        assert rate == pytest.approx(step["tokens"] / step["step_seconds"] / 2)


def test_a_validation_takes_full_batches_during_a_ramp() -> None:
    engine = Notebook()
    events = run(engine, rampup_batch_size=(4, 4, 24), eval_interval=2, eval_iters=2)
    assert engine.validations == [(f"batch {n}", 6) for n in range(6)]
    losses = [event["loss"] for event in events if event["event"] == "validation"]
    assert losses == [1.5, 3.5, 5.5]


def test_a_plain_training_records_neither_sizes_nor_scales() -> None:
    for step in run(Notebook()):
        assert {"global_batch_size", "tokens", "loss_scale", "skipped"} & set(step) == set()


def test_a_skipped_step_consumes_its_samples_and_not_the_schedule() -> None:
    overflow = {"grad_norm": math.inf, "skipped": True, "loss_scale": 8.0}
    sound = {"loss_scale": 4.0}
    engine = Notebook(step_2=overflow, **{f"step_{n}": sound for n in (1, 3, 4, 5, 6)})
    steps = run(engine, lr_warmup_iters=4)
    assert [step["skipped"] for step in steps] == [False, True, False, False, False, False]
    assert [step["loss_scale"] for step in steps] == [4.0, 8.0, 4.0, 4.0, 4.0, 4.0]
    assert [s[0].start for s in engine.steps] == [0, 12, 24, 36, 48, 60]
    training = TrainingSection(**KEYS, lr_warmup_iters=4)
    rates = [learning_rate(training, number) for number in (1, 2, 2, 3, 4, 5)]
    assert [s[2] for s in engine.steps] == [step["lr"] for step in steps] == rates


@pytest.mark.parametrize(
    ("result", "what"),
    [
        ({"loss": math.nan}, "step 3: the loss is nan, the gradient norm 1.0, lr"),
        ({"grad_norm": math.inf, "skipped": True}, "step 3: the loss is 2.0, the gradient norm "),
        ({"grad_norm": math.inf, "skipped": True, "loss_scale": 2.0},
         "step 3: the gradient overflows fp16 at a loss scale of 2, and it may not be lowered"),
        ({"loss": math.inf, "grad_norm": math.inf, "skipped": True, "loss_scale": 8.0},
         "step 3: the loss is inf"),
    ],
)  # fmt: skip
def test_numbers_that_are_not_finite_end_the_training(result: dict[str, Any], what: str) -> None:
    engine = Notebook(step_3=result)
    with pytest.raises(KitError, match="lower") as caught:
        run(engine)
    assert str(caught.value).startswith(what)
    assert len(engine.steps) == 3


def test_the_decay_rule_spares_biases_always_and_norms_but_for_the_predecessor() -> None:
    import torch

    from internlm_lib.engines.base import decays

    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    rules = OptimizerSection(), OptimizerSection(predecessor_decay=True)
    plain, parallel = Layout(), Layout(tensor_model_parallel_size=2, sequence_parallel=True)
    zero = Layout(engine="deepspeed", zero_stage=1)
    zero_parallel = parallel.model_copy(update={"engine": "deepspeed", "zero_stage": 1})
    for layout in (plain, parallel, zero, zero_parallel):
        for rule in rules:
            assert decays("linear_qkv.weight", matrix, rule, layout)
            assert not decays("linear_qkv.bias", vector, rule, layout)
        assert not decays("input_layernorm.weight", vector, rules[0], layout)
    found = [decays("norm.weight", vector, rules[1], x) for x in (plain, parallel, zero)]
    assert found == [True, True, True]
    # AscendSpeed's one exception: DeepSpeed with sequence parallelism.
    assert not decays("norm.weight", vector, rules[1], zero_parallel)
