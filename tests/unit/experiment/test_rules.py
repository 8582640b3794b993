"""Rules between keys: each broken once, with a message that helps, and each just satisfied."""

from collections.abc import Mapping
from typing import Any

import pytest

from internlm_lib.errors import ConfigError
from internlm_lib.experiment.load import resolve
from internlm_lib.experiment.rules import RULES, broken_rules
from internlm_lib.experiment.schema import Experiment

BASE = {"training": {"seq_length": 128, "global_batch_size": 8}}
"""A tiny model (4 layers, 4 heads, hidden 128, ffn 352) in one process: breaks no rule."""

CANDIDATE, REFERENCE = "parallel.candidate.", "parallel.reference."
TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
VIRTUAL = "virtual_pipeline_model_parallel_size"

BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "an environment variable that nobody knows": (
        {"parallel.environment.HCCL_CONECT_TIMEOUT": 600},
        "parallel.environment.HCCL_CONECT_TIMEOUT: unknown variable; "
        "did you mean HCCL_CONNECT_TIMEOUT?",
    ),
    "an environment variable out of its range": (
        {"parallel.environment": {"HCCL_CONNECT_TIMEOUT": 60}},
        "parallel.environment.HCCL_CONNECT_TIMEOUT = '60': allowed is whole numbers, 120 to 7200 "
        "(s) (how long ranks wait for each other to connect; HCCL adds 20 s to tell who is "
        "missing; source: HCCL)",
    ),
    "a deterministic mode with collectives that are not": (
        {"training.deterministic_mode": True, "parallel.environment.HCCL_DETERMINISTIC": False},
        "parallel.environment.HCCL_DETERMINISTIC = 'false' with training.deterministic_mode = "
        "true; leave it out, or use true or strict",
    ),
    "records of one source and of several": (
        {"data.train_path": "a.jsonl", "data.blend": [{"path": "b.jsonl"}]},
        "data.train_path and data.blend are both set; records come from the one or from the parts "
        "of the other: set train_path to null, or leave blend empty",
    ),
    "a rollback without checkpoints": (
        {"training.bad_step_policy": "rollback", "training.max_restarts": 1},
        "training.bad_step_policy = 'rollback' needs checkpoints to go back to; set "
        "training.save_interval, or choose stop or skip_batch",
    ),
    "a rollback without restarts": (
        {"training.bad_step_policy": "rollback", "training.save_interval": 5},
        "training.bad_step_policy = 'rollback' starts the ranks again, and "
        "training.max_restarts = 0 forbids it; set it to at least 1",
    ),
    "heads that do not divide the hidden size": (
        {"model.hidden_size": 130},
        "model.hidden_size = 130 is not a multiple of model.num_attention_heads = 4; "
        "choose a divisor of 130: 1, 2, 5, 10, 13, 26, 65",
    ),
    "an odd head dimension": (
        {"model.hidden_size": 132},
        "model.hidden_size / model.num_attention_heads = 33 is odd; "
        "rotary embeddings need an even head dimension",
    ),
    "tensor ranks that do not divide the heads": (
        {CANDIDATE + TENSOR: 8},
        f"model.num_attention_heads = 4 is not a multiple of {CANDIDATE}{TENSOR} = 8; "
        "choose a divisor of 4: 1, 2, 4",
    ),
    "tensor ranks that do not divide the ffn size": (
        {"model.ffn_hidden_size": 350, CANDIDATE + TENSOR: 4},
        f"model.ffn_hidden_size = 350 is not a multiple of {CANDIDATE}{TENSOR} = 4; "
        "choose a divisor of 350: 1, 2, 5, 7, 10, 14, 25, 35, 50, 70",
    ),
    "pipeline stages that do not divide the layers": (
        {CANDIDATE + PIPELINE: 3},
        f"model.num_layers = 2 is not a multiple of {CANDIDATE}{PIPELINE} = 3; "
        "choose a divisor of 2: 1, 2",
    ),
    "more pipeline stages than layers": (
        {CANDIDATE + PIPELINE: 8},
        f"model.num_layers = 2 is not a multiple of {CANDIDATE}{PIPELINE} = 8; "
        "choose a divisor of 2: 1, 2",
    ),
    "a reference that does not divide the model": (
        {REFERENCE + PIPELINE: 3},
        f"model.num_layers = 2 is not a multiple of {REFERENCE}{PIPELINE} = 3; "
        "choose a divisor of 2: 1, 2",
    ),
    "sequence parallel on one tensor rank": (
        {CANDIDATE + "sequence_parallel": True},
        f"{CANDIDATE}sequence_parallel = true needs {CANDIDATE}{TENSOR} above 1 (it splits "
        "activations over tensor parallel ranks); raise one or drop the other",
    ),
    "a sequence that tensor ranks do not divide": (
        {CANDIDATE + "sequence_parallel": True, CANDIDATE + TENSOR: 2, "training.seq_length": 15},
        f"training.seq_length = 15 is not a multiple of {CANDIDATE}{TENSOR} = 2; "
        "choose a divisor of 15: 1, 3, 5, 15",
    ),
    "a ZeRO stage without DeepSpeed": (
        {CANDIDATE + "zero_stage": 2},
        f"{CANDIDATE}zero_stage = 2 belongs to engine deepspeed; set {CANDIDATE}engine: deepspeed, "
        "or use_distributed_optimizer: true (megatron's ZeRO-1)",
    ),
    "DeepSpeed without a ZeRO stage": (
        {REFERENCE + "engine": "deepspeed"},
        f"{REFERENCE}zero_stage = 0 with engine deepspeed; choose 1, 2 or 3",
    ),
    "DeepSpeed with pipeline stages": (
        {CANDIDATE + "engine": "deepspeed", CANDIDATE + "zero_stage": 1, CANDIDATE + PIPELINE: 2},
        f"{CANDIDATE}{PIPELINE} = 2 with engine deepspeed; only engine megatron has pipeline "
        "stages: use 1 or megatron",
    ),
    "interleaved chunks that do not divide the layers": (
        {CANDIDATE + PIPELINE: 2, CANDIDATE + VIRTUAL: 2},
        f"model.num_layers = 2 is not a multiple of {CANDIDATE}{PIPELINE} × {VIRTUAL} = 4; "
        "choose a divisor of 2: 1, 2",
    ),
    "interleaved chunks without pipeline stages": (
        {CANDIDATE + VIRTUAL: 2},
        f"{CANDIDATE}{VIRTUAL} = 2 needs {CANDIDATE}{PIPELINE} above 1 (it interleaves the chunks "
        "of pipeline stages); raise it, or set the first to null",
    ),
    "one interleaved chunk": (
        {REFERENCE + PIPELINE: 2, REFERENCE + VIRTUAL: 1},
        f"{REFERENCE}{VIRTUAL} = 1 interleaves nothing; use 2 or more chunks per stage, or null",
    ),
    "DeepSpeed with interleaved chunks": (
        {CANDIDATE + "engine": "deepspeed", CANDIDATE + "zero_stage": 1, CANDIDATE + VIRTUAL: 2},
        f"{CANDIDATE}{VIRTUAL} = 2 with engine deepspeed, which has no pipeline stages; set it to "
        "null",
    ),
    "micro-batches that interleaved stages do not divide": (
        {
            "model.num_layers": 8,
            "training.micro_batch_size": 2,
            "training.global_batch_size": 12,
            CANDIDATE + PIPELINE: 2,
            CANDIDATE + VIRTUAL: 2,
            CANDIDATE + "data_parallel_size": 2,
        },
        f"{CANDIDATE}{VIRTUAL}: a step has 3 micro-batches per data parallel rank, no multiple of "
        f"{CANDIDATE}{PIPELINE} = 2 by which the interleaved schedule takes them; make "
        "training.global_batch_size a multiple of 8",
    ),
    "an overlap that DeepSpeed's config has no place for": (
        {
            CANDIDATE + "engine": "deepspeed",
            CANDIDATE + "zero_stage": 2,
            CANDIDATE + "overlap_grad_reduce": True,
        },
        f"{CANDIDATE}overlap_grad_reduce = true belongs to engine megatron; set it to false",
    ),
    "an overlapped gather without the distributed optimizer": (
        {
            CANDIDATE + "use_distributed_optimizer": False,
            CANDIDATE + "overlap_grad_reduce": True,
            CANDIDATE + "overlap_param_gather": True,
        },
        f"{CANDIDATE}overlap_param_gather = true needs {CANDIDATE}use_distributed_optimizer = true "
        "(parameters are gathered in the distributed optimizer's buckets); set it, or drop "
        "overlap_param_gather",
    ),
    "an overlapped gather without an overlapped reduction": (
        {REFERENCE + "overlap_param_gather": True},
        f"{REFERENCE}overlap_param_gather = true needs {REFERENCE}overlap_grad_reduce = true "
        "(parameters are gathered in the distributed optimizer's buckets); set it, or drop "
        "overlap_param_gather",
    ),
    "a batch that its ranks do not divide": (
        {"training.micro_batch_size": 1, CANDIDATE + "data_parallel_size": 3},
        "training.global_batch_size = 8 is not a multiple of 3 (training.micro_batch_size 1 × "
        f"{CANDIDATE}data_parallel_size 3); use 6 or 9",
    ),
    "a batch smaller than one micro-batch per rank": (
        {"training.micro_batch_size": 8, REFERENCE + "data_parallel_size": 2},
        "training.global_batch_size = 8 is not a multiple of 16 (training.micro_batch_size 8 × "
        f"{REFERENCE}data_parallel_size 2); use 16",
    ),
    "a sequence longer than the model's positions": (
        {"training.seq_length": 1025},
        "training.seq_length = 1025 exceeds model.max_position_embeddings = 1024; "
        "shorten the sequence or raise the limit",
    ),
    "a split without a training part": (
        {"data.split": "0,50,1"},
        "data.split = '0,50,1' leaves nothing to train on; "
        'give the first of its three weights more than 0, e.g. "949,50,1"',
    ),
    "a learning rate that ends above its start": (
        {"training.lr": 1e-5, "training.min_lr": 2e-5},
        "training.min_lr = 2e-05 exceeds training.lr = 1e-05; "
        "the schedule falls from lr to min_lr: lower min_lr or raise lr",
    ),
    "a ramp that starts full": (
        {"training.rampup_batch_size": [8, 1, 100]},
        "training.rampup_batch_size starts with 8 samples, not below training.global_batch_size = "
        "8; start lower, or set it to null",
    ),
    "a ramp whose increments miss the full batch": (
        {"training.rampup_batch_size": [2, 4, 100]},
        "training.rampup_batch_size: 6 samples from 2 to training.global_batch_size = 8 are no "
        "multiple of the increment 4; change one of the three",
    ),
    "a ramp by less than a micro-batch per rank": (
        {
            "training.rampup_batch_size": [2, 2, 100],
            "training.micro_batch_size": 2,
            CANDIDATE + "data_parallel_size": 2,
        },
        "training.rampup_batch_size: the increment 2 is not a multiple of 4 "
        f"(training.micro_batch_size 2 × {CANDIDATE}data_parallel_size 2); use one",
    ),
    "a warm-up given twice": (
        {"training.lr_warmup_iters": 10, "training.lr_warmup_fraction": 0.1},
        "training.lr_warmup_iters = 10 and training.lr_warmup_fraction = 0.1 are both set; "
        "set one of them to 0",
    ),
    "a warm-up longer than the schedule": (
        {"training.lr_warmup_iters": 21, "training.lr_decay_iters": 20},
        "training.lr_warmup_iters = 21 is longer than the schedule, 20 full batches "
        "(training.lr_decay_iters, or train_iters); shorten it",
    ),
    "a loss scale without fp16": (
        {"optimizer.loss_scale": 128},
        "optimizer.loss_scale = 128 with training.precision = 'bf16'; only fp16 needs its loss "
        "scaled: set it to null",
    ),
    "a lowest loss scale above the first": (
        {"optimizer.min_loss_scale": 16, "optimizer.initial_loss_scale": 8},
        "optimizer.min_loss_scale = 16 exceeds optimizer.initial_loss_scale = 8; lower it",
    ),
    "recomputation chosen twice": (
        {
            "training.recompute_granularity": "full",
            "training.auto_recompute_device_memory_mib": 46080,
        },
        "training.recompute_granularity and training.auto_recompute_device_memory_mib are both "
        "set; the second chooses what to recompute: set one of them to null",
    ),
    "a method of full recomputation without it": (
        {
            "training.recompute_granularity": "selective",
            "training.recompute_method": "block",
        },
        "training.recompute_method = block belongs to training.recompute_granularity: full; set "
        "that, or leave this null",
    ),
    "layers of full recomputation without it": (
        {"training.recompute_num_layers": 2},
        "training.recompute_num_layers = 2 belongs to training.recompute_granularity: full; set "
        "that, or leave this null",
    ),
    "more layers recomputed than a stage has": (
        {
            "training.recompute_granularity": "full",
            "training.recompute_method": "block",
            "training.recompute_num_layers": 3,
        },
        "training.recompute_num_layers = 3 is more than the 2 layers of a pipeline stage of "
        "parallel.candidate; use 1 to 2",
    ),
    "layers recomputed together that do not divide a stage": (
        {
            "model.num_layers": 4,
            "training.recompute_granularity": "full",
            "training.recompute_num_layers": 3,
        },
        "training.recompute_num_layers = 3 does not divide the 4 layers of a pipeline stage of "
        "parallel.candidate, as recompute_method: uniform needs; use a divisor of 4, or "
        "recompute_method: block",
    ),
    "two references": (
        {REFERENCE + "data_parallel_size": 2, "parallel.reference_run": "gpu"},
        "parallel.reference and parallel.reference_run are both set; the reference is either "
        "trained here or taken from another run: set one of them to null",
    ),
    "a vocabulary too small for the tokenizer to be trained": (
        {"model.vocab_size": 299},
        "model.vocab_size = 299 is too small to train a tokenizer: 3 control pieces and 256 bytes "
        "come first; use at least 300, or give data.tokenizer_model",
    ),
}

KEPT: dict[str, dict[str, Any]] = {
    "a rollback with both": {
        "training.bad_step_policy": "rollback",
        "training.max_restarts": 1,
        "training.save_interval": 5,
    },
    "heads that divide the hidden size": {"model.hidden_size": 132, "model.num_attention_heads": 6},
    "the smallest even head dimension": {"model.hidden_size": 8},
    "as many tensor ranks as heads": {CANDIDATE + TENSOR: 4},
    "as many pipeline stages as layers": {CANDIDATE + PIPELINE: 2, REFERENCE + PIPELINE: 1},
    "sequence parallel on two tensor ranks": {
        CANDIDATE + "sequence_parallel": True,
        CANDIDATE + TENSOR: 2,
        "training.seq_length": 14,
    },
    "an odd sequence without sequence parallel": {
        CANDIDATE + TENSOR: 2,
        "training.seq_length": 15,
    },
    "ZeRO 1 with DeepSpeed": {CANDIDATE + "engine": "deepspeed", CANDIDATE + "zero_stage": 1},
    "ZeRO 3 with DeepSpeed and tensor ranks": {
        REFERENCE + "engine": "deepspeed",
        REFERENCE + "zero_stage": 3,
        REFERENCE + TENSOR: 2,
    },
    "as many interleaved chunks as layers, a group of micro-batches": {
        "model.num_layers": 8,
        "training.micro_batch_size": 2,
        CANDIDATE + PIPELINE: 4,
        CANDIDATE + VIRTUAL: 2,
    },
    "an overlapped reduction without the distributed optimizer": {
        CANDIDATE + "use_distributed_optimizer": False,
        CANDIDATE + "overlap_grad_reduce": True,
    },
    "both overlaps": {
        REFERENCE + "overlap_grad_reduce": True,
        REFERENCE + "overlap_param_gather": True,
    },
    "one micro-batch per rank": {
        "training.micro_batch_size": 4,
        CANDIDATE + "data_parallel_size": 2,
    },
    "a sequence as long as the model's positions": {"training.seq_length": 1024},
    "a split with nothing but a training part": {"data.split": "0.1,0,0"},
    "a ramp of one increment": {
        "training.rampup_batch_size": [4, 4, 1],
        "training.micro_batch_size": 2,
        CANDIDATE + "data_parallel_size": 2,
    },
    "a warm-up as long as the schedule": {
        "training.lr_warmup_iters": 20,
        "training.train_iters": 20,
    },
    "a loss scale with fp16": {"optimizer.loss_scale": 128, "training.precision": "fp16"},
    "a loss scale that cannot be lowered": {
        "optimizer.min_loss_scale": 8,
        "optimizer.initial_loss_scale": 8,
    },
    "a learning rate that ends where it starts": {"training.lr": 1e-6, "training.min_lr": 1e-6},
    "recomputation chosen by hand": {"training.recompute_granularity": "selective"},
    "the first layer recomputed": {
        "training.recompute_granularity": "full",
        "training.recompute_method": "block",
        "training.recompute_num_layers": 1,
    },
    "two layers recomputed together": {
        "training.recompute_granularity": "full",
        "training.recompute_num_layers": 2,
    },
    "recomputation chosen by memory": {"training.auto_recompute_device_memory_mib": 46080},
    "a reference from another run": {"parallel.reference_run": "gpu"},
    "records of several sources": {"data.blend": [{"path": "a.jsonl", "weight": 2.0}]},
    "variables of two devices": {
        "parallel.environment": {"HCCL_CONNECT_TIMEOUT": "7200", "NCCL_ALGO": "Ring"},
    },
    "a deterministic mode stricter than the kit's": {
        "training.deterministic_mode": True,
        "parallel.environment": {"HCCL_DETERMINISTIC": "strict", "TASK_QUEUE_ENABLE": 2},
    },
    "the smallest vocabulary that can be trained": {"model.vocab_size": 300},
    "a small vocabulary of a given tokenizer": {
        "model.vocab_size": 299,
        "data.tokenizer_model": "tokenizer.model",
    },
}


def build(overrides: Mapping[str, Any]) -> Experiment:
    return resolve(BASE, overrides, source="test", default_run_name="test")[1]


def problems(overrides: Mapping[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(overrides)
    return caught.value.problems


def unchecked(overrides: Mapping[str, Any]) -> Experiment:
    """The experiment as it would be if there were no rules."""
    values = build({}).model_dump()
    for key, value in overrides.items():
        *path, last = key.split(".")
        target = values
        for part in path:
            if target[part] is None:
                target[part] = {}
            target = target[part]
        target[last] = value
    return Experiment.model_validate(values)


@pytest.mark.parametrize(("overrides", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_rule_names_key_value_and_what_is_allowed(
    overrides: dict[str, Any], message: str
) -> None:
    assert problems(overrides) == [message]


@pytest.mark.parametrize("overrides", KEPT.values(), ids=KEPT)
def test_a_rule_that_is_just_satisfied_is_silent(overrides: dict[str, Any]) -> None:
    assert broken_rules(build(overrides), set()) == []


def test_every_rule_is_broken_by_an_example() -> None:
    examples = [unchecked(overrides) for overrides, _ in BROKEN.values()]
    never = [
        rule.check.__name__ for rule in RULES if not any(list(rule.check(e)) for e in examples)
    ]
    assert never == []


@pytest.mark.parametrize("rule", RULES, ids=[rule.check.__name__.strip("_") for rule in RULES])
def test_a_rule_reads_only_keys_that_exist(rule: Any) -> None:
    values = unchecked({REFERENCE + "data_parallel_size": 1}).model_dump()
    for key in rule.reads:
        found: Any = values
        for part in key.split("."):
            assert part in found, key
            found = found[part]


def test_both_layouts_are_checked_and_both_are_named() -> None:
    found = problems({CANDIDATE + PIPELINE: 3, REFERENCE + PIPELINE: 3})
    assert len(found) == 2
    assert any(CANDIDATE + PIPELINE in problem for problem in found)
    assert any(REFERENCE + PIPELINE in problem for problem in found)


def test_all_broken_rules_are_listed_at_once() -> None:
    found = problems({"model.hidden_size": 130, "training.seq_length": 2000, CANDIDATE + TENSOR: 3})
    assert {problem.partition(" = ")[0] for problem in found} == {
        "model.hidden_size",
        "model.num_attention_heads",
        "model.ffn_hidden_size",
        "training.seq_length",
    }


@pytest.mark.parametrize(
    ("overrides", "unreadable"),
    [
        ({"training.lr": "fast", "training.min_lr": 1.0}, "training.lr = 'fast'"),
        ({CANDIDATE + "engine": "torch", CANDIDATE + "zero_stage": 1}, CANDIDATE + "engine"),
        ({"training": [1]}, "training = [1]"),
        ({"model": 3, "training.seq_length": 2048}, "model = 3"),
        ({"model.preset": "internlm-7c", "training.seq_length": 2048}, "model.preset"),
        ({"model.vocab_size": "big", "data.split": "1,0,0"}, "model.vocab_size = 'big'"),
    ],
)
def test_a_rule_is_left_out_when_a_key_it_reads_could_not_be_read(
    overrides: dict[str, Any], unreadable: str
) -> None:
    """Its message would speak of a default that nobody wrote."""
    (problem,) = problems(overrides)
    assert problem.startswith(unreadable)


def test_rules_of_other_keys_go_on_beside_an_unreadable_one() -> None:
    found = problems({"training.lr": "fast", "training.seq_length": 1025})
    assert [problem.split(" ")[0] for problem in found] == ["training.lr", "training.seq_length"]
