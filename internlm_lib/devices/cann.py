"""CANN and the driver of Ascend NPUs, as files and the loader tell: torch_npu is not imported here.

torch_npu cannot be imported where CANN is not. Two programs import it all the same wherever it is
installed: torch (its autoload, which makes `import torch` fail) and transformers (with its models).
`keep_torch_npu_out` keeps both from it, in every process that imports this package.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

AUTOLOAD_VARIABLE = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""0 keeps torch from importing torch_npu. Source: torch/__init__.py, `_import_device_backends`."""

ROOTS = (Path("/usr/local/Ascend"), Path(os.path.expanduser("~/Ascend")))
"""Where CANN is installed by default, by root and by others. Source: CANN's installation guide."""

_HOME_VARIABLES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
"""Set by CANN's set_env.sh."""
_SCRIPTS = ("cann/set_env.sh", "ascend-toolkit/set_env.sh", "cann-*/set_env.sh", "nnae/set_env.sh")
"""Below one of the roots, newest layout first: CANN 8.5 and later, and those before."""
_LIBRARY = "libhccl.so"
"""The first library that the loader asks CANN for; in the error where there is none."""
_DEVICE_NODES = re.compile(r"davinci\d+|davinci_manager|devmm_svm|hisi_hdc")
"""What a process needs of /dev. Source: Ascend's guides to `docker run`."""


def keep_torch_npu_out() -> None:
    """Keep torch from importing torch_npu by itself, and everyone, where CANN is not to be found.

    Call before torch is imported. Without CANN `import torch_npu` then fails as if it were not
    installed, and nobody who looks for it finds it.
    """
    os.environ.setdefault(AUTOLOAD_VARIABLE, "0")
    if "torch_npu" not in sys.modules and _is_installed() and not is_loadable():
        hide_torch_npu()


def hide_torch_npu() -> None:
    """Make torch_npu unimportable in this process: None is how Python's import system says it."""
    sys.modules["torch_npu"] = None  # type: ignore[assignment]


def is_loadable() -> bool:
    """Whether the loader of this process finds CANN, which is what sourcing set_env.sh is for."""
    folders = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep))
    if any(Path(folder, _LIBRARY).exists() for folder in folders):
        return True
    import ctypes

    try:  # in a folder of the system's own; that it is not there is told at once
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return False
    return True


def home() -> Path | None:
    """CANN's folder, as set_env.sh left it in the environment."""
    found = next(filter(None, map(os.environ.get, _HOME_VARIABLES)), None)
    return Path(found) if found else None


def set_env_scripts(roots: Iterable[Path] = ROOTS) -> list[Path]:
    """The set_env.sh of every CANN in the usual places, the one to take first."""
    found = (path for root in roots for name in _SCRIPTS for path in sorted(root.glob(name)))
    return list(dict.fromkeys(found))


def how_to_source(roots: Iterable[Path] = ROOTS) -> str:
    """What to type so that the loader finds CANN, by what is on this machine's disk."""
    roots = tuple(roots)
    if scripts := set_env_scripts(roots):
        others = f" (or {', '.join(map(str, scripts[1:]))})" if scripts[1:] else ""
        return f"source {scripts[0]}{others}"
    usual = roots[0] / "ascend-toolkit" / "set_env.sh"
    places = " or ".join(map(str, roots))
    return f"install CANN (none is in {places}), then: source {usual}"


def version(folder: Path) -> str | None:
    """Version of the CANN in a folder, e.g. `8.3.RC1`; None if no file tells it.

    Formats: `<arch>-linux/ascend_toolkit_install.info` with `version=8.3.RC1` (torch_npu's
    collect_env reads it, too), and `version.cfg` with `toolkit_running_version=[7.7.0.1:8.3.RC1]`.
    """
    infos = sorted(folder.glob("*-linux/ascend_*_install.info"))
    for path, pattern in [
        *((info, r"^version=(\S+)") for info in infos),
        (folder / "version.cfg", r"^toolkit_running_version=\[[^\]:]*:([^\]]+)\]"),
        (folder / "version.cfg", r"^runtime_running_version=\[[^\]:]*:([^\]]+)\]"),
    ]:
        if found := _search(path, pattern):
            return found
    return None


def driver_version(roots: Iterable[Path] = ROOTS) -> str | None:
    """Version of the NPU driver, e.g. `24.1.rc3`; None if it is not installed or does not tell."""
    found = (_search(root / "driver" / "version.info", r"^Version=(\S+)") for root in roots)
    return next(filter(None, found), None)


def device_nodes(folder: Path = Path("/dev")) -> list[Path]:
    """The devices of NPUs that a process must be able to open, in order of their names."""
    return sorted(path for path in folder.iterdir() if _DEVICE_NODES.fullmatch(path.name))


def _is_installed() -> bool:
    return importlib.util.find_spec("torch_npu") is not None


def _search(path: Path, pattern: str) -> str | None:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(pattern, text, re.MULTILINE)
    return found.group(1) if found else None
