"""The torch_npu wheel that pyproject's `npu` extra pins, unpacked beside stub libraries of CANN.

torch_npu links against CANN, which only Ascend machines have. What it needs of it stands in its own
symbol tables: every name that neither it, nor torch, nor the system defines. A library that defines
these names, and returns 0 from each, lets it be imported; whatever would touch a device fails.

The wheel is never installed: with it, `import torch` itself fails where CANN is not.
"""

import contextlib
import ctypes
import fcntl
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


class UnavailableError(Exception):
    """The wheel cannot be had, or stubs not be compiled, on this machine; says why."""


@dataclass(frozen=True)
class Stubbed:
    """torch_npu as a process without CANN can import it."""

    packages: Path
    """Folder with the unpacked wheel."""
    libraries: Path
    """Folder with the stub libraries."""

    @property
    def environment(self) -> dict[str, str]:
        """For a process of its own: the loader reads these before Python starts."""
        paths = [str(REPOSITORY), str(self.packages), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "LD_LIBRARY_PATH": str(self.libraries),
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        }


def stubbed_torch_npu() -> Stubbed:
    """Downloads, unpacks and compiles what is not in the cache yet. Raises UnavailableError."""
    requirement = pinned()
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    torch = importlib.metadata.version("torch")
    folder = cache() / f"{requirement.replace('==', '-')}-{python}-torch-{torch}"
    with _locked(folder):
        if not folder.exists():
            _make_in_place(folder, requirement)
    return Stubbed(folder / "packages", folder / "libraries")


def pinned() -> str:
    """`torch_npu==X.Y.Z`."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith("npu = ["))
    return line.split('"')[1]


def cache() -> Path:
    """`INTERNLM_TEST_CACHE`, or below the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("INTERNLM_TEST_CACHE") or home / "internlm-kit") / "npu_contract"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Tests run in several processes; one makes the folder, the others wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_in_place(folder: Path, requirement: str) -> None:
    """All or nothing: the folder gets its name when it is whole."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch, "made")
        packages, libraries = made / "packages", made / "libraries"
        for path in (packages, libraries):
            path.mkdir(parents=True)
        with zipfile.ZipFile(_download(requirement, Path(scratch))) as wheel:
            wheel.extractall(packages)
        _compile_stubs(packages / "torch_npu", libraries)
        shutil.move(made, folder)


def _download(requirement: str, folder: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--dest", str(folder), requirement,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing was downloaded"]
        raise UnavailableError(f"pip download {requirement}: {said[-1]}")
    return wheels[0]


def _compile_stubs(package: Path, folder: Path) -> None:
    """One library with every missing name, and an empty one for each other library that is asked
    for; all under the names that the loader looks for."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler or not shutil.which("nm") or not shutil.which("readelf"):
        raise UnavailableError("no C compiler with binutils (gcc, nm, readelf) to make stubs with")
    built = sorted(package.rglob("*.so"))
    first, *others = sorted(_missing_libraries(built))
    names = sorted(_missing_symbols(built))
    source = folder / "stubs.c"
    lines = (
        f'long stub_{number}(void) __asm__("{name}");\nlong stub_{number}(void) {{ return 0; }}\n'
        for number, name in enumerate(names)
    )
    source.write_text("".join(lines))
    empty = folder / "empty.c"
    empty.write_text("")
    for library, text in [(first, source), *((other, empty) for other in others)]:
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o",
                   str(folder / library), str(text)]  # fmt: skip
        subprocess.run(command, check=True)


def _missing_symbols(built: Iterable[Path]) -> set[str]:
    """Undefined, strong names without a version (glibc's and libstdc++'s have one) that nobody has
    who is there."""
    undefined: set[str] = set()
    defined: set[str] = set()
    for library in built:
        lines = _output("nm", "-D", "--with-symbol-versions", str(library)).splitlines()
        for *_, kind, name in (line.split() for line in lines):
            if kind == "U" and "@" not in name:
                undefined.add(name)
            elif kind not in "Uwv":
                defined.add(name.partition("@")[0])
    there = _loaded()
    return {name for name in undefined - defined if not any(_has(lib, name) for lib in there)}


def _missing_libraries(built: Iterable[Path]) -> set[str]:
    needed: set[str] = set()
    for library in built:
        for line in _output("readelf", "-d", str(library)).splitlines():
            if "(NEEDED)" in line:
                needed.add(line.split("[")[1].rstrip("]"))
    own = {library.name for library in built}
    return {name for name in needed - own if not _loads(name)}


def _loads(name: str) -> bool:
    """Whether the system or torch has a library of this name."""
    if any((folder / name).exists() for folder in _torch_folders()):
        return True
    with contextlib.suppress(OSError):
        ctypes.CDLL(name)
        return True
    return False


def _loaded() -> list[ctypes.CDLL]:
    """This process, and torch's libraries."""
    import torch  # noqa: F401

    paths = [p for folder in _torch_folders() for p in sorted(folder.glob("*.so*"))]
    libraries = [ctypes.CDLL(None)]
    for path in paths:
        with contextlib.suppress(OSError):
            libraries.append(ctypes.CDLL(str(path)))
    return libraries


def _torch_folders() -> list[Path]:
    import torch

    return [Path(torch.__file__).parent / "lib"]


def _has(library: ctypes.CDLL, name: str) -> bool:
    try:
        getattr(library, name)
    except AttributeError:
        return False
    return True


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
