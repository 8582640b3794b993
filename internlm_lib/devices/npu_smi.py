"""`npu-smi info`: the table that the Ascend driver prints of all chips, in every layout known.

A chip takes two lines; which numbers they hold is said by the two lines of the head. Layouts seen,
from npu-smi 21.0 to 26.0 (recorded in `tests/unit/devices/npu_smi/`):

| head, second line                                               | chips                         |
|-----------------------------------------------------------------|-------------------------------|
| `Chip Device`, `Bus-Id`, `AICore(%) Memory-Usage(MB)`           | 310, 310P                     |
| `Chip`, `Bus-Id`, `AICore(%) Memory-Usage(MB) HBM-Usage(MB)`    | 910A, 910ProB, 910B1 … 910B4  |
| `Chip Phy-ID`, `Bus-Id`, `AICore(%) Memory-Usage(MB) HBM-…`     | 910C and its like, 2 per card |
| empty, empty, `Bus-Id`, `NPU Util(%) Memory-Usage(MB) HBM-…`    | Ascend950PR, Ascend950DT      |

`npu-smi info -t usages` and `-t common` tell no more of what is sampled, one chip a call.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from internlm_lib.devices.use import DeviceUse, DeviceUseError, answer_of, beginning, number

_COLUMN = re.compile(r"[^\s()][^()]*\([^()]*\)")
_VALUE = re.compile(r"[\d.]+\s*/\s*[\d.]+|\S+")
_UTILIZATION = ("AICore(%)", "NPU Util(%)")
_MEMORY = ("HBM-Usage(MB)", "Memory-Usage(MB)")
"""A training's memory is HBM where a chip has any; the other is then its control processors'."""
_NOT_TOLD = ("-", "NA", "N/A")


def sample() -> list[DeviceUse]:
    """All chips of this node that npu-smi shows. Raises DeviceUseError."""
    return parse(answer_of("npu-smi", "info"))


def parse(text: str) -> list[DeviceUse]:
    """The chips in the answer of `npu-smi info`.

    A chip's index is its `Phy-ID` or `Device` where there is such a column, else its card's number.
    Sizes in MB are MiB: a chip of 64 GiB has 65536.

    Raises:
        DeviceUseError: it is no table of chips, or none that is known.
    """
    try:
        lines = _table(text)
        head = _Head.of(lines[:2])
        if len(lines) < 4 or len(lines) % 2:
            raise DeviceUseError("the table of chips is empty or cut off")
        pairs = zip(lines[2::2], lines[3::2], strict=True)
        chips = [head.chip(first, second) for first, second in pairs]
        if len({chip.index for chip in chips}) < len(chips):
            raise DeviceUseError("two chips have the same number")
    except DeviceUseError as error:
        raise DeviceUseError(f"npu-smi info: {error}; it says: {beginning(text)}") from error
    return chips


def _table(text: str) -> list[list[str]]:
    """The cells of the table of chips, head included, up to the table of processes."""
    rows = [_cells(line) for line in text.splitlines() if line.strip().startswith("|")]
    begin = next((n for n, row in enumerate(rows) if "Health" in row), len(rows))
    ends = (n for n, row in enumerate(rows) if "Process id" in row or row[0].startswith("No "))
    return rows[begin : next(ends, len(rows))]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@dataclass(frozen=True)
class _Head:
    """What the cells of a chip's two lines hold."""

    cells: int
    """Per line; with 4 the name has one of its own, and chips have no number on their card."""
    has_device: bool
    """Beside the chip's number on its card there is one among all."""
    first: tuple[str, ...]
    """Columns of the first line's last cell."""
    second: tuple[str, ...]

    @classmethod
    def of(cls, lines: Sequence[Sequence[str]]) -> "_Head":
        if len(lines) < 2:
            raise DeviceUseError("there is no table of chips")
        names = [" ".join(cell.split()) for cell in lines[0][:-2]]
        ids, bus = lines[1][0].split(), lines[1][-2:-1]
        known = names == ["NPU Name"] and ids[:1] == ["Chip"] or names == ["NPU ID", "Name"]
        if not known or bus != ["Bus-Id"] or len(lines[1]) != len(lines[0]):
            raise DeviceUseError("the head of the table is not known")
        first, second = (tuple(_COLUMN.findall(line[-1])) for line in lines)
        if not set(_UTILIZATION) & set(second) or not set(_MEMORY) & set(second):
            raise DeviceUseError("the head of the table names no utilisation or no memory")
        return cls(len(lines[0]), len(ids) > 1, first, second)

    def chip(self, first: Sequence[str], second: Sequence[str]) -> DeviceUse:
        if len(first) != self.cells or len(second) != self.cells:
            raise DeviceUseError(f"a line of the table has other than {self.cells} cells")
        card, name = first[:2] if self.cells == 4 else _two(first[0])
        values = _values(self.first, first[-1]) | _values(self.second, second[-1])
        used, total = _memory(values)
        return DeviceUse(
            index=_index(second[0].split()[1:] if self.has_device else [], card),
            name=name,
            utilization_percent=_told(next(values[n] for n in _UTILIZATION if n in values)),
            memory_used_mib=used,
            memory_total_mib=total,
            power_watts=_told(values.get("Power(W)", "-")),
            temperature_celsius=_told(values.get("Temp(C)", "-")),
            health=first[-2],
        )


def _two(cell: str) -> tuple[str, str]:
    card, _, name = cell.partition(" ")
    return card, name.strip()


def _values(columns: Sequence[str], cell: str) -> dict[str, str]:
    """Column → its value; `3 / 4` is one."""
    values = _VALUE.findall(cell)
    if len(values) != len(columns):
        raise DeviceUseError(f"{cell[:80]!r} does not fit {', '.join(columns)}")
    return dict(zip(columns, values, strict=True))


def _index(device: Sequence[str], card: str) -> int:
    told = [text for text in device if text not in _NOT_TOLD]
    return int(number(told[0] if told else card))


def _memory(values: Mapping[str, str]) -> tuple[float | None, float | None]:
    """Used and total MiB of the first memory that the chip has."""
    for name in _MEMORY:
        used, slash, total = values.get(name, "").partition("/")
        if slash and number(total.strip()) > 0:
            return number(used.strip()), number(total.strip())
    return None, None


def _told(text: str) -> float | None:
    return None if text in _NOT_TOLD else number(text)
