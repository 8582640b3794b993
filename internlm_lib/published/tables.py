"""The published tables, read from the YAML files beside this module and checked.

`throughput.yaml` says what its keys mean. Cells are kept as text: their digits are their precision.
"""

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from internlm_lib.errors import ConfigError, InputError

Column = Literal[
    "tokens_per_second_per_device",
    "tokens_per_second",
    "samples_per_second_per_device",
    "samples_per_second",
    "seconds_per_step",
    "tflops_per_device",
    "mfu_percent",
    "hfu_percent",
]
"""What a published column claims to be. `per_device` is one device's share, else the cluster's."""

COLUMNS: tuple[Column, ...] = get_args(Column)

UNKNOWN = "unknown"

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Printed = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(e\d+)?$")]


class Record(BaseModel):
    """Base of all that is read here: unknown keys and other types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Entry = TypeVar("Entry", bound=Record)


class Shape(Record):
    """Shape of a model that is none of the kit's presets, but has InternLM's layers."""

    num_layers: Count
    hidden_size: Count
    ffn_hidden_size: Count
    num_attention_heads: Count
    vocab_size: Count
    attention_bias: bool


class PublishedRow(Record):
    """One row of a published throughput table; None and "unknown": the source does not tell."""

    name: Name
    table: Name
    source: Name
    """Where it stands: repository or paper, file, commit."""
    date: Name
    system: Name
    """The machine, in the page's words."""
    device: Name | None
    """Device name that `peaks.yaml` is asked for."""
    devices: Count | None
    model: Name
    """Name of one of the kit's presets, or the model's own."""
    shape: Shape | None = None
    """Of a model that is no preset; None there means that the kit's FLOP formulas do not hold."""
    seq_length: Count | None
    global_batch_size: Count | None
    """Sequences of one step."""
    micro_batch_size: Count | None
    precision: Literal["bf16", "fp16", "fp8", "unknown"]
    recompute: Literal["none", "selective", "full", "unknown"]
    flops_convention: Name = UNKNOWN
    """The publisher's own FLOP formula: see `reporting.published.FORMULAS`."""
    reference: Name | None = None
    """Name of the row that this one is compared with."""
    note: str = ""
    headers: dict[Column, Name]
    """Header of each column, as printed."""
    printed: Annotated[dict[Column, Printed], Field(min_length=1)]
    """The cells, as printed."""

    @model_validator(mode="after")
    def every_cell_has_a_header(self) -> "PublishedRow":
        if bare := self.printed.keys() - self.headers.keys():
            raise ValueError(f"no header for {', '.join(sorted(bare))}")
        return self


class LossClaim(Record):
    """A published agreement of a loss curve with its reference; errors relative or in nats."""

    name: Name
    source: Name
    date: Name
    model: Name
    mean_relative_error: Share
    mean_relative_error_allowed: Share
    max_relative_error: Share
    max_absolute_error: Annotated[float, Field(gt=0)]
    note: str = ""


def throughput_row(name: str) -> PublishedRow:
    """The row of that name. Raises InputError naming all rows if there is none."""
    rows = {row.name: row for row in throughput_rows()}
    if name not in rows:
        raise InputError(f"published row {name!r}: there is none; known are {', '.join(rows)}")
    return rows[name]


@cache
def throughput_rows() -> tuple[PublishedRow, ...]:
    """All published throughput rows, in the order of the file. Raises ConfigError."""
    return read_throughput(Path(__file__).with_name("throughput.yaml"))


@cache
def loss_claims() -> tuple[LossClaim, ...]:
    """All published claims about losses. Raises ConfigError."""
    path = Path(__file__).with_name("loss.yaml")
    return tuple(checked(LossClaim, entry, path) for entry in read_entries(path))


def read_throughput(path: Path) -> tuple[PublishedRow, ...]:
    """Rows of a file of tables, what a table's rows share filled in. Raises ConfigError."""
    rows = []
    for table in read_entries(path):
        shared = {key: value for key, value in table.items() if key not in ("rows", "common")}
        for row in table["rows"]:
            rows.append(checked(PublishedRow, shared | table.get("common", {}) | row, path))
    names = [row.name for row in rows]
    problems = [f"{name}: used twice" for name in sorted(set(names)) if names.count(name) > 1]
    problems += [
        f"{row.name}.reference: no row is called {row.reference}"
        for row in rows
        if row.reference is not None and row.reference not in names
    ]
    if problems:
        raise ConfigError(str(path), problems)
    return tuple(rows)


def read_entries(path: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return entries


def checked(kind: type[Entry], entry: dict[str, Any], path: Path) -> Entry:
    """One entry of a file as its record. Raises ConfigError listing all that is wrong with it."""
    try:
        return kind.model_validate(entry)
    except ValidationError as error:
        name = entry.get("name") or entry.get("device")
        problems = [
            f"{'.'.join([str(name), *map(str, problem['loc'])])}: {problem['msg']}"
            for problem in error.errors()
        ]
        raise ConfigError(str(path), problems) from None
