"""A process that has torch_npu, for the tests of this folder: what it found, by part."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.npu_contract.wheel import Stubbed, UnavailableError, stubbed_torch_npu


@pytest.fixture(scope="session")
def torch_npu() -> Stubbed:
    """Where wheel or compiler cannot be had the tests are skipped; on CI that is a failure."""
    try:
        return stubbed_torch_npu()
    except UnavailableError as error:
        if os.environ.get("CI"):
            pytest.fail(f"{error}; on CI the contract with torch_npu must be tested")
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def part(
    torch_npu: Stubbed, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """Runs one part of `worker`, once; gives what it found."""
    found: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        if name not in found:
            file = tmp_path_factory.mktemp("npu_contract") / f"{name}.json"
            command = [sys.executable, "-m", "tests.npu_contract.worker", name, str(file)]
            done = subprocess.run(
                command, env=torch_npu.environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0 and file.exists(), done.stderr[-4000:]
            found[name] = json.loads(Path(file).read_text())
        return found[name]

    return run
