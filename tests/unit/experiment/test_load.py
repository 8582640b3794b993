"""From a params file, a notebook's parameters and overrides to one checked experiment."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from internlm_lib.errors import ConfigError, InputError
from internlm_lib.experiment.load import (
    NOTEBOOK_PARAMETERS,
    from_notebook,
    load_experiment,
    load_params,
    parse_assignments,
    resolve,
    save_experiment,
)
from internlm_lib.experiment.presets import PRESETS
from internlm_lib.experiment.schema import SECTIONS, Experiment, Layout, ModelSection
from internlm_lib.model.arithmetic import parameter_count

TINY = {"training": {"seq_length": 128, "global_batch_size": 8}}


def build(values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Experiment:
    return resolve(values, overrides or {}, source="test", default_run_name="test")[1]


def problems(values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(values, overrides)
    return caught.value.problems


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# Overrides


def test_an_override_changes_one_key_and_nothing_beside_it() -> None:
    plain, changed = build(TINY), build(TINY, {"training.lr": 2e-3})
    assert changed.training.lr == 2e-3 != plain.training.lr
    same = changed.model_copy(update={"training": plain.training})
    assert same == plain
    assert changed.training.seq_length == 128


def test_an_override_of_a_preset_s_key_leaves_the_rest_of_the_shape() -> None:
    model = build(TINY, {"model.num_layers": 6}).model
    assert model.model_dump(exclude={"weights", "preset", "direct_start"}) == {
        **PRESETS["internlm-tiny"],
        "num_layers": 6,
    }


def test_an_override_of_the_preset_keeps_the_keys_that_the_file_gives() -> None:
    values = {"model": {"preset": "internlm-tiny", "num_layers": 2}}
    model = build(values, {"model.preset": "internlm-7b"}).model
    assert (model.num_layers, model.hidden_size) == (2, 4096)


def test_an_override_reaches_into_a_layout() -> None:
    key = "parallel.candidate.tensor_model_parallel_size"
    values = {**TINY, "parallel": {"candidate": {"data_parallel_size": 2}}}
    assert build(values, {key: 4}).parallel.candidate == Layout(
        tensor_model_parallel_size=4, data_parallel_size=2
    )


def test_overrides_create_a_reference_that_the_file_does_not_have() -> None:
    assert build(TINY).roles == ("candidate",)
    overrides = {"parallel.reference.engine": "deepspeed", "parallel.reference.zero_stage": 3}
    experiment = build({**TINY, "parallel": {"reference": None}}, overrides)
    assert experiment.roles == ("reference", "candidate")
    assert experiment.layout("reference") == Layout(engine="deepspeed", zero_stage=3)


def test_a_null_override_takes_a_reference_away(repository: Path) -> None:
    tiny = repository / "params" / "tiny.yaml"
    assert load_experiment(tiny)[1].roles == ("reference", "candidate")
    _, experiment = load_experiment(tiny, {"parallel.reference": None})
    assert experiment.parallel.reference is None and experiment.roles == ("candidate",)
    with pytest.raises(KeyError):
        experiment.layout("reference")


def test_a_null_override_of_a_section_or_an_optional_key_gives_its_defaults() -> None:
    values = {**TINY, "optimizer": {"clip_grad": 0.5}}
    assert build(values, {"optimizer": None}).optimizer.clip_grad == 1.0
    values = {"training": {**TINY["training"], "save_interval": 5}}
    assert build(values, {"training.save_interval": None}).training.save_interval is None


def test_a_null_for_a_key_that_needs_a_value_is_refused() -> None:
    assert problems(TINY, {"training.train_iters": None})[0].startswith(
        "training.train_iters = None: not a number"
    )


def test_the_command_line_wins_over_the_file_s_overrides_and_these_over_its_sections() -> None:
    values = {
        "training": {**TINY["training"], "lr": 1e-3, "min_lr": 1e-5, "train_iters": 9},
        "overrides": {"training.lr": 2e-3, "training.min_lr": 2e-5},
    }
    training = build(values, {"training.lr": 3e-3}).training
    assert (training.lr, training.min_lr, training.train_iters) == (3e-3, 2e-5, 9)


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        ({"overrides": ["training.lr"]}, {}, "overrides = ['training.lr']: expected a mapping"),
        ({"training": {"lr": 1e-3}}, {"training.lr.x": 1}, "training.lr is not a section"),
        ({"parallel": {"device": "cpu"}}, {"parallel.device.x.y": 1}, "parallel.device is not a"),
        ({}, {"training.lrr": 1}, "training.lrr: unknown key; did you mean lr?"),
        ({}, {"model.preset.x": 1}, "model.preset = {'x': 1}: allowed are internlm-7b"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(
    values: dict[str, Any], overrides: dict[str, Any], message: str
) -> None:
    shape = {"training.seq_length": 128}
    assert message in "\n".join(problems(values, {**shape, **overrides}))


@pytest.mark.parametrize(
    ("assignment", "overrides"),
    [
        ("training.lr=1e-5", {"training.lr": "1e-5"}),
        ("training.train_iters=3", {"training.train_iters": 3}),
        ("parallel.reference=null", {"parallel.reference": None}),
        ("data.append_eod=false", {"data.append_eod": False}),
        ("evaluation.protocols=[letter]", {"evaluation.protocols": ["letter"]}),
        ("tracking.uri=sqlite:///a.db?x=1", {"tracking.uri": "sqlite:///a.db?x=1"}),
    ],
)
def test_an_assignment_is_read_as_yaml(assignment: str, overrides: dict[str, Any]) -> None:
    assert parse_assignments([assignment]) == overrides
    build({"training": {"seq_length": 128}}, overrides)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("training.lr", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("evaluation.protocols=[letter", "not valid YAML"),
    ],
)
def test_an_assignment_that_cannot_be_read_is_quoted(assignment: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_assignments(["training.seed=1", assignment])
    assert f"--set {assignment}: " in str(caught.value)


# What is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainig": {}}, "trainig: unknown key; did you mean training?"),
        ({"lr": 1e-3}, "lr: unknown key; it belongs at training.lr"),
        (
            {"zebra": 1},
            "zebra: unknown key; allowed are model, data, parallel, training, optimizer, "
            "generation, evaluation, tracking",
        ),
        (
            {"optimizer": {"clip_gradd": 1}},
            "optimizer.clip_gradd: unknown key; did you mean clip_grad?",
        ),
        (
            {"optimizer": {"lr": 1}},
            "optimizer.lr: unknown key; it belongs at training.lr",
        ),
        (
            {"parallel": {"candidate": {"tensor_model_paralel_size": 2}}},
            "parallel.candidate.tensor_model_paralel_size: unknown key; "
            "did you mean tensor_model_parallel_size?",
        ),
        (
            {"parallel": {"reference": {"zero_stag": 2}}},
            "parallel.reference.zero_stag: unknown key; did you mean zero_stage?",
        ),
        (
            {"parallel": {"zero_stage": 2}},
            "parallel.zero_stage: unknown key; it belongs at parallel.candidate.zero_stage or "
            "parallel.reference.zero_stage",
        ),
        (
            {"tracking": {"qqq": 1}},
            "tracking.qqq: unknown key; allowed are uri, experiment, device_sample_seconds",
        ),
    ],
)
def test_an_unknown_key_is_told_with_where_it_belongs_or_what_is_near(
    values: dict[str, Any], message: str
) -> None:
    assert problems({**TINY, **values}) == [message]


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("value", [3, "all", [1]], ids=repr)
def test_a_section_of_another_type_is_refused(section: str, value: Any) -> None:
    assert problems({**TINY, section: value}) == [
        f"{section} = {value!r}: expected a mapping of keys to values"
    ]


@pytest.mark.parametrize("value", [3, None, []], ids=repr)
def test_a_candidate_of_another_type_is_refused(value: Any) -> None:
    assert problems({**TINY, "parallel": {"candidate": value}}) == [
        f"parallel.candidate = {value!r}: expected a mapping of keys to values"
    ]


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("internlm-7", "did you mean internlm-7b?"),
        (None, "allowed are internlm-7b, internlm-20b, internlm-65b, internlm-tiny"),
        (["internlm-7b"], "allowed are internlm-7b"),
        (7, "allowed are internlm-7b"),
    ],
)
def test_an_unknown_preset_is_refused_with_those_there_are(preset: Any, message: str) -> None:
    (problem,) = problems({**TINY, "model": {"preset": preset}})
    assert problem.startswith(f"model.preset = {preset!r}: ") and message in problem


def test_a_key_that_is_not_text_is_refused() -> None:
    (problem,) = problems({"training": {"seq_length": 128, 7: 1}})
    assert problem.startswith("training.7 ")


def test_all_problems_of_a_file_are_listed_at_once(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        run_name: a/b
        modle: {}
        model: {preset: internlm-tiny, num_layers: 4.5}
        data: {append_eod: "yes", split: "1,0"}
        parallel: {candidate: {zero_stage: 4, tensor_paralel: 2}}
        training: {seq_length: 1025, lr: .nan, micro_batch_size: 3, global_batch_size: 8}
        optimizer: 0.9
        generation: {prompts: [Hello., 7]}
        tracking: {experiment: ""}
        """,
    )
    with pytest.raises(ConfigError) as caught:
        load_experiment(path, {"evaluation.loss_tolerance": -1})
    expected = [
        "run_name = 'a/b': letters",
        "modle: unknown key; did you mean model?",
        "model.num_layers = 4.5: not a whole number",
        "data.append_eod = 'yes': neither true nor false",
        "data.split = '1,0': ",
        "parallel.candidate.zero_stage = 4: must be less than or equal to 3",
        "parallel.candidate.tensor_paralel: unknown key; did you mean tensor_model_parallel_size?",
        "training.lr = nan: not a finite number",
        "optimizer = 0.9: expected a mapping",
        "generation.prompts.1 = 7: not text",
        "evaluation.loss_tolerance = -1: must be greater than 0",
        "tracking.experiment = '': empty text",
        "training.seq_length = 1025 exceeds",
    ]
    for start in expected:
        assert sum(problem.startswith(start) for problem in caught.value.problems) == 1, start
    assert len(caught.value.problems) == len(expected)
    lines = str(caught.value).split("\n  - ")
    assert lines == [f"{path}: {len(expected)} problems", *caught.value.problems]


def test_a_problem_stays_when_the_same_parameters_are_read_again() -> None:
    """As when a notebook's cell is run twice: reading must not touch the kernel's variables."""
    values = {
        **TINY,
        "parallel": {"candidate": {"tensor_model_parallel_size": "abc"}},
        "generation": {"prompts": ["Hello.", 7]},
        "overrides": {"optimizer": {"clip_gradd": 1}},
    }
    before = copy.deepcopy(values)
    first = problems(values)
    assert values == before
    assert problems(values) == first and len(first) == 3


def test_what_is_read_is_left_as_it_was() -> None:
    values = {**copy.deepcopy(TINY), "parallel": {"candidate": {"data_parallel_size": 1}}}
    before = copy.deepcopy(values)
    overrides = {"parallel.candidate.data_parallel_size": 2, "training.lr": 1e-3}
    assert build(values, overrides).parallel.candidate.data_parallel_size == 2
    assert values == before


# Files


def test_a_missing_file_is_told_with_those_there_are(home: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_experiment(Path("params/tinny.yaml"))
    message = str(caught.value)
    assert message.startswith(f"{Path('params/tinny.yaml')}: no such params file")
    assert all(path.name in message for path in (home / "params").glob("*.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"training: [1", "not valid YAML"),
        (b"a: b: c", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"", "expected a mapping of sections"),
        (b"- training", "expected a mapping of sections"),
        (b"training", "expected a mapping of sections"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_params(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_yaml_s_bare_exponent_and_quoted_words_are_read_for_what_they_mean(tmp_path: Path) -> None:
    """YAML 1.1 reads `1e-5` as text, as papermill does with everything after `-p`."""
    text = """
    data: {append_eod: "false"}
    training: {seq_length: "128", lr: 1e-5, train_iters: "2", use_flash_attn: "true"}
    """
    assert yaml.safe_load(text)["training"]["lr"] == "1e-5"
    _, experiment = load_experiment(written(tmp_path, text))
    training = experiment.training
    assert (training.seq_length, training.lr, training.train_iters) == (128, 1e-5, 2)
    assert training.use_flash_attn is True and experiment.data.append_eod is False


def test_a_file_without_a_run_name_is_named_after_itself(tmp_path: Path) -> None:
    text = "training: {seq_length: 128}"
    assert load_experiment(written(tmp_path, text))[0] == "mine"
    assert load_experiment(written(tmp_path, text + "\nrun_name: null"))[0] == "mine"
    assert load_experiment(written(tmp_path, text + "\nrun_name: other"))[0] == "other"
    assert load_experiment(written(tmp_path, text), {"run_name": "third"})[0] == "third"


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "", 0, 7, False, ["a"], "ü", "x" * 101])
def test_a_run_name_that_cannot_be_a_folder_is_refused(name: Any) -> None:
    """Also where it is empty or 0, which must not quietly become the default."""
    (problem,) = problems({**TINY, "run_name": name})
    assert problem.startswith(f"run_name = {name!r}: letters, digits")
    for values in ({"run_name": name}, {**TINY, "run_name": name}):
        with pytest.raises(ConfigError):
            from_notebook(values)


@pytest.mark.parametrize("params", ["tiny", "internlm_7b", "internlm_65b"])
def test_a_saved_experiment_is_read_back_equal(
    repository: Path, tmp_path: Path, params: str
) -> None:
    overrides = {
        "generation.prompts": ["你好 \N{SLIGHTLY SMILING FACE}", "two\nlines: #1", "1e-5", "null"],
        "optimizer.adam_eps": 1e-12,
        "training.lr": 0.1 + 0.2,
        "training.seed": 2**53 + 1,
        "tracking.uri": "sqlite:///a: b.db",
    }
    name, experiment = load_experiment(repository / "params" / f"{params}.yaml", overrides)
    saved = save_experiment(tmp_path / "run" / "experiment.yaml", name, experiment)
    assert load_experiment(saved) == (name, experiment)
    assert experiment.training.seed == 2**53 + 1
    assert "你好" in saved.read_text(encoding="utf-8")


def test_a_saved_run_name_that_looks_like_a_number_stays_a_name(tmp_path: Path) -> None:
    saved = save_experiment(tmp_path / "experiment.yaml", "2024", build(TINY))
    assert load_experiment(saved)[0] == "2024"


# Notebook parameters

EMPTY = {"run_name": "tiny", **{name: {} for name in (*SECTIONS, "overrides")}}
"""What the parameters cell of every notebook declares."""


def test_a_notebook_s_own_parameters_mean_the_tiny_experiment(home: Path) -> None:
    assert set(EMPTY) == set(NOTEBOOK_PARAMETERS)
    tiny = load_experiment(home / "params" / "tiny.yaml")
    assert from_notebook(EMPTY) == tiny
    assert from_notebook({}) == tiny


def test_names_of_a_notebook_that_are_no_parameters_are_ignored(home: Path) -> None:
    crowd = {"Path": Path, "stage": object(), "lr": 3, "_": math, **EMPTY}
    assert from_notebook(crowd) == from_notebook(EMPTY)


def test_a_run_name_and_overrides_alone_change_the_tiny_experiment(home: Path) -> None:
    overrides = {"training.lr": "1e-3", "model.num_layers": 2, "parallel.reference": None}
    name, experiment = from_notebook({**EMPTY, "run_name": "second", "overrides": overrides})
    assert name == "second"
    expected = load_experiment(home / "params" / "tiny.yaml", overrides)[1]
    assert experiment == expected
    assert (experiment.training.lr, experiment.model.num_layers) == (1e-3, 2)
    assert experiment.training.train_iters == from_notebook(EMPTY)[1].training.train_iters


def test_with_one_section_given_nothing_comes_from_the_tiny_file(home: Path) -> None:
    experiment = from_notebook({**EMPTY, "training": {"seq_length": 64}})[1]
    assert experiment == build({"training": {"seq_length": 64}})
    assert experiment.roles == ("candidate",)


def test_a_notebook_s_section_of_another_type_is_not_taken_for_empty(home: Path) -> None:
    with pytest.raises(ConfigError, match="notebook parameters: 1 problem\n.*model = 0: expected"):
        from_notebook({**EMPTY, "model": 0})


def test_a_notebook_s_mistakes_are_listed_like_a_file_s(home: Path) -> None:
    overrides = {"training.lrr": 1, "optimizer.adam_beta1": 2}
    with pytest.raises(ConfigError) as caught:
        from_notebook({**EMPTY, "overrides": overrides})
    assert len(caught.value.problems) == 2
    assert str(caught.value).startswith("notebook parameters: 2 problems")


# Presets

SHAPES = {
    "internlm-7b": dict(num_layers=32, hidden_size=4096, ffn_hidden_size=11008,
                        num_attention_heads=32, max_position_embeddings=2048, attention_bias=True),
    "internlm-20b": dict(num_layers=60, hidden_size=5120, ffn_hidden_size=13824,
                         num_attention_heads=40, max_position_embeddings=4096,
                         attention_bias=False),
    "internlm-65b": dict(num_layers=80, hidden_size=8192, ffn_hidden_size=22016,
                         num_attention_heads=64, max_position_embeddings=2048,
                         attention_bias=True),
}  # fmt: skip
"""7B: config.json of internlm-7b. 20B: config.json of internlm-20b. 65B, never released:
AscendSpeed, examples/intern/pretrain_internlm_65b_ptd_32p.sh."""

COUNTS = {
    "internlm-7b": 7_321_948_160,
    "internlm-20b": 20_088_714_240,
    "internlm-65b": 66_454_298_624,
}

CHECKPOINT_BYTES_7B = 14_643_904_512
"""`metadata.total_size` of internlm-7b's pytorch_model.bin.index.json: all weights in fp16, and in
each of the 32 layers the 64 rotary frequencies in fp32, which are no parameters."""


def preset(name: str) -> ModelSection:
    return ModelSection.model_validate({"preset": name, **PRESETS[name]})


def elements_of_the_hugging_face_tensors(model: ModelSection) -> int:
    """Counted tensor by tensor, as the released checkpoint lists them."""
    h, f, vocab = model.hidden_size, model.ffn_hidden_size, model.vocab_size
    attention = 4 * [(h, h)] + (4 * [(h,)] if model.attention_bias else [])
    layer = [*attention, (f, h), (f, h), (h, f), (h,), (h,)]
    tensors = [(vocab, h), *(layer * model.num_layers), (h,), (vocab, h)]
    return sum(math.prod(shape) for shape in tensors)


def test_there_are_the_released_sizes_and_a_tiny_one() -> None:
    assert set(PRESETS) == {*SHAPES, "internlm-tiny"}


@pytest.mark.parametrize("name", SHAPES)
def test_a_preset_has_the_shape_of_the_released_model(name: str) -> None:
    model = preset(name)
    assert model.model_dump(include=set(SHAPES[name])) == SHAPES[name]
    assert (model.head_dim, model.vocab_size, model.rotary_base) == (128, 103168, 10000)
    assert (model.layernorm_epsilon, model.init_method_std) == (1e-6, 0.02)
    assert model.weights is None


@pytest.mark.parametrize("name", SHAPES)
def test_the_ffn_size_follows_from_the_hidden_size(name: str) -> None:
    """InternEvo's rule: 8/3 of the hidden size, rounded up to a multiple of 256."""
    model = preset(name)
    assert model.ffn_hidden_size == math.ceil(int(model.hidden_size * 8 / 3) / 256) * 256


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_has_as_many_parameters_as_its_tensors_have_elements(name: str) -> None:
    model = preset(name)
    assert parameter_count(model) == COUNTS[name] == elements_of_the_hugging_face_tensors(model)


def test_the_7b_parameters_fill_the_published_checkpoint_to_the_byte() -> None:
    rotary_buffers = 32 * 64 * 4
    assert 2 * parameter_count(preset("internlm-7b")) + rotary_buffers == CHECKPOINT_BYTES_7B


def test_a_model_without_a_preset_is_the_tiny_one() -> None:
    assert build(TINY).model == preset("internlm-tiny")
