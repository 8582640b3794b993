"""What a result was made with: versions, commit, environment, host. Imports nothing heavy."""

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from internlm_lib.files import sha256_of_json

PACKAGES = ("torch", "torch_npu", "megatron-core", "deepspeed", "transformers", "mlflow")

UNKNOWN = "unknown"

_EXPERIMENT_SECTIONS = ("model", "data", "training", "optimizer")
_HOW_NOT_WHAT = {
    "model": ("preset", "weights", "direct_start"),
    "data": ("train_path", "blend", "columns", "tokenizer_model"),
    "training": (
        "deterministic_mode",
        "micro_batch_size",
        "use_flash_attn",
        "use_fused_rmsnorm",
        "use_fused_rotary_pos_emb",
        "use_fused_swiglu",
        "recompute_granularity",
        "recompute_method",
        "recompute_num_layers",
        "auto_recompute_device_memory_mib",
        "eval_interval",
        "eval_iters",
        "save_interval",
        "keep_checkpoints",
        "async_save",
        "max_restarts",
        "hang_timeout_seconds",
    ),
}
"""Keys that change how an experiment is computed or where its files lie, not what it computes.
The files themselves are told apart by their own hashes."""


class Dumpable(Protocol):
    """An experiment, as far as this floor may know it."""

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


def record() -> dict[str, Any]:
    """Flat record of software and host, for a report or for tags.

    Keys: those of `software`, `environment_sha256`, `cpu_model`, `cpu_cores`, `memory_bytes`.
    """
    return {**software(), "environment_sha256": environment_sha256(), **_host()}


def software() -> dict[str, Any]:
    """Flat record of what computed a result, wherever it did.

    Keys: `python`, `platform`, one per installed package of `PACKAGES`, `git_commit` ("unknown"
    outside a checkout), `git_dirty`.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **package_versions(),
        **git_state(Path(__file__).resolve().parents[1]),
    }


def package_versions() -> dict[str, str]:
    """Versions of the installed ones of `PACKAGES`."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def environment_sha256() -> str:
    """SHA-256 of the sorted `name==version` lines of all installed distributions."""
    # A distribution's name and version each read its file anew.
    found = (distribution.metadata for distribution in metadata.distributions())
    lines = {f"{d['Name'].lower().replace('_', '-')}=={d['Version']}" for d in found}
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def sha256_of_experiment(experiment: Dumpable) -> str:
    """SHA-256 of what decides the numbers of a training, whatever device or layout computes it.

    Runs of one params file on two devices, and the two layouts of one run, have the same hash.
    """
    values = experiment.model_dump(mode="json")
    chosen = {
        name: {k: v for k, v in values[name].items() if k not in _HOW_NOT_WHAT.get(name, ())}
        for name in _EXPERIMENT_SECTIONS
    }
    return sha256_of_json(chosen)


def git_state(checkout: Path) -> dict[str, Any]:
    """Commit of `checkout` and whether tracked or new files differ from it.

    An enclosing repository, as around an installed package, does not count.
    """
    top = _git(checkout, "rev-parse", "--show-toplevel")
    commit = _git(checkout, "rev-parse", "--verify", "HEAD")
    if not top or not commit or Path(top) != checkout:
        return {"git_commit": UNKNOWN, "git_dirty": UNKNOWN}
    return {"git_commit": commit, "git_dirty": bool(_git(checkout, "status", "--porcelain"))}


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _host() -> dict[str, Any]:
    import psutil

    return {
        "cpu_model": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _cpu_model() -> str:
    """Marketing name where the kernel tells it (x86); the architecture elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
