"""What passes, what fails, and whose figure is kept."""

import math
from typing import Any

import pytest

from internlm_lib.errors import InputError, KitError
from internlm_lib.selftest.checks import Check, Outcome, Row, carry_out, worst_of_ranks
from internlm_lib.selftest.run import Selftest, check_passed, selftest


def check(figure: float, tolerance: float = 1.0) -> Check:
    return Check("kernels", "a kernel", "units", tolerance, lambda: Outcome(figure, {"GB/s": 2.0}))


@pytest.mark.parametrize(
    ("figure", "passes"), [(0.0, True), (1.0, True), (1.01, False), (math.nan, False)]
)
def test_a_figure_must_not_be_above_its_tolerance(figure: float, passes: bool) -> None:
    row = carry_out(check(figure), rank=3)
    assert row.passed is passes and row.rank == 3 and row.measured == {"GB/s": 2.0}


def test_an_error_in_a_check_fails_that_check_and_says_where() -> None:
    def absent() -> Outcome:
        raise RuntimeError("no such operator")

    row = carry_out(Check("kernels", "a kernel", "units", 1.0, absent), rank=0)
    assert not row.passed and row.figure is None
    assert "no such operator" in row.error and "in absent" in row.error


def test_of_all_ranks_the_worst_is_kept() -> None:
    def rows(*figures: float) -> list[Row]:
        return [carry_out(check(figure), rank) for rank, figure in enumerate(figures)]

    def worst(*ranks: Row) -> int:
        (row,) = worst_of_ranks([[row] for row in ranks])
        return row.rank

    assert worst(*rows(0.1, 0.7, 0.3)) == 1
    assert worst(*rows(0.1, 2.0, 0.3)) == 1
    assert worst(*rows(0.9, math.nan)) == 1
    with pytest.raises(ValueError):
        worst_of_ranks([rows(0.1), []])


def result(**changes: Any) -> dict[str, Any]:
    row = {"group": "kernels", "name": "RMSNorm, bfloat16", "passed": True}
    return {"device_name": "Ascend910B3", "ranks": 8, "checks": [row | changes]}


def test_what_failed_is_named_with_what_to_do() -> None:
    assert check_passed(result()) == "1 checks passed on 8 × Ascend910B3"
    with pytest.raises(KitError, match="1 of 1 checks failed on Ascend910B3: kernels: RMSNorm"):
        check_passed(result(passed=False))


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Selftest(device="cpu", ranks=0), "--ranks 0: give 1 or more"),
        (Selftest(device="npu"), "'npu' is not usable here"),
        (Selftest(device="cpu", run_name="a/b"), "run_name = 'a/b'"),
    ],
)
def test_bad_input_is_refused_before_a_rank_starts(asked: Selftest, message: str) -> None:
    with pytest.raises(InputError, match=message):
        selftest(asked)
