"""Every format and layout holds the same bits, and those that others write and expect."""

import argparse
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from internlm_lib.data.tokenizer import train_tokenizer
from internlm_lib.errors import InputError
from internlm_lib.experiment.presets import PRESETS
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.weights import huggingface
from internlm_lib.weights.convert import Order, plan_conversion
from internlm_lib.weights.convert import convert as carry_out
from internlm_lib.weights.formats import FORMATS, open_checkpoint
from internlm_lib.weights.huggingface import transformers_logits
from internlm_lib.weights.initial import write_random
from internlm_lib.weights.layout import Piece, huggingface_shapes
from internlm_lib.weights.model_config import read_model
from internlm_lib.weights.plan import Target, partition
from internlm_lib.weights.verify import verify
from tests.unit.weights.conftest import (
    HEADS,
    HIDDEN,
    LAYERS,
    VOCAB,
    Tensors,
    assert_covered,
    assert_equal,
    converted,
    drawn,
    read_all,
    small,
    write_config,
    write_source,
)

PARTITIONS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tensor_parallel": 2, "merge_mlp": True},
    "TP4 PP2": {"tensor_parallel": 4, "pipeline_parallel": 2},
    "PP4": {"pipeline_parallel": 4, "merge_mlp": True},
    "TP2 layers 1,3": {"tensor_parallel": 2, "num_layer_list": (1, 3)},
}
LAYOUTS: dict[str, Order] = {
    "huggingface": Order("huggingface"),
    "megatron": Order("megatron"),
    **{f"classic {name}": Order("classic", **order) for name, order in PARTITIONS.items()},
    **{f"deepspeed {name}": Order("deepspeed", **order) for name, order in PARTITIONS.items()},
}
LOGIT_TOLERANCE = 1e-5
PROMPT = torch.tensor([[1, 7, 31, 4, 49, 0, 12, 2]])

Rank = dict[str, Any]


@pytest.fixture(scope="module")
def layouts(
    tmp_path_factory: pytest.TempPathFactory, source16: Path
) -> dict[str, tuple[Path, str]]:
    """The fp16 source in every layout, and the `tensor_hash` of each."""
    root = tmp_path_factory.mktemp("layouts")
    made = {}
    for name, order in LAYOUTS.items():
        account = carry_out(plan_conversion(source16, root / name, order))
        made[name] = (root / name, account["tensor_hash"])
    return made


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_reads_like_its_source_bit_by_bit(
    name: str, layouts: dict[str, tuple[Path, str]], weights16: Tensors
) -> None:
    assert_equal(read_all(layouts[name][0]), weights16)


@pytest.mark.parametrize("of", LAYOUTS)
def test_every_layout_gives_every_other_file_by_file(
    of: str, layouts: dict[str, tuple[Path, str]], weights16: Tensors, tmp_path: Path
) -> None:
    origin, expected_hash = layouts[of]
    for name, order in LAYOUTS.items():
        account = carry_out(plan_conversion(origin, tmp_path / name, order))
        assert account["tensor_hash"] == expected_hash == layouts["huggingface"][1]
        assert _weights(tmp_path / name) == _weights(layouts[name][0]), name
    assert_equal(load_file(tmp_path / "huggingface" / "model.safetensors"), weights16)
    assert_equal(read_all(tmp_path / "classic TP4 PP2"), weights16)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_says_what_it_is(name: str, layouts: dict[str, tuple[Path, str]]) -> None:
    order = LAYOUTS[name]
    with open_checkpoint(layouts[name][0]) as weights:
        assert weights.format_name == order.to
        assert weights.dtype == "float16"
        model = weights.model
        label = weights.layout
    assert model.model_copy(update={"preset": "small"}) == small()
    if FORMATS[order.to].layouts:
        stages = len(order.num_layer_list) or order.pipeline_parallel
        assert label.startswith(f"TP{order.tensor_parallel} PP{stages}")
        assert ("layers 1, 3" in label) == bool(order.num_layer_list)


def test_parts_of_a_tensor_read_like_parts_of_the_whole(
    layouts: dict[str, tuple[Path, str]], weights16: Tensors
) -> None:
    places = (slice(0, 5), slice(3, 14), slice(9, 16), slice(4, 4))
    for path, _ in layouts.values():
        with open_checkpoint(path) as weights:
            for rows in places:
                for columns in places:
                    for name, tensor in weights16.items():
                        expected = tensor[rows, columns] if tensor.dim() > 1 else tensor[rows]
                        assert torch.equal(weights.read(name, rows, columns), expected)


def test_large_tensors_go_through_in_blocks(
    source16: Path, weights16: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internlm_lib.weights.checkpoint.BLOCK_BYTES", 7 * 2 * HIDDEN)
    target = tmp_path / "classic"
    converted(source16, target, "classic", tensor_parallel=4, pipeline_parallel=2)
    assert_equal(read_all(target), weights16)
    converted(target, tmp_path / "back", "huggingface")
    assert_equal(load_file(tmp_path / "back" / "model.safetensors"), weights16)


# --- classic, against a converter of its own -----------------------------------------------------


def reference_rank(
    w: Tensors, tp: int, stage: int, tp_size: int, layers: tuple[int, ...], *,
    merge_mlp: bool = False, bias: bool = True, multiple: int = 1,
) -> Rank:  # fmt: skip
    """A rank's `language_model` by AscendSpeed's rules, with torch's own cat, view and permute."""

    def rows(tensor: Tensor) -> Tensor:
        return tensor.chunk(tp_size, dim=0)[tp].clone()

    def columns(tensor: Tensor) -> Tensor:
        return tensor.chunk(tp_size, dim=1)[tp].clone()

    def padded(tensor: Tensor) -> Tensor:
        added = -len(tensor) % (multiple * tp_size)
        return torch.cat([tensor, tensor[-added:]]) if added else tensor

    def interleaved(parts: list[Tensor]) -> Tensor:
        qkv = torch.cat([rows(part) for part in parts])
        heads, dim = HEADS // tp_size, HIDDEN // HEADS
        by_head = qkv.view(3, heads, dim, -1).permute(1, 0, 2, 3)
        return by_head.reshape(qkv.shape).contiguous()

    encoder = {}
    for local in range(layers[stage]):
        theirs, ours = f"model.layers.{sum(layers[:stage]) + local}", f"layers.{local}"
        for kind in ("weight", "bias") if bias else ("weight",):
            qkv = [w[f"{theirs}.self_attn.{n}_proj.{kind}"] for n in "qkv"]
            encoder[f"{ours}.self_attention.query_key_value.{kind}"] = interleaved(qkv)
        out = f"{theirs}.self_attn.o_proj"
        encoder[f"{ours}.self_attention.dense.weight"] = columns(w[f"{out}.weight"])
        if bias:
            encoder[f"{ours}.self_attention.dense.bias"] = w[f"{out}.bias"].clone()
        gate, up = (rows(w[f"{theirs}.mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        if merge_mlp:
            encoder[f"{ours}.mlp.proj.weight"] = torch.cat([gate, up])
        else:
            encoder[f"{ours}.mlp.gate_proj.weight"] = gate
            encoder[f"{ours}.mlp.dense_h_to_4h.weight"] = up
        encoder[f"{ours}.mlp.dense_4h_to_h.weight"] = columns(w[f"{theirs}.mlp.down_proj.weight"])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            encoder[f"{ours}.{norm}.weight"] = w[f"{theirs}.{norm}.weight"].clone()
    model: Rank = {"encoder": encoder}
    if stage == 0:
        weight = rows(padded(w["model.embed_tokens.weight"]))
        model["embedding"] = {"word_embeddings": {"weight": weight}}
    if stage == len(layers) - 1:
        encoder["final_layernorm.weight"] = w["model.norm.weight"].clone()
        model["output_layer"] = {"weight": rows(padded(w["lm_head.weight"]))}
    return model


def reference_ranks(
    w: Tensors, tp_size: int, layers: tuple[int, ...], **rules: Any
) -> Iterator[tuple[int, int, Rank]]:
    for stage in range(len(layers)):
        for tp in range(tp_size):
            yield stage, tp, reference_rank(w, tp, stage, tp_size, layers, **rules)


def reference_classic(folder: Path, w: Tensors, tp_size: int, layers: tuple[int, ...],
                      **rules: Any) -> Path:  # fmt: skip
    for stage, tp, rank in reference_ranks(w, tp_size, layers, **rules):
        name = f"mp_rank_{tp:02d}" + (f"_{stage:03d}" if len(layers) > 1 else "")
        save_rank(folder / "release" / name / "model_optim_rng.pt", {"language_model": rank})
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    return folder


def save_rank(file: Path, model: Rank, **beside: Any) -> None:
    file.parent.mkdir(parents=True)
    torch.save({"checkpoint_version": 3.0, "model": model, **beside}, file)


GRIDS = [(1, (4,)), (2, (4,)), (4, (2, 2)), (1, (1, 1, 1, 1)), (2, (1, 3))]


@pytest.mark.parametrize("merge_mlp", [False, True])
@pytest.mark.parametrize("tp_size, layers", GRIDS)
def test_a_classic_checkpoint_of_the_predecessor_reads_like_its_source(
    tp_size: int, layers: tuple[int, ...], merge_mlp: bool, weights16: Tensors, tmp_path: Path
) -> None:
    folder = reference_classic(tmp_path, weights16, tp_size, layers, merge_mlp=merge_mlp)
    assert_equal(read_all(folder, small()), weights16)
    assert_equal(read_all(folder / "release", small()), weights16)


@pytest.mark.parametrize("merge_mlp", [False, True])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("tp_size, layers", GRIDS)
def test_a_classic_checkpoint_is_the_predecessors_tensor_by_tensor(
    tp_size: int, layers: tuple[int, ...], multiple: int, merge_mlp: bool, source16: Path,
    weights16: Tensors, tmp_path: Path,
) -> None:  # fmt: skip
    rules = {"merge_mlp": merge_mlp, "multiple": multiple}
    theirs = reference_classic(tmp_path / "theirs", weights16, tp_size, layers, **rules)
    converted(
        source16, tmp_path / "ours", "classic", tensor_parallel=tp_size, num_layer_list=layers,
        merge_mlp=merge_mlp, make_vocab_size_divisible_by=multiple,
    )  # fmt: skip
    files = sorted(p.relative_to(theirs) for p in theirs.rglob("*") if p.is_file())
    assert len(files) == tp_size * len(layers) + 1
    for file in files:
        if file.suffix == ".pt":
            assert_same_tree(_load(tmp_path / "ours" / file), _load(theirs / file))
        else:
            assert (tmp_path / "ours" / file).read_bytes() == (theirs / file).read_bytes()


def test_padding_longer_than_the_vocabulary_is_never_left_empty(
    source16: Path, tmp_path: Path
) -> None:
    order = Order("classic", tensor_parallel=4, make_vocab_size_divisible_by=64)
    try:
        plan = plan_conversion(source16, tmp_path / "wide", order)
    except InputError as error:
        assert "make_vocab_size_divisible_by" in str(error)
        return
    carry_out(plan)
    for rank in range(4):
        language_model = _load(
            tmp_path / "wide" / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        )["model"]["language_model"]
        rows = language_model["embedding"]["word_embeddings"]["weight"]
        assert rows.shape == (64, HIDDEN)
        assert rows.any(dim=1).all()


def test_names_of_the_oldest_classic_checkpoints_are_understood(
    weights16: Tensors, tmp_path: Path
) -> None:
    for stage, tp, rank in reference_ranks(weights16, 2, (2, 2)):
        flat = {
            "language_model." + name.replace("self_attention", "attention")
            .replace("dense_h_to_4h", "up_proj").replace("dense_4h_to_h", "down_proj"): tensor
            for name, tensor in rank["encoder"].items()
        }  # fmt: skip
        for local in range(2):
            name = f"language_model.layers.{local}.attention.rotary_emb.inv_freq"
            flat[name] = torch.ones(2, dtype=torch.float32)
        if stage == 0:
            flat["embedding.word_embeddings.weight"] = rank["embedding"]["word_embeddings"][
                "weight"
            ]
        else:
            flat["lm_head.lm_head.weight"] = rank["output_layer"]["weight"]
        save_rank(tmp_path / f"mp_rank_{tp:02d}_{stage:03d}" / "model_optim_rng.pt", flat)
    assert_equal(read_all(tmp_path, small()), weights16)


def training_state(tensor: Tensor) -> dict[str, Any]:
    """What Megatron-LM saves beside a rank's weights."""
    return {
        "args": argparse.Namespace(num_layers=4, params_dtype=torch.float16, lr=1e-5, data=["a"]),
        "iteration": 10,
        "optimizer": {
            "optimizer": {"state": {0: {"exp_avg": tensor.float()}}, "param_groups": [{"lr": 0.1}]},
            "fp32_from_fp16_params": [[tensor.float()]],
        },
        "opt_param_scheduler": {"max_lr": 1e-5, "num_steps": 10},
        "rng_state": [
            {
                "random_rng_state": random.Random(1).getstate(),
                "np_rng_state": numpy.random.RandomState(1).get_state(),
                "torch_rng_state": torch.get_rng_state(),
                "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
            }
        ],
    }


def test_an_iteration_of_a_training_is_read_past_all_that_lies_beside_the_weights(
    weights16: Tensors, tmp_path: Path
) -> None:
    for _, tp, rank in reference_ranks(weights16, 2, (4,)):
        file = tmp_path / "iter_0000010" / f"mp_rank_{tp:02d}" / "model_optim_rng.pt"
        norm = rank["encoder"]["final_layernorm.weight"]
        save_rank(file, {"language_model": rank}, **training_state(norm))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10\n")
    with open_checkpoint(tmp_path, small()) as weights:
        assert weights.layout == "TP2 PP1"
    assert_equal(read_all(tmp_path, small()), weights16)


def test_megatron_lms_gate_over_up_is_told_from_up_alone(
    weights16: Tensors, tmp_path: Path
) -> None:
    for _, tp, rank in reference_ranks(weights16, 2, (4,), merge_mlp=True):
        rank["encoder"] = {
            name.replace("mlp.proj", "mlp.dense_h_to_4h"): tensor
            for name, tensor in rank["encoder"].items()
        }
        save_rank(tmp_path / f"mp_rank_{tp:02d}" / "model_optim_rng.pt", {"language_model": rank})
    assert_equal(read_all(tmp_path, small()), weights16)


def test_gpt_models_names_in_rank_files_are_understood(weights16: Tensors, tmp_path: Path) -> None:
    for _, tp, rank in reference_ranks(weights16, 2, (4,), merge_mlp=True):
        model = {
            "decoder." + name.replace("query_key_value", "linear_qkv")
            .replace("self_attention.dense", "self_attention.linear_proj")
            .replace("mlp.proj", "mlp.linear_fc1").replace("dense_4h_to_h", "linear_fc2")
            .replace("post_attention_layernorm", "pre_mlp_layernorm"): tensor
            for name, tensor in rank["encoder"].items()
        }  # fmt: skip
        model["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
        model["embedding.word_embeddings.weight"] = rank["embedding"]["word_embeddings"]["weight"]
        model["output_layer.weight"] = rank["output_layer"]["weight"]
        save_rank(tmp_path / f"mp_rank_{tp:02d}" / "model_optim_rng.pt", model)
    assert_equal(read_all(tmp_path, small()), weights16)


def test_slices_of_one_storage_are_read_from_where_they_lie(
    weights16: Tensors, tmp_path: Path
) -> None:
    names = [name for name, tensor in weights16.items() if tensor.shape == (HIDDEN, HIDDEN)]
    together = torch.cat([weights16[name] for name in names])
    views = dict(zip(names, together.split(HIDDEN), strict=True))
    assert views[names[1]].storage_offset() > 0
    write_config(tmp_path, small())
    torch.save({**weights16, **views}, tmp_path / "pytorch_model.bin")
    assert_equal(read_all(tmp_path), weights16)


# --- deepspeed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tp_size, layers", GRIDS)
def test_deepspeed_files_hold_what_deepspeed_asks_for_and_no_stage_overwrites_another(
    tp_size: int, layers: tuple[int, ...], source16: Path, weights16: Tensors, tmp_path: Path
) -> None:
    target = tmp_path / "ds"
    converted(source16, target, "deepspeed", tensor_parallel=tp_size, num_layer_list=layers)
    assert (target / "latest").read_text() == "release"
    ranks = list(reference_ranks(weights16, tp_size, layers))
    files = sorted((target / "release").iterdir())
    assert [f.name for f in files] == [
        f"mp_rank_{i:02d}_model_states.pt" for i in range(len(ranks))
    ]
    for file, (_, _, rank) in zip(files, ranks, strict=True):
        content = _load(file)
        assert content["dp_world_size"] == 1
        assert content["mp_world_size"] == len(ranks)
        assert content["checkpoint_version"] == 3.0
        assert_same_tree(content["module"], {"language_model": rank})


def test_a_deepspeed_checkpoint_of_the_predecessor_reads_like_its_source(
    weights16: Tensors, tmp_path: Path
) -> None:
    (tmp_path / "release").mkdir()
    for _, tp, rank in reference_ranks(weights16, 2, (4,), merge_mlp=True):
        content = {"checkpoint_version": 3.0, "module": {"language_model": rank},
                   "dp_world_size": 0}  # fmt: skip
        torch.save(content, tmp_path / "release" / f"mp_rank_{tp:02d}_model_states.pt")
    (tmp_path / "latest").write_text("release\n")
    assert_equal(read_all(tmp_path, small()), weights16)
    assert_equal(read_all(tmp_path / "release", small()), weights16)


# --- megatron ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_reader_finds_the_whole_model_in_a_distributed_checkpoint(
    layouts: dict[str, tuple[Path, str]], weights16: Tensors
) -> None:
    import torch.distributed.checkpoint as dcp

    w = weights16
    layers = [reference_rank(w, 0, stage, 1, (1,) * LAYERS, merge_mlp=True)["encoder"]
              for stage in range(LAYERS)]  # fmt: skip
    keys = {
        "self_attention.linear_qkv.weight": "self_attention.query_key_value.weight",
        "self_attention.linear_qkv.bias": "self_attention.query_key_value.bias",
        "self_attention.linear_proj.weight": "self_attention.dense.weight",
        "self_attention.linear_proj.bias": "self_attention.dense.bias",
        "mlp.linear_fc1.weight": "mlp.proj.weight",
        "mlp.linear_fc2.weight": "mlp.dense_4h_to_h.weight",
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    }
    expected = {
        f"decoder.layers.{key}": torch.stack([layer[f"layers.0.{name}"] for layer in layers])
        for key, name in keys.items()
    } | {
        "embedding.word_embeddings.weight": w["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": w["model.norm.weight"],
        "output_layer.weight": w["lm_head.weight"],
    }
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(found, checkpoint_id=str(layouts["megatron"][0]), no_dist=True)
    assert_equal(found, expected)


# --- huggingface ---------------------------------------------------------------------------------


def shards(tensors: Tensors, number: int) -> list[Tensors]:
    """Consecutive parts, as the files of a model are cut."""
    names = list(tensors)
    size = -(-len(names) // number)
    return [{n: tensors[n] for n in names[i : i + size]} for i in range(0, len(names), size)]


def write_shards(
    folder: Path, tensors: Tensors, stem: str, suffix: str, save: Callable[[Tensors, Path], None]
) -> None:
    parts = shards(tensors, 3)
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-{number:05d}-of-{len(parts):05d}.{suffix}"
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_files_of_either_kind_single_or_sharded_read_alike_past_rotary_frequencies(
    kind: str, sharded: bool, weights16: Tensors, tmp_path: Path
) -> None:
    model = small()
    inv_freq = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(HIDDEN // HEADS // 2)
        for layer in range(LAYERS)
    }
    stem = "pytorch_model" if kind == "bin" else "model"
    save = torch.save if kind == "bin" else save_file
    write_config(tmp_path, model)
    if sharded:
        write_shards(tmp_path, {**weights16, **inv_freq}, stem, kind, save)
    else:
        save({**weights16, **inv_freq}, tmp_path / f"{stem}.{kind}")
    assert_equal(read_all(tmp_path), weights16)
    with open_checkpoint(tmp_path) as weights:
        assert len(weights.files) == (3 if sharded else 1)
        assert weights.dtype == "float16"


def test_an_export_is_cut_into_files_with_an_index_that_transformers_reads(
    source32: Path, weights32: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    limit = 4 * VOCAB * HIDDEN
    monkeypatch.setattr(huggingface, "SHARD_BYTES", limit)
    target = tmp_path / "hf"
    converted(source32, target, "huggingface")
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights32.values())
    files = sorted(target.glob("*.safetensors"))
    assert len(files) > 3
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert not (target / "model.safetensors").exists()
    for file in files:
        with safe_open(file, framework="pt") as shard:
            names = list(shard.keys())
        assert sum(weights32[name].nbytes for name in names) <= limit
        assert {index["weight_map"][name] for name in names} == {file.name}
    assert_equal(read_all(target), weights32)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert_equal(dict(model.state_dict()), weights32)


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_export_gives_the_sources_logits_in_transformers(
    name: str, source32: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    carry_out(plan_conversion(source32, tmp_path / "there", LAYOUTS[name]))
    converted(tmp_path / "there", tmp_path / "back", "huggingface")
    with open_checkpoint(source32) as weights:
        expected = transformers_logits(weights, PROMPT)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32
    with torch.no_grad():
        logits = model(PROMPT, use_cache=False).logits
    assert (logits - expected).abs().max() <= LOGIT_TOLERANCE
    assert expected.std() > 1000 * LOGIT_TOLERANCE


ROTARY_SPELLINGS: dict[str, dict[str, Any]] = {
    "summer 2023": {"rotary": None},
    "November 2023, dynamic": {"rotary": {"base": 50000, "type": "dynamic"}},
    "November 2023, origin": {"rotary": {"base": 50000, "type": "origin"}},
    "December 2023": {
        "rotary": None, "rope_theta": 50000.0,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "num_key_value_heads": HEADS,
    },
    "LLaMA": {"rotary": None, "rope_theta": 50000.0, "model_type": "llama"},
    "transformers 5": {
        "rotary": None, "model_type": "llama", "bias": None, "attention_bias": True,
        "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
    },
}  # fmt: skip


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("spelling", ROTARY_SPELLINGS)
def test_every_spelling_of_the_config_is_understood(
    spelling: str, padding: int, source32: Path, weights32: Tensors, tmp_path: Path
) -> None:
    model, changes = small(), ROTARY_SPELLINGS[spelling]
    folder = tmp_path / "source"
    shutil.copytree(source32, folder)
    write_config(folder, model, pad_token_id=padding, **changes)
    base = 10000 if spelling == "summer 2023" else 50000
    found = read_model(folder / "config.json")
    expected = {**model.model_dump(), "preset": found.preset, "rotary_base": base}
    assert found.model_dump() == expected
    converted(folder, tmp_path / "back", "huggingface")
    assert_equal(load_file(tmp_path / "back" / "model.safetensors"), weights32)
    exported = json.loads((tmp_path / "back" / "config.json").read_text())
    assert exported["rope_theta"] == base
    assert (exported["pad_token_id"], exported["eos_token_id"], exported["bos_token_id"]) == (
        2, 2, 1,
    )  # fmt: skip
    assert read_model(tmp_path / "back" / "config.json").rotary_base == base
    assert "auto_map" not in exported and exported["bias"] is exported["attention_bias"] is True


def test_another_rotary_base_reaches_transformers(source32: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "source"
    shutil.copytree(source32, folder)
    write_config(folder, small(), rotary={"base": 500, "type": "origin"})
    converted(folder, tmp_path / "back", "huggingface")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        logits = model(PROMPT, use_cache=False).logits
    logits_of = {}
    for name, path in (("same", folder), ("other", source32)):
        with open_checkpoint(path) as weights:
            logits_of[name] = transformers_logits(weights, PROMPT)
    assert (logits - logits_of["same"]).abs().max() <= LOGIT_TOLERANCE
    assert (logits - logits_of["other"]).abs().max() > 100 * LOGIT_TOLERANCE


TEXTS = [f"Question: What is {n} plus {n}?\nAnswer: {2 * n}" for n in range(60)] + [
    f"The {colour} {animal} sleeps in the {home}."
    for colour in ("red", "green", "yellow", "brown")
    for animal in ("tiger", "rabbit", "horse", "elephant")
    for home in ("forest", "meadow", "mountain", "desert")
]
PROBES = [
    *TEXTS[:2], TEXTS[-1], "tiger", " tiger", "  leading, double  and trailing blanks  ",
    "line\n\nbreaks\r\nand\ttabs", "\u4eca\u5929 \U0001f600 by bytes", "1212", "",
    "\ufb01 \u00bd \uff21 e\u0301 are not normalised", "\n", " ", "a  \n b",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(TEXTS, 330, path).path


@pytest.fixture(scope="module")
def with_room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with a row of embedding for every piece of `tokenizer_model`; only to be read."""
    model = small(vocab_size=330)
    return write_source(tmp_path_factory.mktemp("room") / "source", model, drawn(model))


@pytest.mark.parametrize("use_fast", [True, False])
def test_autotokenizer_gives_sentencepieces_ids_and_text(
    use_fast: bool, tokenizer_model: Path, with_room: Path, tmp_path: Path
) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    target = tmp_path / "hf"
    order = Order("huggingface")
    carry_out(plan_conversion(with_room, target, order, tokenizer=tokenizer_model))
    assert (target / "tokenizer.model").read_bytes() == tokenizer_model.read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    tokenizer = AutoTokenizer.from_pretrained(target, use_fast=use_fast)
    expected = {text: processor.encode(text) for text in PROBES}
    assert {t: tokenizer(t, add_special_tokens=False).input_ids for t in PROBES} == expected
    assert {text: tokenizer(text).input_ids for text in PROBES} == {
        text: [1, *ids] for text, ids in expected.items()
    }
    assert {t: tokenizer.decode(ids) for t, ids in expected.items()} == {t: t for t in PROBES}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == processor.vocab_size()


@pytest.mark.parametrize("to", FORMATS)
def test_the_tokenizer_goes_along_and_on(
    to: str, tokenizer_model: Path, with_room: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    shutil.copytree(with_room, folder)
    shutil.copy(tokenizer_model, folder)
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["t.T", null]}}')
    (folder / "tokenization_internlm.py").write_text("raise SystemExit('remote code was run')")
    converted(folder, tmp_path / "there", to)
    converted(tmp_path / "there", tmp_path / "back", "huggingface")
    for name in ("tokenizer.model", "special_tokens_map.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer" and "auto_map" not in config
    assert not list((tmp_path / "back").glob("*.py"))


def test_a_tokenizer_of_more_pieces_than_the_embedding_has_rows_is_refused(
    tokenizer_model: Path, source32: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="330 pieces, but the model's embedding only 50 rows"):
        plan_conversion(source32, tmp_path / "hf", Order("classic"), tokenizer=tokenizer_model)


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", FORMATS)
def test_each_tensor_keeps_its_own_dtype(to: str, tmp_path: Path) -> None:
    weights = {
        name: tensor if "norm" in name else tensor.bfloat16()
        for name, tensor in drawn(small()).items()
    }
    source = write_source(tmp_path / "source", small(), weights)
    converted(source, tmp_path / "there", to)
    assert_equal(read_all(tmp_path / "there"), weights)
    converted(tmp_path / "there", tmp_path / "back", "huggingface")
    assert_equal(load_file(tmp_path / "back" / "model.safetensors"), weights)
    with open_checkpoint(tmp_path / "there") as checkpoint:
        assert checkpoint.dtype == "bfloat16, float32"


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(
    "name, dtype",
    [("bfloat16", torch.bfloat16), ("float32", torch.float32), ("fp16", torch.float16)],
)
def test_a_wished_dtype_is_torchs_rounding_of_each_number(
    to: str, name: str, dtype: torch.dtype, source32: Path, weights32: Tensors, tmp_path: Path
) -> None:
    converted(source32, tmp_path / "there", to, dtype=name)
    expected = {name: tensor.to(dtype) for name, tensor in weights32.items()}
    assert_equal(read_all(tmp_path / "there"), expected)
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_half_precision_widened_and_narrowed_again_is_what_it_was(
    source16: Path, weights16: Tensors, tmp_path: Path
) -> None:
    converted(source16, tmp_path / "wide", "classic", tensor_parallel=2, dtype="fp32")
    converted(tmp_path / "wide", tmp_path / "back", "huggingface", dtype="float16")
    assert_equal(load_file(tmp_path / "back" / "model.safetensors"), weights16)


def test_numbers_that_half_precision_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    weights = drawn(small())
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] = -70000.0
    source = write_source(tmp_path / "source", small(), weights)
    with pytest.raises(InputError) as error:
        converted(source, tmp_path / "half", "classic", dtype="float16")
    assert "model.layers.2.mlp.up_proj.weight" in str(error.value)
    assert "7e+04" in str(error.value) and "bfloat16" in str(error.value)
    assert not (tmp_path / "half").exists()
    converted(source, tmp_path / "brain", "classic", dtype="bfloat16")
    assert_equal(
        read_all(tmp_path / "brain"), {name: tensor.bfloat16() for name, tensor in weights.items()}
    )


@pytest.mark.parametrize("to", FORMATS)
def test_a_model_without_biases_is_the_same_on_the_way_back(to: str, tmp_path: Path) -> None:
    model = small(attention_bias=False)
    weights = drawn(model, torch.float16)
    assert not any(name.endswith(".bias") for name in weights)
    source = write_source(tmp_path / "source", model, weights)
    converted(source, tmp_path / "there", to, tensor_parallel=2, pipeline_parallel=2)
    assert_equal(read_all(tmp_path / "there"), weights)
    converted(tmp_path / "there", tmp_path / "back", "huggingface")
    assert_equal(load_file(tmp_path / "back" / "model.safetensors"), weights)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["attention_bias"] is False


# --- plans of the full models --------------------------------------------------------------------


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(
    "preset, tp, pp",
    [("internlm-7b", 8, 1), ("internlm-20b", 8, 4), ("internlm-65b", 8, 4), ("internlm-65b", 4, 8)],
)
def test_the_ranks_of_a_full_model_hold_every_number_once(
    to: str, preset: str, tp: int, pp: int
) -> None:
    model = ModelSection(
        **{**PRESETS[preset], "preset": preset, "make_vocab_size_divisible_by": 128}
    )
    shapes = huggingface_shapes(model)
    split = partition(model, tp, pp)
    files = FORMATS[to].plan(Target(model, split, dict.fromkeys(shapes, torch.float16)))
    data: dict[str, list[Piece]] = {name: [] for name in shapes}
    for file in files:
        for tensor in file.tensors:
            ends = [p.start + p.rows.stop - p.rows.start for p in tensor.pieces]
            assert [p.start for p in tensor.pieces] == [0, *ends[:-1]]
            assert ends[-1] == tensor.shape[0]
            for piece in tensor.pieces:
                if piece.role == "data":
                    data[piece.name].append(piece)
    for name, shape in shapes.items():
        assert_covered(shape, data[name])
    assert len({file.path for file in files}) == len(files)
    if FORMATS[to].layouts:
        assert len(files) == tp * pp


# --- weights drawn by the kit --------------------------------------------------------------------


def test_random_weights_depend_on_seed_and_name_only(tmp_path: Path) -> None:
    model = small()
    one = read_all(write_random(tmp_path / "one", model, 1, "fp32"))
    deeper = read_all(write_random(tmp_path / "deeper", small(num_layers=5), 1, "fp32"))
    other = read_all(write_random(tmp_path / "other", model, 2, "fp32"))
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(one[name], deeper[name])
    assert not torch.equal(one[name], other[name])
    again = write_random(tmp_path / "again", model, 1, "fp32")
    assert _files(again) == _files(tmp_path / "one")


def test_random_weights_have_the_spread_that_megatron_draws(tmp_path: Path) -> None:
    model = small(vocab_size=4096, hidden_size=192, ffn_hidden_size=512)
    weights = read_all(write_random(tmp_path / "w", model, 7, "fp32"))
    std = model.init_method_std
    assert weights["lm_head.weight"].std().item() == pytest.approx(std, rel=0.01)
    down = weights["model.layers.0.mlp.down_proj.weight"].std().item()
    assert down == pytest.approx(std / (2 * model.num_layers) ** 0.5, rel=0.02)
    assert not weights["model.layers.0.self_attn.o_proj.bias"].any()
    assert torch.equal(weights["model.norm.weight"], torch.ones(model.hidden_size))


def test_a_sharded_random_folder_reads_like_a_single_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = read_all(write_random(tmp_path / "single", small(), 1, "bf16"))
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 600)
    sharded = write_random(tmp_path / "sharded", small(), 1, "bf16")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert_equal(read_all(sharded, small()), single)
    assert verify(sharded)["ok"]


def assert_same_tree(found: Any, expected: Any) -> None:
    """Nested dicts of the same keys, the same tensors and the same other values."""
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for key in expected:
            assert_same_tree(found[key], expected[key])
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    else:
        assert found == expected


def _load(file: Path) -> Any:
    return torch.load(file, weights_only=True)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _weights(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, which names the source."""
    return {name: data for name, data in _files(folder).items() if name != "manifest.json"}
