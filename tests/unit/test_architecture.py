"""Floors, restricted packages and import time: the house stands as CONTRIBUTING.md draws it."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "internlm_lib"

HOUSE = (
    ("errors", "files", "provenance", "journal", "run_folder", "processes"),
    ("experiment", "devices", "published"),
    ("data", "kernels", "tracking", "ranks", "logs"),
    ("model",),
    ("weights", "engines"),
    ("training", "generation", "reporting", "planning"),
    ("evaluation",),
    ("stages", "selftest", "notebook", "doctor"),
    ("pipeline", "progress", "cli"),
)
"""Rooms by floor. A room imports from lower floors only; on the ground floor and the two upper
ones, which are single modules, also from those named before it."""
FLOORS = {name: floor for floor, rooms in enumerate(HOUSE) for name in rooms}
OPEN_FLOORS = (0, 7, 8)

ALLOWED_IN = {
    "mlflow": ("tracking/",),
    "deepspeed": ("engines/zero.py", "weights/zero.py"),
    "megatron": (
        "devices/", "model/", "engines/", "weights/", "data/batches.py", "data/blend.py",
        "data/indexed.py", "data/instruction.py", "data/parts.py", "data/pretrain.py",
        "training/", "generation/",
    ),
    "lm_eval": ("evaluation/",),
    "papermill": ("pipeline.py",),
}  # fmt: skip

HEAVY = (
    "torch", "mlflow", "transformers", "matplotlib", "pandas", "pyarrow", "megatron", "deepspeed",
    "lm_eval", "papermill", "nbconvert", "IPython", "sentencepiece", "rich",
)  # fmt: skip
MAY_LOAD_HEAVY = ("model/", "engines/", "weights/", "generation/", "evaluation/", "kernels/",
                  "training/", "devices/cpu_megatron.py", "devices/megatron_points.py",
                  "data/", "selftest/")  # fmt: skip
"""Modules that are themselves only imported where their packages are needed."""

IMPORT_SECONDS = 0.3


def modules() -> list[str]:
    """All modules, as paths below the package."""
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    return module.split("/")[0].removesuffix(".py")


def imports(module: str, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names a module imports, those under `if TYPE_CHECKING:` left out."""
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        else:
            pending.extend(ast.iter_child_nodes(node))


def own_rooms(module: str) -> set[str]:
    """Rooms of the kit that a module imports from."""
    names = (name.split(".") for name in imports(module))
    parts = [name for name in names if name[0] == "internlm_lib" and len(name) > 1]
    return {name[1] for name in parts if name[1] != "__version__"}


def may_import(here: str, other: str) -> bool:
    floor = FLOORS[here]
    beside = HOUSE[floor][: HOUSE[floor].index(here)] if floor in OPEN_FLOORS else ()
    return FLOORS[other] < floor or other in beside


def test_every_module_has_a_floor() -> None:
    rooms = {room(module) for module in modules()} - {"__init__"}
    assert rooms <= FLOORS.keys()


@pytest.mark.parametrize("module", [m for m in modules() if m != "__init__.py"])
def test_a_floor_imports_only_lower_floors(module: str) -> None:
    here = room(module)
    wrong = {name for name in own_rooms(module) - {here} if not may_import(here, name)}
    assert wrong == set(), f"{module} on floor {FLOORS[here]} imports from {wrong}"


@pytest.mark.parametrize("package", ALLOWED_IN)
def test_restricted_packages_stay_in_their_rooms(package: str) -> None:
    users = {m for m in modules() if package in {name.split(".")[0] for name in imports(m)}}
    assert {m for m in users if not m.startswith(ALLOWED_IN[package])} == set()


def test_heavy_packages_are_imported_inside_functions() -> None:
    found = {
        (module, name.split(".")[0])
        for module in modules()
        if not module.startswith(MAY_LOAD_HEAVY)
        for name in imports(module, top_level_only=True)
        if name.split(".")[0] in HEAVY
    }
    assert found == set()


def test_floors_are_told_apart() -> None:
    assert may_import("weights", "model") and may_import("cli", "pipeline")
    assert not may_import("model", "weights") and not may_import("weights", "engines")
    assert not may_import("stages", "notebook")


def test_the_walk_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "errors.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import pandas\n"
        "from internlm_lib.cli import main\nfrom internlm_lib import journal\n"
        "def f():\n    import torch.nn\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert own_rooms("errors.py") == {"cli", "journal"}
    assert "torch.nn" in set(imports("errors.py"))
    assert "torch.nn" not in set(imports("errors.py", top_level_only=True))
    assert "pandas" not in set(imports("errors.py"))


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_the_package_is_light_and_quick() -> None:
    code = (
        "import time; start = time.perf_counter(); import internlm_lib; "
        "print(time.perf_counter() - start)"
    )
    assert min(float(run_python(code)) for _ in range(3)) < IMPORT_SECONDS


@pytest.mark.parametrize(
    "module",
    ["internlm_lib", "internlm_lib.cli", "internlm_lib.pipeline", "internlm_lib.notebook",
     "internlm_lib.stages.stage", "internlm_lib.experiment.load"],
)  # fmt: skip
def test_the_frame_loads_neither_torch_nor_mlflow(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'mlflow') if m in sys.modules])"
    assert run_python(code) == "[]"


def test_stages_load_without_torch() -> None:
    """A notebook's kernel stays small: torch lives in the ranks it starts."""
    names = sorted(path.stem for path in (PACKAGE / "stages").glob("[a-z]*.py"))
    lines = "\n".join(f"import internlm_lib.stages.{name}" for name in names)
    loaded = f"import sys\n{lines}\nprint([m for m in ('torch', 'mlflow') if m in sys.modules])"
    assert run_python(loaded) == "[]"


def test_help_answers_at_once() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run_python("import sys; sys.argv = ['internlm', '--help']; import internlm_lib.cli as c\n"
                   "try: c.main()\nexcept SystemExit as end: sys.exit(end.code)")  # fmt: skip
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5
