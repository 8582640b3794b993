"""What the loop asks of an engine and writes down, with an engine that only takes notes."""

import math
from collections.abc import Iterator
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

    def train_step(self, batches: Any, num_micro_batches: int, lr: float, accept: Any) -> Any:
        from internlm_lib.engines.base import StepResult

        self.steps.append((batches, num_micro_batches, lr))
        values = {"loss": 2.0, "grad_norm": 1.0} | self.results.get(f"step_{len(self.steps)}", {})
        skipped = not math.isfinite(values["grad_norm"]) or not accept(values["loss"])
        return StepResult(**{**values, "skipped": skipped})

    def validation_loss(self, batches: Any, num_micro_batches: int) -> float:
        self.validations.append((batches, num_micro_batches))
        return float(len(self.validations))


class Checkpoints:
    """Says which were asked for."""

    def __init__(self) -> None:
        self.saved: list[tuple[Any, dict[str, Any]]] = []
        self.finished = 0

    def save(self, engine: Any, chunks: Any, position: Any, facts: dict[str, Any]) -> None:
        self.saved.append((position, facts))

    def poll(self) -> None: ...

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    import torch

    from internlm_lib.devices import select_device

    select_device("cpu").adapt_megatron()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def run(
    engine: Notebook, checkpoints: Any = None, stop_after: int | None = None, **keys: Any
) -> list[dict[str, Any]]:
    """The events of a training, and as the last of them how it failed, if it did."""
    from internlm_lib.devices import select_device
    from internlm_lib.training.guard import StepGuard
    from internlm_lib.training.loop import Throughput, TrainingLoop

    found: list[dict[str, Any]] = []
    training = TrainingSection(**(KEYS | keys))
    loop = TrainingLoop(
        engine=engine, chunks=[], batches=Batches(), validation=Batches(), training=training,
        optimizer=OptimizerSection(min_loss_scale=2.0), layout=Layout(data_parallel_size=2),
        device=select_device("cpu"), throughput=Throughput(2, 1.0),
        record=lambda event, **fields: found.append({"event": event, **fields}),
        checkpoints=checkpoints or Checkpoints(), facts={"role": "candidate"},
        guard=StepGuard(training.loss_spike_factor),
        stop_requested=lambda: len(engine.steps) == stop_after,
    )  # fmt: skip
    try:
        loop.run()
    except KitError as error:
        found.append({"event": type(error).__name__, "message": str(error)})
    return found


def steps_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "step"]


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
    for step in steps_of(run(Notebook())):
        assert {"global_batch_size", "tokens", "loss_scale", "skipped"} & set(step) == set()


def test_a_skipped_step_consumes_its_samples_and_not_the_schedule() -> None:
    overflow = {"grad_norm": math.inf, "loss_scale": 8.0}
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
        ({"loss": math.nan}, "step 3: the loss is nan (gradient norm 1)"),
        ({"grad_norm": math.inf}, "step 3: the gradient norm is inf"),
        ({"grad_norm": math.inf, "loss_scale": 2.0},
         "step 3: the gradient overflows fp16 at a loss scale of 2, and it may not be lowered"),
        ({"loss": math.inf, "grad_norm": math.inf, "loss_scale": 8.0}, "step 3: the loss is inf"),
    ],
)  # fmt: skip
def test_numbers_that_are_not_finite_end_the_training(result: dict[str, Any], what: str) -> None:
    engine = Notebook(step_3=result)
    *_, last = run(engine)
    assert last["event"] == "KitError"
    assert last["message"].startswith(what) and "lower" in last["message"]
    assert len(engine.steps) == 3


def test_a_batch_that_is_left_out_is_followed_by_the_next_and_costs_no_step() -> None:
    engine = Notebook(step_3={"loss": math.nan}, step_5={"grad_norm": math.inf})
    events = run(engine, bad_step_policy="skip_batch")
    assert [step["step"] for step in steps_of(events)] == [1, 2, 3, 4, 5, 6]
    assert [s[0].start for s in engine.steps] == [12 * n for n in range(8)]
    bad = [event for event in events if event["event"] == "bad_step"]
    assert [(event["step"], event["fault"]) for event in bad] == [
        (3, "the loss is nan"), (4, "the gradient norm is inf")
    ]  # fmt: skip


def test_too_many_batches_left_out_in_a_row_end_the_training() -> None:
    engine = Notebook(**{f"step_{n}": {"loss": math.nan} for n in range(3, 30)})
    *_, last = run(engine, bad_step_policy="skip_batch")
    assert last["message"].startswith("9 batches in a row were left out")
    assert len(engine.steps) == 2 + 9


def test_a_spike_is_measured_against_the_median_of_the_steps_before() -> None:
    from internlm_lib.training.guard import WINDOW

    engine = Notebook(**{f"step_{WINDOW + 2}": {"loss": 6.1}, "step_3": {"loss": 50.0}})
    events = run(
        engine, train_iters=WINDOW + 4, loss_spike_factor=3.0, bad_step_policy="skip_batch"
    )
    (bad,) = [event for event in events if event["event"] == "bad_step"]
    assert bad["step"] == WINDOW + 2
    assert bad["fault"] == f"the loss is 6.1, 3.05 times the median of {WINDOW} steps"
    assert steps_of(events)[2]["loss"] == 50.0  # the window was not full yet


def test_a_rollback_says_up_to_where_the_data_is_used_up() -> None:
    checkpoints = Checkpoints()
    events = run(
        Notebook(step_5={"loss": math.nan}), checkpoints, bad_step_policy="rollback",
        save_interval=2, max_restarts=1,
    )  # fmt: skip
    assert [position.step for position, _ in checkpoints.saved] == [2, 4]
    assert checkpoints.finished == 1  # what is being written must be there to go back to
    assert events[-1]["event"] == "RollbackError"
    assert (events[-2]["event"], events[-2]["consumed_samples"]) == ("bad_step", 5 * 12)


def test_a_stop_is_heeded_after_the_step_and_saved() -> None:
    checkpoints = Checkpoints()
    events = run(Notebook(), checkpoints, stop_after=4)
    assert [step["step"] for step in steps_of(events)] == [1, 2, 3, 4]
    ((position, facts),) = checkpoints.saved
    assert (position.step, position.consumed_samples) == (4, 48)
    assert facts["recent_losses"] == [2.0] * 4
    assert events[-2]["event"] == "end" and events[-2]["status"] == "stopped"
    assert events[-1]["event"] == "StoppedError" and "after step 4" in events[-1]["message"]


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss() -> None:
    checkpoints = Checkpoints()
    engine = Notebook()
    engine.validation_loss = lambda batches, count: [3.0, 2.0, 2.5][int(batches[-1])]
    run(engine, checkpoints, train_iters=7, eval_interval=2, eval_iters=1, save_interval=2)
    assert [facts["best"] for _, facts in checkpoints.saved] == [True, True, False]
    assert [position.best_loss for position, _ in checkpoints.saved] == [3.0, 2.0, 2.0]


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


def test_a_step_tells_what_the_rank_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak under its old name; what only an allocator knows, only where there is one."""
    from internlm_lib.devices import Memory
    from internlm_lib.devices.cpu import CpuDevice

    first, *_ = steps_of(run(Notebook()))
    assert first["memory_bytes"] >= first["memory_allocated_bytes"] > 2**20
    assert "memory_reserved_bytes" not in first
    monkeypatch.setattr(CpuDevice, "memory", lambda self: Memory(3, 16, 9))
    first, *_ = steps_of(run(Notebook()))
    names = ("memory_bytes", "memory_allocated_bytes", "memory_reserved_bytes")
    assert [first[name] for name in names] == [9, 3, 16]
