"""Whatever changes in a converted folder is found, and the damaged tensor is named."""

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from internlm_lib.errors import InputError
from internlm_lib.weights.convert import Order, convert, plan_conversion
from internlm_lib.weights.formats import FORMATS, open_checkpoint
from internlm_lib.weights.manifest import read_manifest
from internlm_lib.weights.verify import verify
from tests.unit.weights.conftest import (
    HIDDEN,
    Tensors,
    assert_equal,
    converted,
    drawn,
    read_all,
    small,
    write_source,
)

FLIPS = 30
ORDERS = {
    "huggingface": Order("huggingface"),
    "megatron": Order("megatron"),
    "classic": Order("classic", tensor_parallel=4, pipeline_parallel=2),
    "deepspeed": Order("deepspeed", tensor_parallel=4, merge_mlp=True),
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory, source16: Path) -> dict[str, Path]:
    """The source in every format; only to be read."""
    root = tmp_path_factory.mktemp("intact")
    for name, order in ORDERS.items():
        convert(plan_conversion(source16, root / name, order))
    return {name: root / name for name in ORDERS}


@pytest.fixture(params=FORMATS)
def folder(request: pytest.FixtureRequest, intact: dict[str, Path], tmp_path: Path) -> Path:
    """A folder of each format, to be spoilt."""
    shutil.copytree(intact[request.param], tmp_path / request.param)
    return tmp_path / request.param


def flip(file: Path, position: int, mask: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        (byte,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ mask]))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def places(folder: Path) -> Iterator[tuple[str, str, Path, int, int]]:
    """Name, role, file and bytes [start, stop) of every row of every tensor that lies in files."""
    with open_checkpoint(folder) as weights:
        for name, tensor in weights.tensors.items():
            for part in tensor.parts:
                (run,) = part.stored.runs
                size = part.stored.row_elements * part.stored.dtype.itemsize
                for row in range(part.piece.rows.stop - part.piece.rows.start):
                    start = run.offset + (part.piece.start + row) * size
                    yield name, part.piece.role, run.file, start, start + size


def test_an_intact_conversion_is_ok_in_every_format(
    folder: Path, source16: Path, weights16: Tensors
) -> None:
    report = verify(folder)
    order = ORDERS[folder.name]
    assert report["ok"] and report["manifest"]
    assert report["problems"] == report["damaged_tensors"] == []
    assert report["format"] == order.to
    assert report["dtype"] == "float16"
    assert report["tensors"] == len(weights16)
    assert report["bytes"] == sum(tensor.nbytes for tensor in weights16.values())
    assert report["tensor_hash"] == verify(source16)["tensor_hash"]
    (folder / "manifest.json").unlink()
    without = verify(folder)
    assert without["ok"] and not without["manifest"]
    assert without["tensor_hash"] == report["tensor_hash"]


def test_the_hash_of_all_tensors_is_made_as_the_manifest_explains(
    folder: Path, weights16: Tensors
) -> None:
    lines = []
    for name in sorted(weights16):
        tensor = weights16[name]
        digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        lines.append(f"{name} float16 {'x'.join(map(str, tensor.shape))} {digest}\n")
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    manifest = read_manifest(folder)
    assert manifest is not None and manifest["tensor_hash"] == expected
    assert verify(folder)["tensor_hash"] == expected


def test_a_flipped_byte_anywhere_is_found_and_its_tensor_named(
    folder: Path, little_memory: None
) -> None:
    draw = random.Random(20)
    rows = list(places(folder))
    manifest, files = folder / "manifest.json", files_of(folder)
    assert manifest in files
    for number in range(FLIPS):
        if number % 3:
            file = draw.choice(files)
            position = draw.randrange(file.stat().st_size)
        else:
            _, _, file, start, stop = draw.choice(rows)
            position = draw.randrange(start, stop)
        mask = draw.randrange(1, 256)
        flip(file, position, mask)
        where = f"byte {position} of {file.relative_to(folder)} ^ {mask}"
        if file == manifest:
            with pytest.raises(InputError, match=r"manifest\.json is damaged"):
                verify(folder)
        else:
            report = verify(folder)
            hit = {n for n, _, f, start, stop in rows if f == file and start <= position < stop}
            assert not report["ok"], where
            assert file.relative_to(folder).as_posix() in "".join(report["problems"]), where
            assert set(report["damaged_tensors"]) == hit, where
        flip(file, position, mask)
    assert verify(folder)["ok"]


def test_damaged_weights_have_another_hash_than_intact_ones(folder: Path) -> None:
    intact = verify(folder)["tensor_hash"]
    _, role, file, start, _ = next(row for row in places(folder) if row[1] == "data")
    flip(file, start, 1)
    assert verify(folder)["tensor_hash"] != intact
    flip(file, start, 1)
    assert verify(folder)["tensor_hash"] == intact


@pytest.mark.parametrize("role", ["data", "copy", "padding"])
def test_a_flipped_byte_in_data_copy_or_padding_names_that_tensor(
    role: str, intact: dict[str, Path], tmp_path: Path
) -> None:
    for of in ("classic", "deepspeed"):
        folder = tmp_path / of
        shutil.copytree(intact[of], folder)
        rows = [place for place in places(folder) if place[1] == role]
        draw = random.Random(3)
        for name, _, file, start, stop in draw.sample(rows, 8 if len(rows) > 8 else len(rows)):
            position, mask = draw.randrange(start, stop), draw.randrange(1, 256)
            flip(file, position, mask)
            report = verify(folder)
            assert not report["ok"]
            assert report["damaged_tensors"] == [name]
            flip(file, position, mask)


def test_every_damaged_tensor_is_named(folder: Path) -> None:
    chosen = {}
    for name, role, file, start, _ in places(folder):
        if role == "data" and name.endswith(("up_proj.weight", "norm.weight")):
            chosen[name] = file, start
    for file, start in chosen.values():
        flip(file, start, 1)
    assert verify(folder)["damaged_tensors"] == sorted(chosen)
    assert len(chosen) == 3 * 4 + 1


def test_a_sign_flipped_at_a_zero_is_damage_even_in_a_copy(tmp_path: Path) -> None:
    weights = drawn(small(), torch.float16)
    zeros = {"model.layers.0.self_attn.o_proj.bias", "model.embed_tokens.weight"}
    for name in zeros:
        weights[name].zero_()
    source = write_source(tmp_path / "source", small(), weights)
    folder = tmp_path / "classic"
    converted(source, folder, "classic", tensor_parallel=4)
    for name, role, file, start, _ in list(places(folder)):
        if name in zeros and role != "data":
            flip(file, start + 1, 0x80)
            report = verify(folder)
            assert not report["ok"]
            assert report["damaged_tensors"] == [name], role
            flip(file, start + 1, 0x80)


def test_no_flipped_bit_of_an_archives_frame_escapes_as_another_error(
    intact: dict[str, Path], tmp_path: Path, little_memory: None
) -> None:
    """The frame: all bytes of a file that are in no tensor."""
    escaped: dict[str, str] = {}
    for of, name in (("classic", "release/mp_rank_01_000/model_optim_rng.pt"),
                     ("megatron", "__0_0.distcp")):  # fmt: skip
        folder = tmp_path / of
        shutil.copytree(intact[of], folder)
        file = folder / name
        taken = {
            byte
            for _, _, where, start, stop in places(folder) if where == file
            for byte in range(start, stop)
        }  # fmt: skip
        frame = sorted(set(range(file.stat().st_size)) - taken)
        draw = random.Random(9)
        for position in draw.sample(frame, 150):
            mask = 1 << draw.randrange(8)
            flip(file, position, mask)
            try:
                assert not verify(folder)["ok"]
            except Exception as error:
                reason = f"{name} byte {position} ^ {mask}: {str(error)[:100]}"
                escaped.setdefault(type(error).__name__, reason)
            flip(file, position, mask)
    assert escaped == {}


def test_missing_truncated_longer_and_extra_files_are_told(folder: Path) -> None:
    for file in files_of(folder):
        name = file.relative_to(folder).as_posix()
        if name == "manifest.json":
            continue
        data = file.read_bytes()
        file.unlink()
        assert f"{name} is missing" in told(folder)
        for changed in (data[:-1], b"", data + b"\0"):
            file.write_bytes(changed)
            assert any(
                problem.startswith(f"{name} has {len(changed):,} bytes")
                for problem in told(folder)
            )  # fmt: skip
        file.write_bytes(data)
    (folder / "extra.bin").write_bytes(b"x")
    (folder / "below").mkdir()
    (folder / "below" / "more.txt").write_text("x")
    problems = told(folder)
    assert "extra.bin was not there when the manifest was made" in problems
    assert "below/more.txt was not there when the manifest was made" in problems
    (folder / "extra.bin").unlink()
    shutil.rmtree(folder / "below")
    assert verify(folder)["ok"]


def told(folder: Path) -> list[str]:
    report = verify(folder)
    assert not report["ok"]
    problems: list[str] = report["problems"]
    return problems


def test_all_files_that_are_not_right_are_told_at_once(folder: Path, little_memory: None) -> None:
    files = [file for file in files_of(folder) if file.name != "manifest.json"]
    for file in files[1:]:
        flip(file, file.stat().st_size - 1, 0xFF)
    files[0].unlink()
    problems = "\n".join(told(folder))
    for file in files:
        assert file.relative_to(folder).as_posix() in problems


def test_the_manifest_names_every_file_by_size_and_hash(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"] == {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in files_of(folder)
        if file.name != "manifest.json"
    }
    assert manifest["format"] == ORDERS[folder.name].to


def test_swapped_files_of_equal_size_are_damage(intact: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "deepspeed"
    shutil.copytree(intact["deepspeed"], folder)
    one, two = (folder / "release" / f"mp_rank_0{i}_model_states.pt" for i in (1, 2))
    assert one.stat().st_size == two.stat().st_size
    one.rename(folder / "aside")
    two.rename(one)
    (folder / "aside").rename(two)
    report = verify(folder)
    assert not report["ok"]
    assert "model.layers.0.mlp.gate_proj.weight" in report["damaged_tensors"]
    assert "model.norm.weight" not in report["damaged_tensors"]


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_source_damaged_after_its_manifest_was_written_is_not_converted(
    dtype: str | None, folder: Path, tmp_path: Path
) -> None:
    name, _, file, start, _ = next(
        place for place in places(folder)
        if place[0] == "model.layers.2.self_attn.v_proj.weight" and place[1] == "data"
    )  # fmt: skip
    flip(file, start, 0x10)
    for to in FORMATS:
        with pytest.raises(InputError, match=f"{name} is not what its manifest.json says"):
            converted(folder, tmp_path / f"to {to}", to, dtype=dtype)
        assert not (tmp_path / f"to {to}").exists()


def test_damage_in_a_sources_padding_does_no_harm_in_its_copies_it_does(
    intact: dict[str, Path], weights16: Tensors, tmp_path: Path
) -> None:
    folder = tmp_path / "classic"
    shutil.copytree(intact["classic"], folder)
    by_role = {role: (name, file, start) for name, role, file, start, _ in places(folder)}
    _, file, start = by_role["padding"]
    flip(file, start, 1)
    converted(folder, tmp_path / "one", "huggingface")
    assert_equal(read_all(tmp_path / "one"), weights16)
    name, file, start = by_role["copy"]
    flip(file, start, 1)
    with pytest.raises(InputError, match=name):
        converted(folder, tmp_path / "two", "huggingface")
    assert not (tmp_path / "two").exists()


def test_copies_that_are_the_same_bits_are_the_same_though_not_numbers(tmp_path: Path) -> None:
    weights = drawn(small(), torch.float16)
    weights["model.norm.weight"][3] = float("nan")
    source = write_source(tmp_path / "source", small(), weights)
    converted(source, tmp_path / "classic", "classic", tensor_parallel=2)
    converted(tmp_path / "classic", tmp_path / "back", "huggingface")
    assert verify(tmp_path / "back")["tensor_hash"] == verify(source)["tensor_hash"]


def test_other_weights_have_another_hash_and_the_same_ones_the_same(
    tmp_path: Path, intact: dict[str, Path], weights16: Tensors
) -> None:
    hashes = {verify(path)["tensor_hash"] for path in intact.values()}
    assert len(hashes) == 1
    others: dict[str, Any] = {
        "seed": drawn(small(), torch.float16, seed=1),
        "dtype": {name: tensor.float() for name, tensor in weights16.items()},
        "one bit": {name: tensor.clone() for name, tensor in weights16.items()},
        "two tensors swapped": {**weights16},
    }
    others["one bit"]["model.norm.weight"].view(torch.int16)[HIDDEN - 1] ^= 1
    a, b = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    others["two tensors swapped"] |= {a: weights16[b], b: weights16[a]}
    for name, weights in others.items():
        hashes.add(verify(write_source(tmp_path / name, small(), weights))["tensor_hash"])
    assert len(hashes) == 1 + len(others)
    save_file(weights16, tmp_path / "seed" / "model.safetensors")
    assert verify(tmp_path / "seed")["tensor_hash"] in hashes


def test_progress_reaches_what_there_is(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    verify(folder, progress=lambda what, done, total: told.append((what, done, total)))
    assert max(done for _, done, _ in told) == told[-1][2] > 0
    assert {what for what, _, _ in told} == {"checksums"}
