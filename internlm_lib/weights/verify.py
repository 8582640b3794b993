"""Is a checkpoint, byte by byte, what was written? And if not, which tensor is damaged?"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.weights.checkpoint import Checkpoint, LogicalTensor
from internlm_lib.weights.convert import THREADS, Progress, blocks, hash_files
from internlm_lib.weights.formats import open_checkpoint
from internlm_lib.weights.manifest import (
    MANIFEST,
    TensorHasher,
    read_manifest,
    tensor_entry,
    tensor_hash,
)
from internlm_lib.weights.storage import same_bits


def verify(
    path: Path, model: ModelSection | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Check a checkpoint against its manifest; without one, names and shapes against its model.

    Returns:
        `ok`, `problems` (one text each), `damaged_tensors`, `format`, `layout`, `dtype`, `tensors`,
        `bytes`, `tensor_hash` (of what lies there now; None where the weights cannot be read),
        `manifest` (whether there is one).
    Raises:
        InputError: if the manifest is damaged, or, without one, the checkpoint cannot be read.
    """
    manifest = read_manifest(path)
    tell = progress or (lambda what, done, total: None)
    if manifest is None:
        with open_checkpoint(path, model) as weights:
            return _report(weights, hash_tensors(weights, weights.names(), tell), manifest=False)
    problems, suspects = _file_problems(path, manifest, tell)
    try:
        weights = open_checkpoint(path, model)
    except InputError as error:
        return {
            "ok": False,
            "problems": [*problems, str(error)],
            "damaged_tensors": [],
            "format": manifest["format"],
            "layout": manifest["layout"],
            "dtype": None,
            "tensors": len(manifest.get("tensors", {})),
            "bytes": None,
            "tensor_hash": None,
            "manifest": True,
        }
    with weights:
        entries, damaged = _compared(weights, manifest, suspects, tell)
        report = _report(weights, entries, manifest=True)
    if suspects and not damaged:
        problems.append("the damage lies outside of the tensors' own bytes")
    report |= {"ok": not problems, "problems": problems, "damaged_tensors": sorted(damaged)}
    return report


def hash_tensors(
    weights: Checkpoint, names: Sequence[str], progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """The manifest's entries of some tensors, several at once."""
    tell = progress or (lambda what, done, total: None)
    total = sum(weights.tensors[name].nbytes for name in names)
    done = 0

    def hashed(name: str) -> tuple[str, dict[str, Any]]:
        nonlocal done
        entry = tensor_entry(weights, name, _sha256(weights, name))
        done += weights.tensors[name].nbytes
        tell("tensors", done, total)
        return name, entry

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(pool.map(hashed, names))


def _file_problems(
    path: Path, manifest: Mapping[str, Any], progress: Progress
) -> tuple[list[str], set[Path]]:
    """What is wrong with files, and the files that differ though their size is right."""
    problems, same_size, done = [], [], 0
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif (size := file.stat().st_size) != entry["bytes"]:
            problems.append(f"{name} has {size:,} bytes, {entry['bytes']:,} were written")
        else:
            same_size.append(file)
    total = sum(file.stat().st_size for file in same_size)

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("checksums", done, total)

    hashes = hash_files(same_size, advance)
    suspects = set()
    for file, digest in hashes.items():
        name = file.relative_to(path).as_posix()
        if digest != manifest["files"][name]["sha256"]:
            problems.append(f"{name} is not what was written: its SHA-256 differs")
            suspects.add(file)
    known = {*manifest["files"], MANIFEST}
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    problems += [f"{name} was not there when the manifest was made" for name in found - known]
    return problems, suspects


def _compared(
    weights: Checkpoint, manifest: Mapping[str, Any], suspects: set[Path], progress: Progress
) -> tuple[dict[str, Any], list[str]]:
    """The entries of what lies there now, and the tensors that are not what was written.

    Of a training's state the files alone are hashed: every tensor in a suspect one counts.
    """
    lying = [name for name, tensor in weights.tensors.items() if _lies_in(tensor, suspects)]
    if "tensors" not in manifest:
        return hash_tensors(weights, weights.names(), progress), lying
    entries, damaged = dict(manifest["tensors"]), []
    for name in lying:
        found = _sha256(weights, name)
        if found != entries[name]["sha256"] or _copies_differ(weights, name):
            damaged.append(name)
        entries[name] = {**entries[name], "sha256": found}
    return entries, damaged


def _lies_in(tensor: LogicalTensor, files: set[Path]) -> bool:
    return any(part.stored.files & files for part in tensor.parts)


def _copies_differ(weights: Checkpoint, name: str) -> bool:
    """Whether copies or paddings of a tensor on other ranks are not what it is itself."""
    return any(
        not same_bits(weights.read_stored(part), weights.read(name, part.piece.rows))
        for part in weights.tensors[name].parts
        if part.piece.role != "data"
    )


def _sha256(weights: Checkpoint, name: str) -> str:
    hasher = TensorHasher()
    for _, block in blocks(weights, name):
        hasher.update(block)
    return hasher.hexdigest()


def _report(
    weights: Checkpoint, entries: Mapping[str, Mapping[str, Any]], *, manifest: bool
) -> dict[str, Any]:
    return {
        "ok": True,
        "problems": [],
        "damaged_tensors": [],
        "format": weights.format_name,
        "layout": weights.layout,
        "dtype": weights.dtype,
        "tensors": len(weights.tensors),
        "bytes": weights.nbytes,
        "tensor_hash": tensor_hash(entries),
        "manifest": manifest,
    }
