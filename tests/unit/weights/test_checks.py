"""What is no InternLM, damaged, hostile or in the way is refused in words, and nothing is run."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from internlm_lib.errors import InputError, KitError
from internlm_lib.weights.convert import Order, convert, plan_conversion
from internlm_lib.weights.formats import FORMATS, open_checkpoint
from internlm_lib.weights.manifest import read_manifest
from internlm_lib.weights.model_config import read_model
from internlm_lib.weights.torch_archive import read_archive
from internlm_lib.weights.verify import verify
from tests.unit.weights.conftest import (
    HIDDEN,
    VOCAB,
    Tensors,
    assert_equal,
    converted,
    drawn,
    read_all,
    small,
    write_config,
    write_source,
)

RANK_FILE = "release/mp_rank_{:02d}/model_optim_rng.pt"
MODEL_STATES = "release/mp_rank_{:02d}_model_states.pt"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path, weights16: Tensors) -> Path:
    """A Hugging Face folder of one's own, to be spoilt."""
    return write_source(tmp_path / "source", small(), weights16)


@pytest.fixture
def classic(tmp_path: Path, source16: Path) -> Path:
    """A classic checkpoint of two tensor parallel ranks, to be spoilt."""
    converted(source16, tmp_path / "classic", "classic", tensor_parallel=2)
    return tmp_path / "classic"


@pytest.fixture
def megatron(tmp_path: Path, source16: Path) -> Path:
    """A distributed checkpoint, to be spoilt."""
    converted(source16, tmp_path / "megatron", "megatron")
    return tmp_path / "megatron"


@pytest.fixture
def deepspeed(tmp_path: Path, source16: Path) -> Path:
    """A DeepSpeed checkpoint of two tensor parallel ranks, to be spoilt."""
    converted(source16, tmp_path / "deepspeed", "deepspeed", tensor_parallel=2)
    return tmp_path / "deepspeed"


def refused(path: Path, **arguments: Any) -> str:
    """What open_checkpoint says to a folder it must refuse."""
    with pytest.raises(InputError) as error:
        open_checkpoint(path, **arguments)
    return str(error.value)


def change(file: Path, edit: Callable[[Any], None]) -> None:
    """Load what torch.save wrote, edit it in place, and save it again."""
    content = torch.load(file, weights_only=True)
    edit(content)
    torch.save(content, file)


# --- another model -------------------------------------------------------------------------------


def test_a_folder_of_another_model_is_refused_with_all_differences_at_once(
    folder: Path, weights16: Tensors
) -> None:
    kept = {name: tensor for name, tensor in weights16.items() if ".3.mlp." not in name}
    kept["model.layers.0.self_attn.rotary.weight"] = torch.ones(3)
    kept["model.norm.weight"] = torch.ones(HIDDEN + 1)
    save_file(kept, folder / "model.safetensors")
    other = small(
        vocab_size=64, layernorm_epsilon=1e-5, rotary_base=500, num_attention_heads=2,
        ffn_hidden_size=32, attention_bias=False,
    )  # fmt: skip
    message = refused(folder, model=other)
    for expected in (
        "vocab_size = 50, but model.vocab_size = 64",
        "rms_norm_eps = 1e-06, but model.layernorm_epsilon = 1e-05",
        "rope_theta = 10000, but model.rotary_base = 500",
        "num_attention_heads = 4, but model.num_attention_heads = 2",
        "intermediate_size = 24, but model.ffn_hidden_size = 32",
        "bias = true, but model.attention_bias = false",
        "3 tensors are missing: model.layers.3.mlp.down_proj.weight, ",
        "17 tensors are unexpected: model.layers.0.self_attn.k_proj.bias",
        "and 12 more",
        "lm_head.weight has the shape (50, 16), expected is (64, 16)",
        "model.norm.weight has the shape (17,), expected is (16,)",
        "model.layers.0.mlp.up_proj.weight has the shape (24, 16), expected is (32, 16)",
    ):
        assert expected in message


def test_ranks_of_another_model_are_refused_with_all_differences_at_once(classic: Path) -> None:
    def edit(content: Any) -> None:
        encoder = content["model"]["language_model"]["encoder"]
        del encoder["layers.1.self_attention.dense.weight"]
        encoder["layers.2.input_layernorm.weight"] = torch.ones(HIDDEN - 1)
        encoder["layers.0.lora.weight"] = torch.ones(2, 2)

    change(classic / RANK_FILE.format(1), edit)
    message = refused(classic, model=small(num_layers=5, vocab_size=51))
    for expected in (
        "4 layers, but model.num_layers = 5",
        "50 rows of embedding, but model.vocab_size = 51",
        "mp_rank_01: encoder.layers.1.self_attention.dense.weight",
        "mp_rank_01: encoder.layers.0.lora.weight",
        "mp_rank_01: encoder.layers.2.input_layernorm.weight has the shape (15,)",
    ):
        assert expected in message


def test_a_distributed_checkpoint_of_another_model_is_refused(megatron: Path) -> None:
    message = refused(megatron, model=small(num_layers=5, attention_bias=False))
    for expected in (
        "2 tensors are unexpected: decoder.layers.self_attention.linear_proj.bias, ",
        "decoder.layers.mlp.linear_fc2.weight has the shape (4, 16, 24), expected is (5, 16, 24)",
    ):
        assert expected in message


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"model_type": "internlm2"}, 'model_type = "internlm2"; internlm and llama'),
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2, not 4"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = true"),
        ({"mlp_bias": True}, "mlp_bias = true"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
        ({"pad_token_id": 7}, "pad_token_id = 7"),
        ({"rotary": {"base": 10000, "type": "linear"}}, 'of type "linear"'),
        ({"rotary": None, "rope_scaling": {"type": "yarn", "factor": 2.0}}, 'of type "yarn"'),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"num_hidden_layers": "four"}, "num_layers"),
        ({"num_hidden_layers": -4}, "num_layers"),
    ],
)
def test_a_config_that_is_no_internlms_is_refused(
    changes: dict[str, Any], expected: str, folder: Path
) -> None:
    write_config(folder, small(), **changes)
    assert expected in refused(folder)


def test_all_that_is_foreign_in_a_config_is_told_at_once(folder: Path) -> None:
    write_config(
        folder, small(), num_key_value_heads=2, tie_word_embeddings=True, hidden_act="relu"
    )
    message = refused(folder)
    assert all(
        key in message for key in ("num_key_value_heads", "tie_word_embeddings", "hidden_act")
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary": 5},
        {"rotary": {"base": None, "type": "dynamic"}},
        {"rotary": {"base": "ten", "type": "dynamic"}},
        {"rotary": None, "rope_scaling": ["dynamic"]},
        {"rotary": None, "rope_theta": [10000]},
        {"num_attention_heads": [4]},
        {"vocab_size": {}},
    ],
)
def test_a_config_with_values_of_the_wrong_kind_is_refused(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    write_config(tmp_path, small(), **changes)
    with pytest.raises(InputError, match=r"config\.json"):
        read_model(tmp_path / "config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\x00\xff"])
def test_a_config_that_is_no_json_object_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert "config.json cannot be read" in refused(folder)


def test_heads_that_do_not_divide_the_hidden_size_are_refused(folder: Path, tmp_path: Path) -> None:
    write_config(folder, small(), num_attention_heads=3)
    with pytest.raises(InputError, match=r"num_attention_heads"):
        converted(folder, tmp_path / "target", "classic")
    assert not (tmp_path / "target").exists()


def test_more_ranks_than_heads_are_refused(classic: Path) -> None:
    for rank in range(2, 8):
        shutil.copytree(
            classic / "release" / f"mp_rank_{rank % 2:02d}", classic / f"release/mp_rank_{rank:02d}"
        )
    assert "8" in refused(classic)


def test_an_unknown_shape_without_a_config_asks_for_the_model(classic: Path) -> None:
    (classic / "config.json").unlink()
    message = refused(classic)
    assert "4 layers, hidden size 16, ffn size 24, with attention bias" in message
    assert "--model" in message


# --- not a checkpoint ----------------------------------------------------------------------------


def test_what_is_no_folder_of_a_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint that is known" in refused(tmp_path / "empty")
    assert "is no folder" in refused(folder / "model.safetensors")
    assert "is no folder" in refused(tmp_path / "nothing")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refused(folder)


def test_a_hugging_face_folder_without_its_config_says_what_is_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json is missing" in refused(folder)


@pytest.mark.parametrize("text", ["nothing", "", "..", "../elsewhere", "/", "\x00", "x" * 5000])
def test_a_latest_that_names_no_folder_beside_it_is_told(text: str, deepspeed: Path) -> None:
    for file in (deepspeed / "release").iterdir():
        shutil.copy(file, deepspeed.parent)  # where `..` would lead
    (deepspeed / "latest").write_text(text)
    assert f"{deepspeed / 'latest'} must hold the name of a folder beside it" in refused(
        deepspeed, model=small()
    )


@pytest.mark.parametrize(
    "text", ["rubbish", "", "..", "../release", "11", "-1", "\u00b2", "9" * 5000, "\x00"]
)
def test_a_tracker_that_names_no_folder_beside_it_is_told(text: str, classic: Path) -> None:
    tracker = classic / "latest_checkpointed_iteration.txt"
    tracker.write_text(text)
    assert f"{tracker} names no folder beside it" in refused(classic, model=small())


def test_a_tracker_that_is_no_text_is_told(classic: Path) -> None:
    tracker = classic / "latest_checkpointed_iteration.txt"
    tracker.write_bytes(b"\xff\xfe\x00\x81")
    assert f"{tracker} names no folder beside it" in refused(classic, model=small())


@pytest.mark.parametrize("lost", ["mp_rank_00_000", "mp_rank_01_001"])
def test_a_missing_rank_is_named(lost: str, source16: Path, tmp_path: Path) -> None:
    target = tmp_path / "classic"
    converted(source16, target, "classic", tensor_parallel=2, pipeline_parallel=2)
    shutil.rmtree(target / "release" / lost)
    assert f"3 ranks of TP2 PP2; missing: {lost}" in refused(target)


def test_a_missing_file_of_a_deepspeed_rank_is_told(deepspeed: Path) -> None:
    (deepspeed / MODEL_STATES.format(0)).unlink()
    assert "has the model parallel ranks [1]: one is missing" in refused(deepspeed)


def test_lost_last_ranks_are_noticed_by_what_is_missing(source16: Path, tmp_path: Path) -> None:
    for to, lost in (("classic", "mp_rank_01"), ("deepspeed", "mp_rank_01_model_states.pt")):
        target = tmp_path / to
        converted(source16, target, to, tensor_parallel=2)
        gone = target / "release" / lost
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        assert "has the shape" in refused(target)
    target = tmp_path / "stages"
    converted(source16, target, "deepspeed", pipeline_parallel=4)
    (target / MODEL_STATES.format(3)).unlink()
    assert "3 layers, but model.num_layers = 4" in refused(target)


# --- damaged files -------------------------------------------------------------------------------


def sharded(folder: Path, tensors: Tensors) -> dict[str, Any]:
    """Cut a folder's file in two; returns the index."""
    names = list(tensors)
    parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return {"metadata": {}, "weight_map": weight_map}


def test_a_missing_or_truncated_shard_is_named(folder: Path, weights16: Tensors) -> None:
    sharded(folder, weights16)
    assert_equal(read_all(folder), weights16)
    data = (folder / "b.safetensors").read_bytes()
    for length in (0, 5, 300, len(data) - 1):
        (folder / "b.safetensors").write_bytes(data[:length])
        assert "b.safetensors cannot be read" in refused(folder)
    (folder / "b.safetensors").unlink()
    message = refused(folder)
    assert INDEX in message and "are missing: b.safetensors" in message


@pytest.mark.parametrize(
    "index",
    ["", "{", "[]", "null", "{}", '{"weight_map": {}}', '{"weight_map": []}',
     '{"weight_map": {"a": 5}}', '{"weight_map": {"a": null}}', '{"weight_map": {"a": ["x"]}}',
     '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": "/etc/passwd"}}',
     '{"weight_map": {"a": ".."}}', '{"weight_map": {"a": "."}}',
     '{"weight_map": {"a": "x/../../y"}}'],
)  # fmt: skip
@pytest.mark.parametrize("name", [INDEX, "pytorch_model.bin.index.json"])
def test_a_damaged_or_hostile_index_is_refused(name: str, index: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_text(index)
    message = refused(folder)
    assert f"{folder / name} is damaged" in message


def test_an_index_that_names_no_file_is_refused(folder: Path) -> None:
    for file in ("", "a\x00b"):
        (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
        assert str(folder / INDEX) in refused(folder)


def test_of_two_shards_with_one_tensor_that_which_the_index_names_is_read(
    folder: Path, weights16: Tensors
) -> None:
    whole, name = load_file(folder / "model.safetensors"), "model.norm.weight"
    (folder / "model.safetensors").unlink()
    save_file(whole, folder / "a.safetensors")
    save_file({name: whole[name] + 1}, folder / "b.safetensors")
    places = {**dict.fromkeys(whole, "a.safetensors"), "stale": "b.safetensors"}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_equal(read_all(folder), weights16)


@pytest.mark.parametrize(
    "header",
    [b"", b"\xff" * 8, b"\x00" * 8, (10**9).to_bytes(8, "little") + b"{}",
     (2).to_bytes(8, "little") + b"[]", (4).to_bytes(8, "little") + b"null",
     (9).to_bytes(8, "little") + b'{"a": 5 }', b"version https://git-lfs.github.com/spec/v1\n"],
)  # fmt: skip
def test_a_corrupt_safetensors_header_is_refused(header: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(header)
    assert "model.safetensors cannot be read" in refused(folder)


def test_safetensors_of_integers_are_refused(folder: Path, weights16: Tensors) -> None:
    name = "model.norm.weight"
    save_file({**weights16, name: torch.ones(HIDDEN, dtype=torch.int8)},
              folder / "model.safetensors")  # fmt: skip
    message = refused(folder)
    assert "I8" in message and name in message


def test_a_file_that_was_cut_after_it_was_opened_is_named_by_every_read(
    classic: Path, weights16: Tensors
) -> None:
    with open_checkpoint(classic) as weights:
        for file in weights.files:
            os.truncate(file, 100)
        for name in weights16:
            with pytest.raises(InputError, match=r"model_optim_rng\.pt ends at byte"):
                weights.read(name)


@pytest.mark.parametrize("length", [0, 1, 100, 1000, -1])
def test_a_truncated_torch_file_is_named(length: int, classic: Path, weights16: Tensors) -> None:
    file = classic / RANK_FILE.format(1)
    file.write_bytes(file.read_bytes()[:length])
    assert f"{file} cannot be read" in refused(classic)


def test_a_torch_file_of_before_torch_1_6_is_told_from_a_damaged_model(
    folder: Path, weights16: Tensors
) -> None:
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(weights16, file, _use_new_zipfile_serialization=False)
    message = refused(folder)
    assert str(file) in message
    assert "missing" not in message and "contiguous" not in message


@pytest.mark.parametrize("content", [[1, 2], "text", None, torch.ones(3), 5])
def test_a_torch_file_that_is_no_dict_is_refused(content: Any, folder: Path, classic: Path,
                                                  deepspeed: Path) -> None:  # fmt: skip
    (folder / "model.safetensors").unlink()
    files = {
        folder: folder / "pytorch_model.bin",
        classic: classic / RANK_FILE.format(0),
        deepspeed: deepspeed / MODEL_STATES.format(0),
    }
    for path, file in files.items():
        torch.save(content, file)
        assert str(file) in refused(path)


def test_a_tensor_that_does_not_lie_row_by_row_is_told_by_name(
    folder: Path, weights16: Tensors
) -> None:
    (folder / "model.safetensors").unlink()
    name = "model.layers.0.self_attn.o_proj.weight"
    turned = weights16[name].t().contiguous().t()
    torch.save({**weights16, name: turned}, folder / "pytorch_model.bin")
    message = refused(folder)
    assert name in message and "missing" not in message


def test_a_name_that_only_looks_like_gpt_models_is_unexpected(classic: Path) -> None:
    def edit(content: Any) -> None:
        encoder = content["model"]["language_model"]["encoder"]
        encoder["layers.0.linear_extra.weight"] = torch.ones(2, 2)

    change(classic / RANK_FILE.format(0), edit)
    message = refused(classic)
    assert "unexpected" in message and "linear_extra" in message


def test_two_spellings_of_one_tensor_in_a_rank_are_refused(classic: Path) -> None:
    def both(content: Any) -> None:
        other = content["model"]["language_model"]["output_layer"]["weight"] + 1
        content["model"]["lm_head.lm_head.weight"] = other

    change(classic / RANK_FILE.format(0), both)
    assert "output_layer.weight twice" in refused(classic)


def test_a_missing_or_truncated_chunk_file_is_named(megatron: Path) -> None:
    file = megatron / "__0_2.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} is missing, or truncated" in refused(megatron)
    file.unlink()
    assert f"{file} is missing, or truncated" in refused(megatron)


def test_metadata_without_one_of_the_chunks_is_refused(megatron: Path) -> None:
    file = megatron / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    gone = next(i for i in metadata.storage_data if i.fqn == "decoder.layers.mlp.linear_fc2.weight")
    del metadata.storage_data[gone]
    file.write_bytes(pickle.dumps(metadata))
    message = refused(megatron)
    assert "do not make up the whole model.layers.0.mlp.down_proj.weight" in message


def cut_in_two(folder: Path, second_starts_at: int) -> None:
    """Store the rows of the output layer as two chunks, as two ranks of megatron-core would."""
    file, key = folder / ".metadata", "output_layer.weight"
    with open_checkpoint(folder) as weights:
        whole = weights.read("lm_head.weight")
    metadata = pickle.loads(file.read_bytes())
    for index in [index for index in metadata.storage_data if index.fqn == key]:
        del metadata.storage_data[index]
    half = VOCAB // 2
    for name, offset, rows in (("a", 0, whole[:half]), ("b", second_starts_at, whole[half:])):
        place = folder / f"{name}.distcp"
        torch.save(rows.clone(), place)
        where = _StorageInfo(place.name, 0, place.stat().st_size)
        metadata.storage_data[MetadataIndex(key, torch.Size([offset, 0]))] = where
    file.write_bytes(pickle.dumps(metadata))


def test_chunks_of_several_ranks_make_the_whole(megatron: Path, weights16: Tensors) -> None:
    cut_in_two(megatron, VOCAB // 2)
    assert_equal(read_all(megatron), weights16)


@pytest.mark.parametrize("start", [1, VOCAB // 2 - 1, VOCAB // 2 + 1, VOCAB, -1])
def test_chunks_that_overlap_or_leave_a_gap_are_refused(start: int, megatron: Path) -> None:
    cut_in_two(megatron, start)
    assert "do not make up the whole lm_head.weight" in refused(megatron)


@pytest.mark.parametrize("layer", [4, 99, -5])
def test_a_chunk_of_a_layer_that_is_none_is_refused(layer: int, megatron: Path) -> None:
    file, key = megatron / ".metadata", "decoder.layers.mlp.linear_fc2.weight"
    metadata = pickle.loads(file.read_bytes())
    last = next(
        index for index in metadata.storage_data
        if index.fqn == key and index.offset is not None and index.offset[0] == 3
    )  # fmt: skip
    where = metadata.storage_data.pop(last)
    metadata.storage_data[MetadataIndex(key, torch.Size([layer, 0, 0]))] = where
    file.write_bytes(pickle.dumps(metadata))
    assert str(file) in refused(megatron)


@pytest.mark.parametrize(
    "place", ["../outside.distcp", "/etc/passwd", "x/../__0_0.distcp", "", ".", 5, None]
)
def test_metadata_that_leads_out_of_the_folder_is_refused(place: Any, megatron: Path) -> None:
    shutil.copy(megatron / "__0_0.distcp", megatron.parent / "outside.distcp")
    file = megatron / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    index = next(i for i in metadata.storage_data if i.fqn == "embedding.word_embeddings.weight")
    metadata.storage_data[index].relative_path = place
    file.write_bytes(pickle.dumps(metadata))
    refused(megatron)


def flipped(file: Path, position: int, bit: int) -> bytes:
    """Flip one bit of a file; returns what it held."""
    data = file.read_bytes()
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    file.write_bytes(changed)
    return data


def escapes(file: Path, place: range, number: int, act: Callable[[], object]) -> dict[str, str]:
    """Flip single bits; what comes of it but an InputError, by kind."""
    draw, found = random.Random(5), {}
    for _ in range(number):
        where = draw.choice(place), draw.randrange(8)
        intact = flipped(file, *where)
        try:
            act()
        except Exception as error:
            cause = error.__cause__ if isinstance(error, InputError) else error
            if not isinstance(error, InputError) or isinstance(cause, MemoryError):
                found[type(cause).__name__] = f"byte, bit {where}: {str(cause)[:100]}"
        file.write_bytes(intact)
    return found


def test_no_flipped_bit_of_the_metadata_escapes_as_another_error_or_takes_all_memory(
    megatron: Path, little_memory: None
) -> None:
    file = megatron / ".metadata"
    whole = range(file.stat().st_size)
    assert escapes(file, whole, 600, lambda: open_checkpoint(megatron).close()) == {}


def test_no_flipped_bit_of_a_torch_file_escapes_as_another_error(
    classic: Path, little_memory: None
) -> None:
    file = classic / RANK_FILE.format(0)
    data = file.read_bytes()
    start = data.index(b"data.pkl")
    pickled = range(start, data.index(b"PK", start))
    directory = range(data.index(b"PK\x01\x02"), len(data))
    for place in (pickled, directory):
        assert escapes(file, place, 400, lambda: read_archive(file)) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "5", '{"manifest_sha256": 1}'])
def test_a_manifest_that_is_none_is_refused(text: str, folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").write_text(text)
    for act in (
        lambda: read_manifest(folder),
        lambda: verify(folder),
        lambda: converted(folder, tmp_path / "target", "classic"),
    ):
        with pytest.raises(InputError, match=r"manifest\.json is damaged"):
            act()
    assert not (tmp_path / "target").exists()


# --- dtypes and copies ---------------------------------------------------------------------------


def test_a_tensor_of_mixed_dtypes_asks_for_one_dtype(tmp_path: Path) -> None:
    weights = drawn(small(), torch.float16)
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name] = weights[name].float()
    source = write_source(tmp_path / "source", small(), weights)
    for to in ("megatron", "classic", "deepspeed"):
        with pytest.raises(InputError) as error:
            converted(source, tmp_path / to, to)
        assert name in str(error.value) and "--dtype" in str(error.value)
        converted(source, tmp_path / to, to, dtype="float32")
        expected = {name: tensor.float() for name, tensor in weights.items()}
        assert_equal(read_all(tmp_path / to), expected)
    converted(source, tmp_path / "hf", "huggingface")
    assert_equal(load_file(tmp_path / "hf" / "model.safetensors"), weights)


def test_mixed_dtypes_are_told_before_anything_is_written(tmp_path: Path) -> None:
    weights = drawn(small(), torch.float16)
    weights["model.layers.0.mlp.up_proj.weight"] = weights[
        "model.layers.0.mlp.up_proj.weight"
    ].float()
    source = write_source(tmp_path / "source", small(), weights)
    with pytest.raises(InputError, match="--dtype"):
        plan_conversion(source, tmp_path / "target", Order("classic", merge_mlp=True))


def test_ranks_of_different_dtypes_are_refused(classic: Path) -> None:
    def edit(content: Any) -> None:
        encoder = content["model"]["language_model"]["encoder"]
        name = "layers.0.self_attention.dense.weight"
        encoder[name] = encoder[name].float()

    change(classic / RANK_FILE.format(1), edit)
    message = refused(classic)
    assert "model.layers.0.self_attn.o_proj.weight is stored in" in message
    assert "mp_rank_01" in message


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("layers.2.input_layernorm.weight", "model.layers.2.input_layernorm.weight"),
        ("layers.0.self_attention.dense.bias", "model.layers.0.self_attn.o_proj.bias"),
        ("final_layernorm.weight", "model.norm.weight"),
    ],
)
def test_ranks_whose_copies_differ_are_not_of_one_checkpoint(
    ours: str, theirs: str, classic: Path, tmp_path: Path
) -> None:
    (classic / "manifest.json").unlink()

    def edit(content: Any) -> None:
        content["model"]["language_model"]["encoder"][ours][3] += 0.5

    change(classic / RANK_FILE.format(1), edit)
    with pytest.raises(InputError) as error:
        converted(classic, tmp_path / "target", "huggingface")
    assert theirs in str(error.value) and "mp_rank_01" in str(error.value)
    assert not (tmp_path / "target").exists()


# --- pickles that would run code -----------------------------------------------------------------


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def plant_in_bin(folder: Path, payload: Payload) -> Path:
    write_config(folder, small())
    torch.save({**drawn(small()), "x": payload}, folder / "pytorch_model.bin")
    return folder


def plant_in_classic(folder: Path, payload: Payload) -> Path:
    file = folder / RANK_FILE.format(0)
    file.parent.mkdir(parents=True)
    torch.save({"checkpoint_version": 3.0, "model": {}, "args": payload}, file)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    return folder


def plant_in_deepspeed(folder: Path, payload: Payload) -> Path:
    (folder / "release").mkdir()
    torch.save({"module": {}, "optimizer": payload}, folder / MODEL_STATES.format(0))
    (folder / "latest").write_text("release")
    return folder


def plant_in_metadata(folder: Path, payload: Payload) -> Path:
    (folder / ".metadata").write_bytes(pickle.dumps(payload))
    return folder


PLANTS = [plant_in_bin, plant_in_classic, plant_in_deepspeed, plant_in_metadata]


def test_the_payload_works_where_pickles_are_opened(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "created")))
    assert (tmp_path / "created").exists()


@pytest.mark.parametrize("act", [open_checkpoint, verify])
@pytest.mark.parametrize("plant", PLANTS)
def test_a_pickle_that_would_run_code_is_refused_and_does_not(
    plant: Callable[[Path, Payload], Path], act: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    folder = plant(tmp_path / "folder", Payload(tmp_path / "created"))
    with pytest.raises(InputError, match="is refused") as error:
        act(folder, small())
    assert "could run code" in str(error.value)
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize(
    "module, name",
    [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("torch.serialization", "load"),
     ("pathlib", "os.mkdir"), ("torch.distributed.checkpoint.metadata", "os.mkdir"),
     ("torch.distributed.checkpoint.filesystem", "os.mkdir"), ("torch", "hub.load")],
)  # fmt: skip
def test_metadata_may_name_no_function_by_any_way_round(
    module: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    file, created = tmp_path / "folder" / ".metadata", tmp_path / "created"
    file.write_bytes(calling(module, name, created))
    assert "is refused" in refused(tmp_path / "folder", model=small())
    assert not created.exists()
    pickle.loads(calling("os", "mkdir", created))
    assert created.exists()


def calling(module: str, name: str, argument: Path) -> bytes:
    """A pickle that calls `module.name` with a path, in opcodes; `name` may have dots."""
    opcodes = b"".join(
        pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode() for text in (module, name)
    )
    path = str(argument).encode()
    path = pickle.BINUNICODE + len(path).to_bytes(4, "little") + path
    call = pickle.STACK_GLOBAL + path + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP
    return pickle.PROTO + b"\x04" + opcodes + call


def test_a_payload_among_the_extra_states_is_never_opened(
    megatron: Path, weights16: Tensors, tmp_path: Path
) -> None:
    (megatron / "manifest.json").unlink()
    add_object(megatron, "decoder.layers.mlp.linear_fc1._extra_state/shard_0_1",
               Payload(tmp_path / "created"))  # fmt: skip
    assert_equal(read_all(megatron), weights16)
    verify(megatron)
    converted(megatron, tmp_path / "target", "megatron")
    assert not (tmp_path / "created").exists()
    assert b"mkdir" not in b"".join(f.read_bytes() for f in (tmp_path / "target").iterdir())


def test_a_payload_in_the_place_of_a_tensor_is_refused_and_does_not_run(
    megatron: Path, tmp_path: Path
) -> None:
    file = megatron / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    index = next(i for i in metadata.storage_data if i.fqn == "output_layer.weight")
    torch.save(Payload(tmp_path / "created"), megatron / "x.distcp")
    length = (megatron / "x.distcp").stat().st_size
    metadata.storage_data[index] = _StorageInfo("x.distcp", 0, length)
    file.write_bytes(pickle.dumps(metadata))
    assert "could run code" in refused(megatron)
    assert not (tmp_path / "created").exists()


def test_random_states_beside_a_distributed_trainings_weights_do_not_bar_them(
    megatron: Path, weights16: Tensors
) -> None:
    states = [
        {
            "random_rng_state": random.Random(1).getstate(),
            "np_rng_state": numpy.random.RandomState(1).get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
        }
    ]
    add_object(megatron, "rng_state/shard_0.0_1.1", states)
    assert_equal(read_all(megatron), weights16)


def add_object(folder: Path, key: str, value: Any) -> None:
    """Add an object that is no tensor to a distributed checkpoint, as megatron-core saves it."""
    torch.save(value, folder / "__9_0.distcp")
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    length = (folder / "__9_0.distcp").stat().st_size
    metadata.storage_data[MetadataIndex(key)] = _StorageInfo("__9_0.distcp", 0, length)
    file.write_bytes(pickle.dumps(metadata))


# --- the order -----------------------------------------------------------------------------------


def test_a_format_or_dtype_that_is_not_known_is_refused_with_the_known_ones(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="choose one of huggingface, megatron, classic, deepspeed"):
        plan_conversion(folder, tmp_path / "target", Order("gguf"))
    with pytest.raises(InputError, match="choose one of .*bfloat16"):
        plan_conversion(folder, tmp_path / "target", Order("classic", dtype="int8"))


def test_a_target_that_is_there_is_left_alone_unless_told_otherwise(
    folder: Path, tmp_path: Path, weights16: Tensors
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="exists.*--overwrite"):
        converted(folder, target, "classic")
    assert (target / "mine.txt").read_text() == "keep"
    convert(plan_conversion(folder, target, Order("classic"), overwrite=True))
    assert not (target / "mine.txt").exists()
    assert_equal(read_all(target), weights16)


def test_a_target_that_appears_meanwhile_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    plan = plan_conversion(folder, target, Order("classic"))
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    with pytest.raises(KitError, match="exists"):
        convert(plan)
    assert [file.name for file in target.iterdir()] == ["mine.txt"]


def test_a_target_that_is_a_file_is_refused_at_once(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=str(target)):
            plan_conversion(folder, target, Order("classic"), overwrite=overwrite)
    assert target.read_text() == "keep"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["source", "source/inside", ".", "source/../source/x"])
def test_source_and_target_within_each_other_are_refused(
    place: str, overwrite: bool, folder: Path, tmp_path: Path
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(InputError):
        plan_conversion(folder, tmp_path / place, Order("classic"), overwrite=overwrite)
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(InputError, match="within each other"):
        plan_conversion(folder, link / "x", Order("classic"), overwrite=overwrite)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    "order, problems",
    [
        (
            Order("classic", tensor_parallel=3, pipeline_parallel=3),
            ["3 does not divide hidden_size 16", "3 does not divide num_attention_heads 4",
             "3 does not divide num_layers 4"],
        ),
        (Order("classic", tensor_parallel=5), ["hidden_size", "ffn_hidden_size 24", "heads 4"]),
        (Order("deepspeed", tensor_parallel=8), ["8 does not divide num_attention_heads 4"]),
        (
            Order("classic", tensor_parallel=3, pipeline_parallel=3, num_layer_list=(1, 4)),
            ["hidden_size", "2 stages in the layer list, not 3", "1, 4 must be positive numbers"],
        ),
        (Order("classic", num_layer_list=(0, 4)), ["0, 4 must be positive numbers"]),
        (Order("classic", tensor_parallel=0, pipeline_parallel=0), ["size 0", "num_layers"]),
        (Order("classic", tensor_parallel=-2), ["size -2"]),
        (Order("classic", make_vocab_size_divisible_by=0), ["make_vocab_size_divisible_by"]),
        (Order("classic", make_vocab_size_divisible_by=-8), ["make_vocab_size_divisible_by"]),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_hold_the_model_lists_all_that_does_not_fit(
    order: Order, problems: list[str], folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        plan_conversion(folder, tmp_path / "target", order)
    assert [problem for problem in problems if problem not in str(error.value)] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_tokenizer_that_is_not_there_is_told(folder: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere" / "tokenizer.model"
    with pytest.raises(InputError, match="nowhere"):
        plan_conversion(folder, tmp_path / "target", Order("classic"), tokenizer=nowhere)
    (folder / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="not a sentencepiece model"):
        plan_conversion(folder, tmp_path / "target", Order("classic"))


@pytest.mark.parametrize("to", FORMATS)
def test_a_refused_conversion_leaves_the_source_as_it_was(
    to: str, folder: Path, tmp_path: Path
) -> None:
    weights = drawn(small())
    weights["lm_head.weight"][VOCAB - 1, HIDDEN - 1] = 1e30
    save_file(weights, folder / "model.safetensors")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        converted(folder, tmp_path / "target", to, dtype="float16")
    assert not (tmp_path / "target").exists()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
