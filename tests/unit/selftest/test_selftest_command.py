"""How `internlm selftest` prints what failed, and how it ends."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from internlm_lib.cli import app
from internlm_lib.selftest import run
from internlm_lib.selftest.checks import Check, Outcome, as_values, carry_out


def absent() -> Outcome:
    raise RuntimeError("npu_swiglu: no such operator")


CHECKS = (
    Check("kernels", "SwiGLU, bf16", "error", 1.0, absent),
    Check("kernels", "rotary, bf16", "error", 1.0, lambda: Outcome(0.5, {"formula's": 0.25})),
    Check("rates", "copy", "bytes that differ", 0.0, lambda: Outcome(4.0)),
)


@pytest.fixture(autouse=True)
def done(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [as_values(carry_out(check, rank=5)) for check in CHECKS]
    result: dict[str, Any] = {"passed": False, "device_name": "Ascend910B3", "ranks": 8}
    monkeypatch.setattr(run, "selftest", lambda asked, show: {**result, "checks": rows})


def test_the_table_says_what_failed_by_how_much_and_where() -> None:
    result = CliRunner().invoke(app, ["selftest"])
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    (copy,) = (line for line in lines if " copy " in line)
    assert "fail" in copy and " 4 " in copy and "rank 5" in copy
    (rotary,) = (line for line in lines if "rotary" in line)
    assert " ok " in rotary and "formula's 0.25" in rotary
    assert "npu_swiglu: no such operator" in result.stdout
    assert "2 of 3 checks failed on Ascend910B3: kernels: SwiGLU, bf16; rates: copy" in (
        result.stderr
    )


def test_with_json_stdout_is_the_result_alone() -> None:
    result = CliRunner().invoke(app, ["selftest", "--json"])
    printed = json.loads(result.stdout)
    assert result.exit_code == 1 and printed["passed"] is False
    assert [row["figure"] for row in printed["checks"]] == [None, 0.5, 4.0]
