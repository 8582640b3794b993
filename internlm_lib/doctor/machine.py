"""All checks but those of an NPU, which are in `ascend`."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from internlm_lib.doctor.ascend import npu_findings
from internlm_lib.doctor.finding import INSTALL, Finding, probe, version_of
from internlm_lib.errors import InputError
from internlm_lib.experiment.variables import DeviceName
from internlm_lib.run_folder import project_root

if TYPE_CHECKING:
    from rich.console import Console

KERNEL = "internlm"
PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers", "lm-eval", "mlflow", "papermill")

_GIB = 1 << 30
_DISK_BYTES, _MEMORY_BYTES = 4 * _GIB, 4 * _GIB
"""What the tiny experiment needs at most."""
_PYTHONS = ((3, 10), (3, 13))


def examine(device: str | None = None) -> list[Finding]:
    """All findings, in the order a reader would check them.

    Args:
        device: `npu`, `cuda` or `cpu`: what it lacks to be trained on is then a failure. None looks
            at all devices, and finds nothing wrong with one that is not there.
    Raises:
        InputError: the device is none of these.
    """
    if device not in (None, *get_args(DeviceName)):
        raise InputError(f"--device {device}: give one of {', '.join(get_args(DeviceName))}")
    checks: tuple[Callable[[], list[Finding]], ...] = (
        _python, _packages, partial(_devices, required=device == "cuda"),
        partial(npu_findings, required=device == "npu"), _memory, _disk, _kernel, _mlflow_store,
    )  # fmt: skip
    return [finding for check in checks for finding in check()]


def print_findings(findings: Sequence[Finding], console: "Console") -> None:
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table("check", "status")
    table.add_column("found", overflow="fold")
    table.add_column("fix", overflow="fold")
    for finding in findings:
        mark = f"[{colours[finding.status]}]{finding.status}[/]"
        table.add_row(finding.name, mark, escape(finding.found), escape(finding.fix))
    console.print(table)


def _python() -> list[Finding]:
    low, high = _PYTHONS
    good = low <= sys.version_info[:2] < high
    found = f"{sys.version.split()[0]} at {sys.prefix}"
    fix = "make env PYTHON=python3.11 (3.10, 3.11 and 3.12 are supported)"
    return [Finding("python", "ok" if good else "fail", found, "" if good else fix)]


def _packages() -> list[Finding]:
    """Versions installed against those of requirements.lock."""
    lock = Path(__file__).resolve().parents[2] / "requirements.lock"
    if not lock.exists():
        return [Finding("packages", "fail", f"{lock} is missing", "run from a checkout of the kit")]
    locked = locked_versions(lock.read_text(encoding="utf-8"))
    return [_package(name, locked.get(name)) for name in PACKAGES]


def locked_versions(text: str) -> dict[str, str]:
    """Versions that a lock file pins for this Python and platform, by distribution name."""
    from packaging.requirements import Requirement

    versions = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith(("#", "-")):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            versions[requirement.name] = str(requirement.specifier).removeprefix("==")
    return versions


def _package(name: str, wanted: str | None) -> Finding:
    version = version_of(name)
    if version is None:
        return Finding(name, "fail", "not installed", INSTALL)
    if wanted is None or version.split("+")[0] == wanted:
        return Finding(name, "ok", version)
    return Finding(
        name, "warn", f"{version}, locked is {wanted}", f"{INSTALL}, or test what you changed"
    )


_PROBE = """
import json, torch
found = {"cpu": 1, "cuda": torch.cuda.device_count()}
if found["cuda"]:
    found["name"] = torch.cuda.get_device_name(0)
print(json.dumps({"torch": torch.__version__, **found}))
"""


def _devices(required: bool = False) -> list[Finding]:
    """What torch sees on its own, without torch_npu.

    Args:
        required: whether a GPU must be there.
    """
    done = probe(_PROBE)
    if isinstance(done, str):
        return [Finding("import torch", "fail", done, f"{INSTALL}; torch must import by itself")]
    cpu = Finding("cpu", "ok", f"{os.cpu_count()} cores")
    if done["cuda"]:
        return [cpu, Finding("cuda", "ok", f"{done['cuda']} x {done['name']}")]
    if shutil.which("nvidia-smi"):
        fix = (
            "match driver and torch: `nvidia-smi` shows the driver's CUDA version, and torch's CPU "
            f"build has none (here: {done['torch']})"
        )
        found = "nvidia-smi is there, torch sees no GPU"
        return [cpu, Finding("cuda", "fail" if required else "warn", found, fix)]
    if required:
        fix = "install NVIDIA's driver: `nvidia-smi` must list the GPU; in a container, pass it on"
        return [cpu, Finding("cuda", "fail", "no GPU, no nvidia-smi", fix)]
    return [cpu, Finding("cuda", "ok", "none here")]


def _memory() -> list[Finding]:
    import psutil

    free = psutil.virtual_memory().available
    fix = "close other programs: the tiny experiment needs up to 4 GiB"
    return [_enough("memory", free, _MEMORY_BYTES, fix)]


def _disk() -> list[Finding]:
    fix = "free some space: runs/ and reports/ lie in this folder; big checkpoints need far more"
    return [_enough("disk", shutil.disk_usage(project_root()).free, _DISK_BYTES, fix)]


def _enough(name: str, free: int, needed: int, fix: str) -> Finding:
    good = free >= needed
    found = f"{free / _GIB:.1f} GiB free"
    return Finding(name, "ok" if good else "warn", found, "" if good else fix)


def _kernel() -> list[Finding]:
    """Notebooks must run in this environment, not in whichever came first on Jupyter's path."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    fix = f"{INSTALL} (or: python -m ipykernel install --sys-prefix --name {KERNEL})"
    try:
        spec = KernelSpecManager().get_kernel_spec(KERNEL)
    except NoSuchKernel:
        return [Finding("kernel", "fail", f"no kernel named {KERNEL!r}", fix)]
    python = Path(spec.argv[0])
    here = {Path(sys.executable), *Path(sys.prefix, "bin").glob("python*")}
    if python in here or not python.is_absolute():
        return [Finding("kernel", "ok", spec.resource_dir)]
    return [Finding("kernel", "fail", f"{spec.resource_dir} starts {python}", fix)]


def _mlflow_store() -> list[Finding]:
    folder = project_root() / "mlflow"
    existing = folder if folder.exists() else folder.parent
    database = folder / "mlflow.db"
    places = [existing, database] if database.exists() else [existing]
    if all(os.access(place, os.W_OK) for place in places):
        return [Finding("mlflow store", "ok", str(folder))]
    fix = "make the folder writable, or set tracking.uri in the params file to a server"
    return [Finding("mlflow store", "fail", f"{folder} cannot be written", fix)]
