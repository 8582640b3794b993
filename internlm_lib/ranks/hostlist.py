"""Slurm's way to write many hosts: `a[01-03,07],b5` is a01, a02, a03, a07, b5.

`scontrol show hostnames` would say it, too, but is often missing in the containers of a job.
"""

import re
from itertools import product

_PART = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
_PIECE = re.compile(r"\[([^\]]*)\]|([^\[]+)")


def expand_hostlist(text: str) -> list[str]:
    """All hosts in order; what is not a range stays as it is written."""
    return [host for part in _PART.findall(text) for host in _expand_part(part)]


def _expand_part(part: str) -> list[str]:
    choices = [_numbers(ranges) if ranges else [plain] for ranges, plain in _PIECE.findall(part)]
    return ["".join(host) for host in product(*choices)]


def _numbers(ranges: str) -> list[str]:
    """`01-03,07` → 01, 02, 03, 07: leading zeros are part of a name."""
    found = []
    for one in ranges.split(","):
        first, _, last = one.partition("-")
        if first.isdecimal() and last.isdecimal():
            found += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        else:
            found.append(one)
    return found
