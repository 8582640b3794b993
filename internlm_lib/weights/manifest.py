"""What a checkpoint consists of, by hash: per file as it lies there, per tensor as it is meant.

A tensor's hash is SHA-256 over its elements in row-major order, little-endian, in the dtype it is
stored in: it depends on neither format nor layout. The `tensor_hash` over all of them says whether
two checkpoints hold the same weights.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from internlm_lib.errors import InputError
from internlm_lib.files import json_text, sha256_of_json, write_json
from internlm_lib.weights.checkpoint import Checkpoint
from internlm_lib.weights.storage import bytes_of

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A folder's manifest; None if it has none.

    Raises InputError if a byte of it is not as it was written.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    text = path.read_bytes()
    try:
        manifest: dict[str, Any] = json.loads(text)
        own = manifest.pop("manifest_sha256")
        intact = own == sha256_of_json(manifest)
        manifest["manifest_sha256"] = own
        intact = intact and json_text(manifest).encode() == text
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}; copy it again") from error
    if not intact:
        raise InputError(f"{path} is damaged: its hash does not fit; copy it again")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> Path:
    return write_json(folder / MANIFEST, {**manifest, "manifest_sha256": sha256_of_json(manifest)})


def tensor_entry(checkpoint: Checkpoint, name: str, sha256: str) -> dict[str, Any]:
    tensor = checkpoint.tensors[name]
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "sha256": sha256}


def tensor_hash(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """One hash over all tensors: of their lines `name dtype shape sha256`, sorted by name."""
    lines = (
        f"{name} {entry['dtype']} {'x'.join(map(str, entry['shape']))} {entry['sha256']}\n"
        for name, entry in sorted(entries.items())
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class TensorHasher:
    """SHA-256 of a tensor that is given block by block, in the order of its rows."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, block: Tensor) -> None:
        self._digest.update(bytes_of(block.contiguous()))

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
