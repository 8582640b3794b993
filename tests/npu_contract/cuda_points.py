"""The list of points at which megatron-core reaches CUDA, and their answers: `cuda_points.yaml`.

`python -m tests.npu_contract.cuda_points --write` brings its points up to date. New ones that need
an answer get `?`, with which the test fails.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.npu_contract.megatron_cuda import AT_IMPORT

FILE = Path(__file__).with_name("cuda_points.yaml")
ANSWERS = {
    "cpu": {"adapted", "harmless", "absent"},
    "npu": {"transferred", "adapted", "harmless", "absent"},
}
_POINTS = "\npoints:"

Found = dict[str, dict[str, int]]
"""What is reached: how often in which function."""


@dataclass(frozen=True)
class CudaPoints:
    version: str
    not_reached: dict[str, Any]
    answers: dict[str, dict[str, str]]
    points: Found

    def reached(self, points: Found | None = None) -> dict[str, list[str]]:
        """What needs an answer: the functions that run, where there are any."""
        points = self.points if points is None else points
        places = {what: [p for p in found if self._runs(what, p)] for what, found in points.items()}
        return {what: found for what, found in places.items() if found}

    def excuses(self, what: str, place: str) -> list[str]:
        """The entries of `not_reached` that a point falls under; what is done at import, none."""
        module, function = place.split(":")
        if function == AT_IMPORT:
            return []
        names = [*_beginnings(module), *(f"{module}:{name}" for name in _beginnings(function))]
        found = [name for name in names if name in self.not_reached]
        return [
            n for n in found if isinstance(self.not_reached[n], str) or what in self.not_reached[n]
        ]

    def _runs(self, what: str, place: str) -> bool:
        return not self.excuses(what, place)

    def answered(self, device: str, *answers: str) -> set[str]:
        """The points that a device answers in one of these ways."""
        return {what for what, by_device in self.answers.items() if by_device[device] in answers}


def _beginnings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: number + 1]) for number in range(len(parts))]


def read() -> CudaPoints:
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    points = {
        what: {f"{module}:{function}": count for module, functions in modules.items()
               for function, count in functions.items()}
        for what, modules in content["points"].items()
    }  # fmt: skip
    return CudaPoints(content["version"], content["not_reached"], content["answers"], points)


def inspect_installed() -> dict[str, Any]:
    """What `megatron_on_cpu` says, in a process that has not yet adapted megatron-core."""
    command = [sys.executable, "-m", "tests.npu_contract.megatron_on_cpu"]
    done = subprocess.run(command, cwd=FILE.parents[2], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def write() -> None:
    installed = inspect_installed()
    listed = read()
    text, _, _ = FILE.read_text(encoding="utf-8").partition(_POINTS)
    for what in sorted(listed.reached(installed["points"]).keys() - listed.answers.keys()):
        text = text.rstrip("\n") + "\n" + _indented({what: {"cpu": "?", "npu": "?"}}, flow=None)
    text = text.rstrip("\n") + f"\n{_POINTS}\n" + _indented(_by_module(installed["points"]))
    FILE.write_text(text, encoding="utf-8")


def _by_module(points: Found) -> dict[str, dict[str, dict[str, int]]]:
    nested: dict[str, dict[str, dict[str, int]]] = {}
    for what, places in points.items():
        for place, count in places.items():
            module, function = place.split(":")
            nested.setdefault(what, {}).setdefault(module, {})[function] = count
    return nested


def _indented(content: Any, flow: bool | None = False) -> str:
    lines = yaml.safe_dump(content, width=1000, default_flow_style=flow).splitlines()
    return "".join(f"  {line}\n" for line in lines)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.npu_contract.cuda_points --write")
    write()
