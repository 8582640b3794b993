"""Run in a process of its own: megatron-core as a training of this kit loads it, adapted to a CPU.

Prints the points at which its source reaches CUDA (`megatron_cuda`), and those of them that after
the adaptation still are what the source says.
"""

import contextlib
import gc
import importlib
import importlib.metadata
import inspect
import json
import pkgutil
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from internlm_lib.devices import select_device
from tests.npu_contract.megatron_cuda import AT_IMPORT, scan

ROOMS = ("data", "engines", "generation", "model", "training", "weights")
"""The rooms whose modules a rank imports."""


def main() -> None:
    gc.disable()  # a quarter of the time, over imports and syntax trees that stay
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")  # of the optional packages that are not there
        select_device("cpu").adapt_megatron()
        for room in ROOMS:
            package = importlib.import_module(f"internlm_lib.{room}")
            for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
                importlib.import_module(module.name)
    points = scan(sources())
    answer = {
        "version": importlib.metadata.version("megatron-core"),
        "points": points,
        "left": {what: [p for p in places if is_left(what, p)] for what, places in points.items()},
    }
    print(json.dumps(answer))


def sources() -> dict[str, Path]:
    """The loaded modules of megatron-core in Python, and the files they were read from."""
    loaded = {n: m for n, m in sorted(sys.modules.items()) if n.startswith("megatron.core")}
    files = {name: getattr(module, "__file__", None) for name, module in loaded.items()}
    return {name: Path(file) for name, file in files.items() if file and file.endswith(".py")}


def is_left(what: str, place: str) -> bool:
    """Whether a point means what its source says: its function is megatron's own, and neither the
    name in it nor the string in it has been given another meaning."""
    module_name, function_name = place.split(":")
    if function_name == AT_IMPORT:
        return True
    module = sys.modules[module_name]
    function = _function(module, function_name)
    if function and function.__module__ != module_name:
        return False
    name = what.partition("(")[0]
    if name.startswith("torch."):
        return _walk(module, name) is _walk(None, name)
    _, quote, text = what.partition('"')
    if not function or not quote:
        return True
    return text.partition('"')[0].partition("{}")[0] in _constants(function.__code__)


def _function(module: types.ModuleType, qualified_name: str) -> types.FunctionType | None:
    """The outermost function that a qualified name leads to."""
    found: Any = module
    for name in qualified_name.split("."):
        found = vars(found).get(name)
        found = getattr(found, "fget", None) or getattr(found, "__func__", found)
        if not isinstance(found, type):
            break
    found = inspect.unwrap(found) if callable(found) else found
    return found if isinstance(found, types.FunctionType) else None


def _walk(module: types.ModuleType | None, name: str) -> Any:
    """What `torch.a.b` is, as a module sees it or as it is; None if there is none."""
    found: Any = getattr(module, "torch", torch) if module else torch
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found


def _constants(value: Any) -> Iterator[Any]:
    """A code object's constants, at any depth."""
    if isinstance(value, types.CodeType):
        value = value.co_consts
    if isinstance(value, (tuple, frozenset)):
        for item in value:
            yield from _constants(item)
    else:
        yield value


if __name__ == "__main__":
    main()
