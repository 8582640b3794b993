"""The determinism switch sets what each vendor asks for, and refuses what contradicts it."""

import os
import subprocess
import sys

import pytest

from internlm_lib.errors import InputError
from internlm_lib.training.determinism import VARIABLES, make_deterministic


@pytest.fixture(autouse=True)
def torch_as_it_was():
    import torch

    yield
    torch.use_deterministic_algorithms(False)


def test_it_sets_what_is_not_set():
    import torch

    environment: dict[str, str] = {}
    assert make_deterministic(environment) == environment == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "HCCL_DETERMINISTIC": "true"
    }  # fmt: skip
    assert torch.are_deterministic_algorithms_enabled()


def test_it_keeps_what_is_deterministic_already():
    environment = {name: allowed[-1] for name, allowed in VARIABLES.items()}
    assert make_deterministic(dict(environment)) == environment


@pytest.mark.parametrize("name", VARIABLES)
def test_it_refuses_a_value_that_is_not(name):
    with pytest.raises(InputError, match=f"{name} = 'false' in the environment; unset it"):
        make_deterministic({name: "false"})


def test_it_is_imported_without_torch_so_that_it_can_come_first():
    code = "import sys; import internlm_lib.training.determinism; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 0
