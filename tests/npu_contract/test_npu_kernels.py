"""The NPU's kernels against the real torch_npu: schemas, numbers, limits, and faults that show."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.npu_contract.mutations import MUTATIONS

Part = Callable[[str], dict[str, Any]]


def test_checks_of_the_kernels_are_green(part: Part) -> None:
    checks = part("kernels")["checks"]
    assert len(checks) >= 10
    assert "".join(checks.values()) == "", "\n\n".join(filter(None, checks.values()))


@pytest.mark.parametrize("what", [mutation.what for mutation in MUTATIONS])
def test_a_fault_turns_a_check_red(what: str, part: Part) -> None:
    assert part("kernels")["mutations"][what] != "", f"no check sees it: {what}"
