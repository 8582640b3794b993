"""The params files: the predecessor's recipes, corrected where it erred, each value explained."""

import logging
import re
from pathlib import Path
from typing import Any

import papermill
import pytest
import yaml
from papermill.iorw import read_yaml_file

from internlm_lib.experiment.load import from_notebook, load_experiment, load_params
from internlm_lib.experiment.presets import PRESETS
from internlm_lib.experiment.schema import Experiment, Layout
from internlm_lib.generation.inference import inference_layout

REPOSITORY = Path(__file__).resolve().parents[3]
PARAMS = {path.stem: path for path in sorted((REPOSITORY / "params").glob("*.yaml"))}
NOTEBOOKS = {path.stem: path for path in sorted((REPOSITORY / "notebooks").glob("*.ipynb"))}

SEVEN, SIXTY_FIVE = "internlm_7b", "internlm_65b"
ACCURACY, PRETRAINED = "internlm_7b_accuracy", "internlm_7b_accuracy_pretrained"
BIG = (SEVEN, ACCURACY, PRETRAINED, SIXTY_FIVE)

each_params = pytest.mark.parametrize("params", PARAMS)
each_big = pytest.mark.parametrize("params", BIG)
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS)

DEFAULT = "Megatron's default"
"""Not given in the script, which left Megatron's default in force."""
ABSENT = "not given"
CORRECTED = "corrected"

# Source, key and value. A source that begins with `--` is a flag of the script.

SHAPE_7B = [
    ("--num-layers", "model.num_layers", 32),
    ("--hidden-size", "model.hidden_size", 4096),
    ("--ffn-hidden-size", "model.ffn_hidden_size", 11008),
    ("--num-attention-heads", "model.num_attention_heads", 32),
    ("--max-position-embeddings", "model.max_position_embeddings", 2048),
]

COMMON_7B = [
    ("--zero-stage", "parallel.candidate.zero_stage", 2),
    ("deepspeed", "parallel.candidate.engine", "deepspeed"),
    ("8 devices", "parallel.candidate.data_parallel_size", 8),
    ("--split", "data.split", "949,50,1"),
    ("--append-eod", "data.append_eod", True),
    ("--bf16", "training.precision", "bf16"),
    ("--seq-length", "training.seq_length", 2048),
    ("--micro-batch-size", "training.micro_batch_size", 2),
    ("--lr-decay-style", "training.lr_decay_style", "cosine"),
    ("--lr-warmup-fraction", "training.lr_warmup_fraction", 0.01),
    ("--use-flash-attn", "training.use_flash_attn", True),
    ("--use-fused-rmsnorm", "training.use_fused_rmsnorm", True),
    ("--use-fused-rotary-pos-emb", "training.use_fused_rotary_pos_emb", True),
    ("AscendSpeed had none", "training.use_fused_swiglu", True),
    ("--eval-interval", "training.eval_interval", 1000),
    ("--eval-iters", "training.eval_iters", 10),
    ("--weight-decay", "optimizer.weight_decay", 1e-2),
    (DEFAULT, "training.seed", 1234),
    (DEFAULT, "optimizer.adam_eps", 1e-8),
    (CORRECTED, "optimizer.clip_grad", 1.0),
    (CORRECTED, "model.layernorm_epsilon", 1e-6),
]

ACCURACY_RECIPE = [
    ("--global-batch-size", "training.global_batch_size", 64),
    ("--train-iters", "training.train_iters", 5000),
    ("--lr", "training.lr", 1e-6),
    ("--min-lr", "training.min_lr", 1e-6),
    ("--auto-recompute-device-size", "training.auto_recompute_device_memory_mib", 46080),
    ("--adam-beta1", "optimizer.adam_beta1", 0.9),
    ("--adam-beta2", "optimizer.adam_beta2", 0.95),
    (CORRECTED, "training.save_interval", None),
]

RECIPES = {
    # examples/intern/pretrain_internlm_7b_zero.sh
    SEVEN: [
        ("--global-batch-size", "training.global_batch_size", 256),
        ("--train-iters", "training.train_iters", 500000),
        ("--lr", "training.lr", 1.5e-4),
        ("--min-lr", "training.min_lr", 1e-5),
        ("--lr-decay-iters", "training.lr_decay_iters", 320000),
        ("--auto-recompute-device-size", "training.auto_recompute_device_memory_mib", 48128),
        (DEFAULT, "optimizer.adam_beta1", 0.9),
        (DEFAULT, "optimizer.adam_beta2", 0.999),
        ("--save-interval", "training.save_interval", 10000),
        *COMMON_7B,
    ],
    # its loss-verification variant, without and with the released weights
    ACCURACY: [*ACCURACY_RECIPE, *COMMON_7B],
    PRETRAINED: [*ACCURACY_RECIPE, *COMMON_7B],
    # examples/intern/pretrain_internlm_65b_ptd_32p.sh
    SIXTY_FIVE: [
        ("--tensor-model-parallel-size", "parallel.candidate.tensor_model_parallel_size", 8),
        ("--pipeline-model-parallel-size", "parallel.candidate.pipeline_model_parallel_size", 4),
        ("4 nodes of 8", "parallel.candidate.data_parallel_size", 1),
        ("--sequence-parallel", "parallel.candidate.sequence_parallel", True),
        (ABSENT, "parallel.candidate.use_distributed_optimizer", False),
        ("--split", "data.split", "949,50,1"),
        ("--append-eod", "data.append_eod", True),
        ("--bf16", "training.precision", "bf16"),
        ("--seq-length", "training.seq_length", 2048),
        ("--micro-batch-size", "training.micro_batch_size", 2),
        ("--global-batch-size", "training.global_batch_size", 128),
        ("--train-iters", "training.train_iters", 50000),
        ("--lr", "training.lr", 1e-4),
        ("--min-lr", "training.min_lr", 1e-5),
        ("--lr-decay-style", "training.lr_decay_style", "cosine"),
        ("--lr-decay-iters", "training.lr_decay_iters", 320000),
        ("--lr-warmup-fraction", "training.lr_warmup_fraction", 0.01),
        ("--use-flash-attn", "training.use_flash_attn", True),
        (ABSENT, "training.use_fused_rmsnorm", False),
        ("--use-fused-rotary-pos-emb", "training.use_fused_rotary_pos_emb", True),
        ("AscendSpeed had none", "training.use_fused_swiglu", True),
        ("--auto-recompute-device-size", "training.auto_recompute_device_memory_mib", 55296),
        ("--eval-interval", "training.eval_interval", 1000),
        ("--eval-iters", "training.eval_iters", 10),
        ("--save-interval", "training.save_interval", 10000),
        ("--adam-beta1", "optimizer.adam_beta1", 0.9),
        ("--adam-beta2", "optimizer.adam_beta2", 0.95),
        ("--adam-eps", "optimizer.adam_eps", 1e-8),
        ("--weight-decay", "optimizer.weight_decay", 1e-2),
        ("--clip-grad", "optimizer.clip_grad", 1.0),
        (DEFAULT, "training.seed", 1234),
        (CORRECTED, "model.layernorm_epsilon", 1e-6),
    ],
}

SHAPE_65B = [
    ("--num-layers", "model.num_layers", 80),
    ("--hidden-size", "model.hidden_size", 8192),
    ("--ffn-hidden-size", "model.ffn_hidden_size", 22016),
    ("--num-attention-heads", "model.num_attention_heads", 64),
    ("--max-position-embeddings", "model.max_position_embeddings", 2048),
]
SHAPES = {name: SHAPE_65B if name == SIXTY_FIVE else SHAPE_7B for name in BIG}

OWN_NAMES = ("run_name", "tracking.experiment")
"""Named after the file: nothing to explain."""


def read(params: str) -> Experiment:
    return load_experiment(PARAMS[params])[1]


def value_at(experiment: Experiment, key: str) -> Any:
    found: Any = experiment
    for part in key.split("."):
        found = getattr(found, part)
    return found


def rows(table: dict[str, list[tuple[str, str, Any]]]) -> pytest.MarkDecorator:
    """One test per file and row: (file, source, key, value)."""
    found = [(name, *row) for name, recipe in table.items() for row in recipe]
    ids = [f"{name}-{key}" for name, _, key, _ in found]
    return pytest.mark.parametrize(("params", "source", "key", "value"), found, ids=ids)


def explanations(path: Path) -> dict[str, str]:
    """Dotted key of every value → the comment behind it, with the comment lines that go on."""
    lines = path.read_text(encoding="utf-8").splitlines()
    document = yaml.compose("\n".join(lines))
    found: dict[str, str] = {}
    _explain(document, "", lines, found)
    return found


def _explain(node: yaml.Node, prefix: str, lines: list[str], found: dict[str, str]) -> None:
    assert isinstance(node, yaml.MappingNode)
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode):
            _explain(value, f"{prefix}{key.value}.", lines, found)
            continue
        end = value.end_mark
        comment = lines[end.line][end.column :].partition("#")[2]
        for line in lines[end.line + 1 :] if comment else []:
            if not line.strip().startswith("#"):
                break
            comment += line.strip().removeprefix("#")
        found[prefix + key.value] = comment.strip()


def test_there_are_the_files_that_the_kit_promises() -> None:
    assert set(PARAMS) == {"tiny", *BIG}


@each_params
def test_a_params_file_fits_the_schema_and_is_named_after_its_file(params: str) -> None:
    name, experiment = load_experiment(PARAMS[params])
    assert name == params
    assert "candidate" in experiment.roles


# papermill


def inject(notebook: Path, parameters: dict[str, Any]) -> str:
    """Source of the cell that `papermill -f` puts behind the parameters cell; nothing is run."""
    prepared = papermill.execute_notebook(notebook, None, parameters, prepare_only=True)
    cells = [c for c in prepared.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    return cells[0].source


def declared(notebook: Path) -> str:
    """Source of the parameters cell."""
    cells = papermill.execute_notebook(notebook, None, prepare_only=True).cells
    (cell,) = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    return cell.source


@each_notebook
@each_params
def test_papermill_takes_every_params_file_into_every_notebook_without_a_warning(
    params: str, notebook: str, caplog: pytest.LogCaptureFixture
) -> None:
    parameters = read_yaml_file(str(PARAMS[params]))
    with caplog.at_level(logging.WARNING, logger="papermill"):
        injected = inject(NOTEBOOKS[notebook], parameters)
    assert caplog.messages == []
    kernel: dict[str, Any] = {}
    exec(declared(NOTEBOOKS[notebook]), kernel)
    exec(injected, kernel)
    assert from_notebook(kernel) == load_experiment(PARAMS[params])


@each_notebook
def test_papermill_warns_of_a_key_that_the_notebook_does_not_declare(
    notebook: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The message whose absence the test above proves."""
    with caplog.at_level(logging.WARNING, logger="papermill"):
        inject(NOTEBOOKS[notebook], {"trainig": {}, "training": {}})
    assert caplog.messages == ["Passed unknown parameter: trainig"]


@each_notebook
def test_a_notebook_run_as_it_is_means_the_tiny_experiment(notebook: str, home: Path) -> None:
    kernel: dict[str, Any] = {}
    exec(declared(NOTEBOOKS[notebook]), kernel)
    assert from_notebook(kernel) == load_experiment(home / "params" / "tiny.yaml")


# Recipes


@rows(RECIPES)
def test_a_value_of_a_recipe_is_the_script_s_and_says_so(
    params: str, source: str, key: str, value: Any
) -> None:
    found = value_at(read(params), key)
    assert found == value and type(found) is type(value)
    comment = explanations(PARAMS[params])[key]
    named = re.search(rf"{re.escape(source)}(?![-\w])", comment)
    assert named, f"{key}: {comment!r} does not name {source}"


@rows(SHAPES)
def test_a_shape_is_the_script_s(params: str, source: str, key: str, value: Any) -> None:
    assert value_at(read(params), key) == value, source


@each_big
def test_a_recipe_leaves_no_value_of_its_training_to_the_kit_s_defaults(params: str) -> None:
    """But for what the script has no word for, or leaves to another key."""
    values = load_params(PARAMS[params])
    left = set(Experiment.model_fields["training"].annotation.model_fields) - set(
        values["training"]
    )
    # Of their kind another is chosen, or they are how a run is done, with the kit's own defaults.
    assert left <= {
        "recompute_granularity", "recompute_method", "recompute_num_layers",
        "lr_decay_iters", "lr_warmup_iters", "rampup_batch_size", "deterministic_mode",
        "keep_checkpoints", "async_save", "max_restarts", "hang_timeout_seconds",
        "bad_step_policy", "loss_spike_factor",
    }  # fmt: skip
    assert ("lr_decay_iters" in left) == (params in (ACCURACY, PRETRAINED))
    optimizer = Experiment.model_fields["optimizer"].annotation.model_fields
    of_fp16 = {"loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window",
               "hysteresis"}  # fmt: skip
    assert set(values["optimizer"]) == set(optimizer) - of_fp16


@each_big
def test_every_value_of_a_big_file_is_explained(params: str) -> None:
    found = explanations(PARAMS[params])
    assert len(found) > 30
    assert [key for key, why in found.items() if not why and key not in OWN_NAMES] == []
    values = load_params(PARAMS[params])
    assert values["run_name"] == params
    assert params.startswith(values["tracking"]["experiment"])


@each_big
def test_the_faults_of_the_scripts_are_corrected(params: str) -> None:
    experiment, why = read(params), explanations(PARAMS[params])
    assert experiment.model.layernorm_epsilon == 1e-6
    assert experiment.optimizer.clip_grad == 1.0
    assert experiment.optimizer.predecessor_decay is False
    assert experiment.data.handler == "alpaca_predecessor"
    assert experiment.training.recompute_granularity is None
    for key in ("model.layernorm_epsilon", "training.save_interval", "data.handler",
                "optimizer.predecessor_decay"):  # fmt: skip
        assert "corrected" in why[key], key


@pytest.mark.parametrize(
    ("params", "world_size", "micro_batches", "warmup", "decay"),
    [
        (SEVEN, 8, 16, 3200, 320000),
        (ACCURACY, 8, 4, 50, 5000),
        (PRETRAINED, 8, 4, 50, 5000),
        (SIXTY_FIVE, 32, 64, 3200, 320000),
    ],
)
def test_what_follows_from_a_recipe(
    params: str, world_size: int, micro_batches: int, warmup: int, decay: int
) -> None:
    """Accumulation steps: `gradient_accumulation_steps` 16 of the 7B script's ds_config.json."""
    experiment = read(params)
    training, layout = experiment.training, experiment.layout("candidate")
    assert layout.world_size == world_size
    assert training.num_micro_batches(layout) == micro_batches
    assert (training.warmup_iters, training.decay_iters) == (warmup, decay)


@pytest.mark.parametrize(
    ("params", "label"),
    [
        (SEVEN, "deepspeed TP1 PP1 DP8 ZeRO-2"),
        (SIXTY_FIVE, "megatron TP8 PP4 DP1 SP"),
    ],
)
def test_a_layout_is_called_by_how_it_splits(params: str, label: str) -> None:
    assert read(params).layout("candidate").label == label


def test_an_interleaved_layout_is_called_by_its_chunks_and_infers_without_them() -> None:
    layout = Layout(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=4, data_parallel_size=2,
    )  # fmt: skip
    assert layout.label == "megatron TP2 PP2 VPP4 DP2"
    assert (layout.num_chunks, layout.world_size) == (8, 8)
    assert inference_layout(layout).label == "megatron TP2 PP2 DP1"


@each_big
def test_a_big_file_has_the_shape_of_its_preset_and_no_second_training(params: str) -> None:
    """The second run is another machine's: `parallel.reference_run` names it there."""
    experiment = read(params)
    shape = experiment.model.model_dump(exclude={"preset", "weights", "direct_start"})
    assert shape == PRESETS[experiment.model.preset]
    assert experiment.roles == ("candidate",)
    assert (experiment.parallel.device, experiment.parallel.reference_run) == ("auto", None)
    assert experiment.evaluation.loss_tolerance == 0.02


def test_the_two_accuracy_files_differ_in_their_weights_and_name_alone() -> None:
    random, pretrained = load_params(PARAMS[ACCURACY]), load_params(PARAMS[PRETRAINED])
    assert (random["model"].pop("weights"), pretrained["model"].pop("weights")) == (
        None,
        "models/internlm-7b",
    )
    assert (random.pop("run_name"), pretrained.pop("run_name")) == (ACCURACY, PRETRAINED)
    assert random == pretrained


def test_tiny_compares_both_engines_on_two_processes_each() -> None:
    experiment = read("tiny")
    assert experiment.roles == ("reference", "candidate")
    assert experiment.layout("reference") == Layout(
        engine="deepspeed", zero_stage=2, data_parallel_size=2
    )
    assert experiment.layout("candidate") == Layout(
        engine="megatron", tensor_model_parallel_size=2, sequence_parallel=True
    )
    assert [experiment.layout(role).world_size for role in experiment.roles] == [2, 2]
    assert experiment.data.train_path is None and experiment.training.precision == "fp32"
