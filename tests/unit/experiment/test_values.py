"""Values are text from YAML and papermill: read where unambiguous, refused where not."""

import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from internlm_lib.errors import ConfigError
from internlm_lib.experiment.load import resolve
from internlm_lib.experiment.schema import Experiment
from internlm_lib.experiment.values import (
    parse_flag,
    parse_integer,
    parse_number,
    parse_setting,
    parse_text,
)

NOT_NUMBERS = [True, False, None, "yes", "abc", "", "1,5", [1], {"a": 1}]
NOT_FINITE = [math.nan, math.inf, -math.inf, "nan", "-inf", "1e400", 10**400]


def leaf_types(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type]]:
    """Dotted key → the plain type of its value, where it is a number, a flag or text."""
    for name, field in section.model_fields.items():
        found = _plain_types(field.annotation)
        for kind in found:
            if issubclass(kind, BaseModel):
                yield from leaf_types(kind, f"{prefix}{name}.")
            elif kind is not type(None):
                yield prefix + name, kind


def _plain_types(annotation: Any) -> list[type]:
    """Types of an optional or annotated type; nothing of a collection or a choice of words."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    if getattr(annotation, "__origin__", None) in (tuple, dict):
        return []
    return [kind for part in get_args(annotation) for kind in _plain_types(part)]


def keys_of(*kinds: type) -> list[str]:
    return [key for key, kind in leaf_types(Experiment) if kind in kinds]


def set_to(key: str, value: Any) -> Any:
    """What `key` of the tiny model's experiment is after it was set to `value`."""
    _, found = resolve(
        {"training": {"seq_length": 128}}, {key: value}, source="test", default_run_name="test"
    )
    for part in key.split("."):
        found = getattr(found, part)
    return found


def refusal(key: str, value: Any) -> str:
    """The only problem that is found when `key` is set to `value`."""
    with pytest.raises(ConfigError) as caught:
        set_to(key, value)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(
    ("value", "number"),
    [(3, 3.0), (0.5, 0.5), ("1e-5", 1e-5), ("2", 2.0), ("-1.5E3", -1500.0), ("0", 0.0)],
)
def test_a_number_is_read_from_a_number_or_its_spelling(value: Any, number: float) -> None:
    parsed = parse_number(value)
    assert parsed == number and type(parsed) is float


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
@pytest.mark.parametrize("parse", [parse_number, parse_integer])
def test_what_is_not_a_number_is_refused(parse: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="not a number; write one"):
        parse(value)


@pytest.mark.parametrize("value", NOT_FINITE, ids=lambda value: str(value)[:5])
@pytest.mark.parametrize("parse", [parse_number, parse_integer])
def test_what_is_not_finite_is_refused(parse: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        parse(value)


@pytest.mark.parametrize(
    ("value", "integer"),
    [
        (2, 2),
        (2.0, 2),
        ("2", 2),
        ("2.0", 2),
        ("1e3", 1000),
        ("-7", -7),
        ("9007199254740993", 9007199254740993),
        (9007199254740993, 9007199254740993),
    ],
)
def test_an_integer_is_read_exactly(value: Any, integer: int) -> None:
    """The long one is the first integer that a float cannot hold."""
    parsed = parse_integer(value)
    assert parsed == integer and type(parsed) is int


@pytest.mark.parametrize("value", [1.5, "1.5", "1e-3", -0.5])
def test_a_fraction_is_not_an_integer(value: Any) -> None:
    with pytest.raises(ValueError, match="not a whole number"):
        parse_integer(value)


@pytest.mark.parametrize("value", [True, "true", "True", "TRUE"])
def test_true_in_any_case_is_true(value: Any) -> None:
    assert parse_flag(value) is True


@pytest.mark.parametrize("value", [False, "false", "False", "FALSE"])
def test_false_in_any_case_is_false_though_the_text_is_truthy(value: Any) -> None:
    assert parse_flag(value) is False


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (False, "false"), (1800, "1800"), (1800.0, "1800"), (0.05, "0.05"),
     ("expandable_segments:True", "expandable_segments:True"), ("1e3", "1e3")],
)  # fmt: skip
def test_a_setting_is_text_as_an_environment_has_it(value: Any, text: str) -> None:
    assert parse_setting(value) == text
    assert set_to("parallel.environment", {"OMP_NUM_THREADS": 4}) == {"OMP_NUM_THREADS": "4"}


@pytest.mark.parametrize("value", [None, "", [1], {"a": 1}, math.nan], ids=repr)
def test_a_setting_is_one_value(value: Any) -> None:
    with pytest.raises(ValueError, match="not text|empty text|not a finite number"):
        parse_setting(value)


@pytest.mark.parametrize("value", ["yes", "no", "on", "1", "", 1, 0, 1.0, None, []], ids=repr)
def test_other_truth_values_are_not_flags(value: Any) -> None:
    with pytest.raises(ValueError, match="write true or false"):
        parse_flag(value)


@pytest.mark.parametrize(
    ("value", "advice"), [(3, "put it in quotes"), (None, "put it in quotes"), ("", "empty text")]
)
def test_text_is_neither_another_type_nor_empty(value: Any, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        parse_text(value)
    assert parse_text("3") == "3"


@pytest.mark.parametrize("value", [True, "yes", "abc", math.nan, math.inf, "nan"], ids=repr)
@pytest.mark.parametrize("key", keys_of(int, float))
def test_every_numeric_key_refuses_what_is_no_finite_number(key: str, value: Any) -> None:
    assert refusal(key, value).startswith(f"{key} = {value!r}: not a")


@pytest.mark.parametrize("key", keys_of(int))
def test_every_integer_key_refuses_a_fraction(key: str) -> None:
    assert refusal(key, 1.5) == (f"{key} = 1.5: not a whole number; write one without a fraction")


@pytest.mark.parametrize("key", keys_of(bool))
def test_every_flag_reads_the_words_and_nothing_else(key: str) -> None:
    assert set_to(key, "false") is False
    for value in ("yes", 1):
        problem = f"{key} = {value!r}: neither true nor false; write true or false"
        assert refusal(key, value) == problem


def test_a_flag_given_as_the_word_true_is_on() -> None:
    assert set_to("data.append_eod", "false") is False
    assert set_to("data.append_eod", "true") is True


@pytest.mark.parametrize("key", [key for key in keys_of(str) if key != "model.preset"])
def test_every_text_key_refuses_numbers_and_empty_text(key: str) -> None:
    assert refusal(key, 3) == f"{key} = 3: not text; put it in quotes"
    assert refusal(key, "").startswith(f"{key} = '': empty text")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("training.lr", "2e-4", 2e-4),
        ("training.train_iters", "2", 2),
        ("training.lr_decay_iters", "20", 20),
        ("training.save_interval", 5.0, 5),
        ("parallel.candidate.data_parallel_size", "2", 2),
        ("optimizer.clip_grad", "0", 0.0),
    ],
)
def test_text_that_spells_a_number_is_that_number(key: str, text: Any, value: float) -> None:
    found = set_to(key, text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "found", "allowed"),
    [
        ("training.train_iters", 0, "greater than 0"),
        ("training.train_iters", -1, "greater than 0"),
        ("training.seed", -1, "greater than or equal to 0"),
        ("training.lr", 0, "greater than 0"),
        ("training.lr", "-1e-5", "greater than 0"),
        ("training.min_lr", -1e-9, "greater than or equal to 0"),
        ("training.lr_warmup_fraction", 1.01, "less than or equal to 1"),
        ("training.lr_warmup_fraction", -0.01, "greater than or equal to 0"),
        ("training.lr_decay_iters", 0, "greater than 0"),
        ("training.auto_recompute_device_memory_mib", 0, "greater than 0"),
        ("training.save_interval", 0, "greater than 0"),
        ("training.eval_iters", -1, "greater than or equal to 0"),
        ("parallel.candidate.tensor_model_parallel_size", 0, "greater than 0"),
        ("parallel.candidate.zero_stage", 4, "less than or equal to 3"),
        ("parallel.candidate.zero_stage", -1, "greater than or equal to 0"),
        ("optimizer.adam_beta1", 1, "less than 1"),
        ("optimizer.adam_beta2", -0.1, "greater than or equal to 0"),
        ("optimizer.adam_eps", 0, "greater than 0"),
        ("optimizer.weight_decay", -0.1, "greater than or equal to 0"),
        ("optimizer.clip_grad", -1, "greater than or equal to 0"),
        ("model.layernorm_epsilon", 0, "greater than 0"),
        ("evaluation.num_fewshot", -1, "greater than or equal to 0"),
        ("evaluation.loss_tolerance", 0, "greater than 0"),
        ("training.precision", "fp8", "'fp32', 'bf16' or 'fp16'"),
        ("training.lr_warmup_iters", -1, "greater than or equal to 0"),
        ("optimizer.min_loss_scale", 0, "greater than 0"),
        ("training.lr_decay_style", "cosin", "'constant', 'linear' or 'cosine'"),
        ("training.recompute_granularity", "none", "'full' or 'selective'"),
        ("data.on_damage", "skip", "'stop' or 'count'"),
        ("parallel.device", "gpu", "'auto', 'cpu', 'cuda' or 'npu'"),
        ("parallel.candidate.engine", "torch", "'megatron' or 'deepspeed'"),
    ],
)
def test_a_value_out_of_range_is_refused_not_changed(key: str, found: Any, allowed: str) -> None:
    assert refusal(key, found) == f"{key} = {found!r}: must be {allowed}"


@pytest.mark.parametrize(
    ("key", "edge"),
    [
        ("training.train_iters", 1),
        ("training.seed", 0),
        ("training.min_lr", 0.0),
        ("training.lr_warmup_fraction", 0.0),
        ("training.lr_warmup_fraction", 1.0),
        ("training.eval_iters", 0),
        ("optimizer.adam_beta1", 0.0),
        ("optimizer.adam_beta2", 0.999999),
        ("optimizer.weight_decay", 0.0),
        ("optimizer.clip_grad", 0.0),
        ("evaluation.num_fewshot", 0),
    ],
)
def test_the_edge_of_a_range_is_kept_as_it_is(key: str, edge: float) -> None:
    assert set_to(key, edge) == edge


@pytest.mark.parametrize("split", ["1,0", "1,0,0,0", "a,b,c", "1, 0, 0", "-1,1,1", "100"])
def test_a_split_is_three_weights(split: str) -> None:
    assert refusal("data.split", split).startswith(f"data.split = {split!r}: ")


def test_a_batch_ramp_is_three_counts() -> None:
    key = "training.rampup_batch_size"
    assert set_to(key, ["2", 2.0, "1e3"]) == (2, 2, 1000)
    assert refusal(key, [2, 2, 0]) == f"{key}.2 = 0: must be greater than 0"
    assert refusal(key, [2, 2]).startswith(f"{key}")
    assert refusal(key, "2 2 100").startswith(f"{key} = '2 2 100': ")


def test_an_item_of_a_list_is_named_by_its_place() -> None:
    assert refusal("generation.prompts", ["Hi.", 3]) == (
        "generation.prompts.1 = 3: not text; put it in quotes"
    )
    assert refusal("evaluation.protocols", ["letter", "word"]) == (
        "evaluation.protocols.1 = 'word': must be 'cloze' or 'letter'"
    )
    assert refusal("evaluation.protocols", []).startswith("evaluation.protocols = []: ")
