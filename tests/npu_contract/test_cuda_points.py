"""Every point at which megatron-core reaches CUDA is known and answered.

An upgrade that brings new ones fails here, and says which.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.npu_contract.cuda_points import ANSWERS, CudaPoints, inspect_installed, read
from tests.npu_contract.megatron_cuda import AT_IMPORT, scan

UPDATE = "python -m tests.npu_contract.cuda_points --write"


@pytest.fixture(scope="module")
def listed() -> CudaPoints:
    return read()


@pytest.fixture(scope="module")
def installed() -> dict[str, Any]:
    return inspect_installed()


def test_the_list_is_of_the_version_that_is_pinned_and_installed(
    listed: CudaPoints, installed: dict[str, Any], repository: Path
) -> None:
    pin = f'"megatron-core=={listed.version}"'
    assert pin in (repository / "pyproject.toml").read_text(encoding="utf-8")
    assert installed["version"] == listed.version, "install requirements.lock, or list this version"


def test_no_point_is_new_or_gone(listed: CudaPoints, installed: dict[str, Any]) -> None:
    before, now = _rows(listed.points), _rows(installed["points"])
    changes = [f"+ {row}" for row in sorted(now - before)]
    changes += [f"- {row}" for row in sorted(before - now)]
    assert not changes, "\n".join([f"megatron-core reaches CUDA otherwise; {UPDATE}", *changes])


def test_every_point_that_is_reached_has_an_answer_on_every_device(listed: CudaPoints) -> None:
    reached = listed.reached()
    unanswered = [
        f"{what} on {device}: {listed.answers.get(what, {}).get(device)}, in {places[0]}"
        for what, places in reached.items()
        for device, known in ANSWERS.items()
        if listed.answers.get(what, {}).get(device) not in known
    ]
    assert not unanswered, "\n".join(unanswered)
    assert sorted(listed.answers.keys() - reached.keys()) == [], "no more reached"


def test_every_excuse_excuses_something(listed: CudaPoints) -> None:
    used = {
        excuse
        for what, places in listed.points.items()
        for place in places
        for excuse in listed.excuses(what, place)
    }
    assert sorted(listed.not_reached.keys() - used) == []


def test_what_is_done_at_import_cannot_be_excused() -> None:
    points = CudaPoints("1", {"m": "not offered"}, {}, {".cuda": {"m:f": 1, f"m:{AT_IMPORT}": 1}})
    assert points.reached() == {".cuda": [f"m:{AT_IMPORT}"]}


def test_an_excuse_of_one_point_excuses_no_other() -> None:
    excuse = {"m:C.f": {".cuda": "a switch that is off"}}
    points = CudaPoints("1", excuse, {}, {".cuda": {"m:C.f": 1}, ".is_cuda": {"m:C.f": 1}})
    assert points.reached() == {".is_cuda": ["m:C.f"]}


def test_what_is_adapted_on_a_cpu_is(listed: CudaPoints, installed: dict[str, Any]) -> None:
    """No function that runs still reaches CUDA there; what is imported is not used."""
    reached = listed.reached()
    left = {
        what: sorted(set(reached[what]) & set(installed["left"][what]))
        for what in listed.answered("cpu", "adapted")
    }
    left = {what: [p for p in places if AT_IMPORT not in p] for what, places in left.items()}
    assert {what: places for what, places in left.items() if places} == {}


def test_a_call_answered_as_harmless_on_a_cpu_is_no_stand_in(
    listed: CudaPoints, installed: dict[str, Any]
) -> None:
    """Else the list would hide a point that needs one."""
    reached = listed.reached()
    for what in listed.answered("cpu", "harmless"):
        assert set(reached[what]) <= set(installed["left"][what]), what


SOURCE = '''
"""A docstring of torch.cuda.Stream and "cuda"."""
import torch
import torch.distributed as dist
import triton.language as tl
from torch.cuda import _lazy_call as later, Stream as S

TYPES = (torch.cuda.FloatTensor,)

class Kept:
    default: torch.cuda.Stream = torch.device("cuda")

    def method(self, x: torch.cuda.Event, device="cuda") -> torch.cuda.Event:
        def inner():
            later(lambda: x.cuda().is_cuda)
            return x.type() in ["torch.cuda.HalfTensor", "torch.HalfTensor"]
        raise ValueError("no cuda device, nccl: none")

    @torch.cuda.amp.custom_fwd
    def other(self, index):
        torch.zeros(3, device=f"cuda:{index}" if index else "cpu")
        self.to("cuda").cpu(memory=torch.cuda.current_device())
        dist.new_group(backend="cpu:gloo,cuda:nccl", options=dist.ProcessGroupNCCL.Options())
        return os.environ["NCCL_DEBUG"], {"cuda_graph": "cudagraph"}
'''


def test_the_scan_finds_expressions_and_not_words(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(SOURCE)
    found = scan({"m": tmp_path / "m.py"})
    assert found == {
        what: Counter(f"m:{place}" for place in places.split())
        for what, places in {
            "import triton": AT_IMPORT,
            "from torch.cuda import _lazy_call": AT_IMPORT,
            "from torch.cuda import Stream": AT_IMPORT,
            "torch.cuda.FloatTensor": AT_IMPORT,
            'torch.device("cuda")': AT_IMPORT,
            'def (device="cuda")': AT_IMPORT,
            "torch.cuda._lazy_call": "Kept.method.inner",
            ".cuda": "Kept.method.inner",
            ".is_cuda": "Kept.method.inner",
            '== "torch.cuda.HalfTensor"': "Kept.method.inner",
            "torch.cuda.amp.custom_fwd": AT_IMPORT,
            'torch.zeros(device="cuda:{}")': "Kept.other",
            '.to("cuda")': "Kept.other",
            "torch.cuda.current_device": "Kept.other",
            'torch.distributed.new_group(backend="cpu:gloo,cuda:nccl")': "Kept.other",
            "torch.distributed.ProcessGroupNCCL.Options": "Kept.other",
            '"NCCL_DEBUG"': "Kept.other",
        }.items()
    }


def _rows(points: dict[str, dict[str, int]]) -> set[str]:
    return {f"{w}  in {p}  {n}x" for w, places in points.items() for p, n in places.items()}
