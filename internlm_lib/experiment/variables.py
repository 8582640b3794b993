"""Environment variables of the devices: what each means, what it may be, what the kit sets.

`variables.yaml` is the table; this module reads and checks it, and checks values against it. Here,
because a params file may set them (`parallel.environment`).
"""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

DeviceName = Literal["npu", "cuda", "cpu"]
Words = Annotated[str, Field(min_length=1)]


class Variable(BaseModel):
    """One row of `variables.yaml`, which says what its fields mean."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]+$")]
    devices: Annotated[list[DeviceName], Field(min_length=1)]
    meaning: Words
    unit: str = ""
    values: list[str] = []
    between: Annotated[list[int | None], Field(min_length=2, max_length=2)] | None = None
    pattern: str | None = None
    form: str = ""
    unset: Words
    default: str | None = None
    why: str = ""
    deterministic: list[str] = []
    interface: str | None = None
    excludes: str | None = None
    source: Words

    @property
    def allowed(self) -> str:
        """What a value may be, in words."""
        if self.values:
            return ", ".join(self.values)
        if self.between is None:
            return self.form
        low, high = self.between
        span = f"{low} to {high}" if high is not None else f"{low} or more"
        return f"whole numbers, {span}{f' ({self.unit})' if self.unit else ''}"

    def permits(self, value: str) -> bool:
        """Whether the variable may have this value."""
        if self.values:
            return value in self.values
        if self.pattern is not None:
            return re.fullmatch(self.pattern, value) is not None
        low, high = self.between or (None, None)
        number = int(value) if re.fullmatch(r"\d+", value, re.ASCII) else -1
        return (low or 0) <= number <= (number if high is None else high)

    @model_validator(mode="after")
    def _is_consistent(self) -> "Variable":
        ways = [bool(self.values), self.between is not None, self.pattern is not None]
        if sum(ways) != 1 or bool(self.form) != ways[2]:
            raise ValueError("give one of values, between, and pattern with form")
        if bool(self.why) != (self.default is not None):
            raise ValueError("a default needs its reason, and a reason a default")
        set_by_kit = [self.default, *self.deterministic]
        if wrong := [v for v in set_by_kit if v is not None and not self.permits(v)]:
            raise ValueError(f"the kit sets {wrong}, which is not allowed")
        return self


@cache
def variables() -> Mapping[str, Variable]:
    """All known variables by name, in the order of the table."""
    text = Path(__file__).with_name("variables.yaml").read_text(encoding="utf-8")
    rows = [Variable.model_validate(row) for row in yaml.safe_load(text)]
    table = {row.name: row for row in rows}
    if len(table) != len(rows):
        raise ValueError("variables.yaml has a name twice")
    return MappingProxyType(table)


def variables_of(device: str) -> list[Variable]:
    """The variables that are read on a device: `npu`, `cuda` or `cpu`."""
    return [variable for variable in variables().values() if device in variable.devices]


def those_of(device: str, values: Mapping[str, str]) -> dict[str, str]:
    """The part of `values`, e.g. of an environment, that a device's software reads."""
    return {v.name: values[v.name] for v in variables_of(device) if v.name in values}


def mistakes(values: Mapping[str, str]) -> list[str]:
    """What is wrong with values of known variables: a message for each, with what is allowed."""
    table = variables()
    wrong = [
        f"{name} = {value!r}: allowed is {table[name].allowed} ({table[name].meaning}; source: "
        f"{table[name].source})"
        for name, value in values.items()
        if not table[name].permits(value)
    ]
    clashes = ((name, table[name].excludes) for name in values)
    wrong += [f"{name} and {other}: set only one" for name, other in clashes if other in values]
    return wrong
