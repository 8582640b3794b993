"""What the readers of files are asked for, and what they yield.

A reader yields where a row lies and either its columns or the `Fault` for which it cannot be read,
and then reads the next row. It holds no more than a few MiB of a file, whatever the file's size. A
file that is cut off or damaged as a whole raises an error: nobody could count what is missing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internlm_lib.errors import InputError

Values = dict[str, Any]


class Fault(Exception):
    """Why a record cannot be read."""


Found = tuple[str, Values | Fault]
"""(`row 17`, counted from 0, or `line 18`, counted from 1; what was found there)"""


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are wanted, and under which names."""

    mapping: Mapping[str, str] = field(default_factory=dict)
    """Name of a row's value → the file's column that it is read from."""
    only: Sequence[str] | None = None
    """Names of values that are needed; None: all."""

    def of(self, file: Path, found: Sequence[str]) -> list[str]:
        """Which of the columns found in a file to read, in the file's order.

        Raises InputError if a mapped column is missing, all needed ones are, or one is there twice.
        """
        listed = ", ".join(found)
        for name, column in self.mapping.items():
            if column not in found:
                raise missing_column(file, name, column, listed)
        if len(set(found)) < len(found):
            raise InputError(f"{file}: two columns have the same name; found {listed}")
        if self.only is None:
            return list(found)
        needed = {self.mapping.get(name, name): name for name in self.only}
        wanted = [column for column in found if column in needed]
        if not wanted:
            column, name = next(iter(needed.items()))
            raise missing_column(file, name, column, listed)
        return wanted

    def renamer(self) -> Callable[[Values], Values]:
        """Puts a row under the mapped names; a column that is mapped away loses its own."""
        mapping = dict(self.mapping)
        hidden = {*mapping, *mapping.values()}

        def rename(values: Values) -> Values:
            renamed = {name: value for name, value in values.items() if name not in hidden}
            for name, column in mapping.items():
                if column in values:
                    renamed[name] = values[column]
            return renamed

        return rename if mapping else lambda values: values


def missing_column(file: Path, name: str, column: str, found: str) -> InputError:
    mapped = f" (mapped to {name!r})" if column != name else ""
    return InputError(f"{file}: column {column!r}{mapped} is missing; found {found}")
