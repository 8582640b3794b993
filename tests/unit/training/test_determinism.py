"""The determinism switch sets what each vendor asks for, and refuses what contradicts it."""

import os
import subprocess
import sys

import pytest

from internlm_lib.errors import InputError
from internlm_lib.experiment.variables import variables
from internlm_lib.training.determinism import make_deterministic

DETERMINISTIC = {
    (variable.devices[0], name): variable.deterministic
    for name, variable in variables().items()
    if variable.deterministic
}


@pytest.fixture(autouse=True)
def torch_as_it_was():
    import torch

    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("npu", {"HCCL_DETERMINISTIC": "true"}),
        ("cuda", {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
        ("cpu", {}),
    ],
)
def test_it_sets_what_is_not_set_on_its_device(device: str, expected: dict[str, str]):
    import torch

    environment: dict[str, str] = {}
    make_deterministic(device, environment)
    assert environment == expected
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("device", "name"), DETERMINISTIC)
def test_it_keeps_what_is_deterministic_already(device: str, name: str):
    environment = {name: DETERMINISTIC[device, name][-1]}
    make_deterministic(device, environment)
    assert environment[name] == DETERMINISTIC[device, name][-1]


@pytest.mark.parametrize(("device", "name"), DETERMINISTIC)
def test_it_refuses_a_value_that_is_not(device: str, name: str):
    with pytest.raises(InputError, match=f"{name} = 'false' in the environment; unset it"):
        make_deterministic(device, {name: "false"})


def test_it_is_imported_without_torch_so_that_it_can_come_first():
    code = "import sys; import internlm_lib.training.determinism; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 0
