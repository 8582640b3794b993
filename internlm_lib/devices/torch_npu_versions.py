"""Which torch_npu, torch, Python and CANN go together; `torch_npu_versions.yaml` is the table."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field

CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
"""Index of torch's builds without CUDA: beside one with it torch_npu refuses to be imported."""

Version = Annotated[str, Field(pattern=r"^\d+\.\d+\.\w+(\.post\d+)?$")]
"""E.g. `2.13.0`, `2.9.0.post2`, `8.3.RC1`."""


class Record(BaseModel):
    """Base of all that is read here: unknown keys and other types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Row(Record):
    torch_npu: Version
    torch: Version
    cann: Version | None


class Group(Record):
    """Rows of one source."""

    source: str
    confirmed: bool
    rows: list[Row]


class Pythons(Record):
    source: str
    versions: dict[Version, list[Annotated[str, Field(pattern=r"^3\.\d+$")]]]
    """torch → versions of Python."""


class Table(Record):
    """`torch_npu_versions.yaml`, whose head says what the keys mean."""

    releases: list[Group]
    python: Pythons


@dataclass(frozen=True)
class Misfit:
    """Two versions that do not go together."""

    what: str
    fix: str
    fatal: bool
    """False where it has not been tested by the makers, but may well work."""


@cache
def table() -> Table:
    path = Path(__file__).with_suffix(".yaml")
    return Table.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def rows() -> Iterator[Row]:
    """All releases of torch_npu that are known, newest first."""
    for group in table().releases:
        yield from group.rows


def row_of(torch_npu: str) -> Row | None:
    """What belongs to a torch_npu; None if the table does not know this one."""
    return next((row for row in rows() if row.torch_npu == torch_npu), None)


def install_for(torch: str, cann: str | None = None) -> str:
    """The `pip install` of the torch_npu for a torch such as `2.13.0+cpu` and, if known, a CANN."""
    release = _release(torch)
    fitting = [row for row in rows() if row.torch == release]
    fitting.sort(key=lambda row: row.cann != cann)
    wanted = fitting[0].torch_npu if fitting else f"{release}.*"
    return f"pip install 'torch_npu=={wanted}'"


def install_cpu_build(torch: str) -> str:
    """The `pip install` of torch's build for CPUs, the one beside which torch_npu works."""
    return f"pip install 'torch=={_release(torch)}+cpu' --index-url {CPU_BUILDS}"


def misfits(torch: str, torch_npu: str, python: str, cann: str | None) -> list[Misfit]:
    """What does not go together of the versions installed.

    Args:
        torch: with its build, e.g. `2.13.0+cpu`.
        python: e.g. `3.11`.
        cann: e.g. `9.1.0`; None if it is not known.
    """
    if _release(torch) != _release(torch_npu):
        pair = f"torch_npu {torch_npu} with torch {torch}, whose libraries it cannot link"
        return [Misfit(pair, install_for(torch, cann), fatal=True)]
    found = []
    documented = table().python.versions.get(_release(torch), [])
    if documented and python not in documented:
        what = f"Python {python} with torch_npu {torch_npu}, documented are {', '.join(documented)}"
        fix = f"use one of these (make env PYTHON=python{documented[0]}), or try it"
        found.append(Misfit(what, fix, fatal=False))
    row = row_of(torch_npu)
    if row and row.cann and cann and row.cann.lower() != cann.lower():
        what = f"CANN {cann} with torch_npu {torch_npu}, which belongs to CANN {row.cann}"
        found.append(Misfit(what, _other_pair(row, cann), fatal=False))
    return found


def _other_pair(row: Row, cann: str) -> str:
    """How to get torch_npu and CANN of one release, keeping torch."""
    same = (r.torch_npu for r in rows() if r.torch == row.torch and r.cann == cann)
    if other := next(same, None):
        return f"pip install 'torch_npu=={other}', or install CANN {row.cann}"
    return f"install CANN {row.cann}"


def _release(version: str) -> str:
    """`2.13.0` of `2.13.0+cpu` and of `2.13.0.post1`."""
    found = re.match(r"\d+\.\d+\.\d+", version)
    return found.group() if found else version
