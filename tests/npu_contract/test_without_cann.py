"""The real torch_npu installed where CANN is not: the kit runs on the CPU, and says what to source.

Torch would import torch_npu by itself there, and transformers with its models; both would fail.
"""

import json
import mmap
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from internlm_lib.experiment.schema import Layout
from internlm_lib.experiment.variables import Variable, variables_of
from internlm_lib.journal import events, training_steps
from tests.npu_contract.wheel import Stubbed, pinned
from tests.parity.make_run import make_run

SEEN_BY_TORCH_NPU = {v.name: v for v in variables_of("npu") if v.source.startswith("TorchNPU")}

LLAMA = """
import internlm_lib, torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 32)
"""
SELECT = """
from internlm_lib.devices import select_device
device = select_device()
assert device.name == "cpu"
"""
WORKER = """
device.adapt_megatron()
import internlm_lib.training.worker, internlm_lib.engines.megatron, internlm_lib.engines.zero
import internlm_lib.generation.driver, internlm_lib.training.loop
from deepspeed.accelerator import get_accelerator
assert get_accelerator()._name == "cpu"
"""
TRAIN = """
import sys
from pathlib import Path
from internlm_lib.experiment.load import load_experiment
from internlm_lib.ranks.launch import launch_node
from internlm_lib.run_folder import RunFolder
from internlm_lib.training.nodes import Nodes, plan_training
folder = RunFolder.at(Path(sys.argv[1]))
_, experiment = load_experiment(folder.experiment)
launch_node(plan_training(folder, experiment, "candidate", Nodes()))
"""


@pytest.fixture(scope="module")
def environment(torch_npu: Stubbed) -> dict[str, str]:
    """With torch_npu as an installed package, and nothing that would help it."""
    helpful = ("LD_LIBRARY_PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD", "DS_ACCELERATOR")
    return {k: v for k, v in torch_npu.environment.items() if k not in helpful}


def python(
    environment: dict[str, str], code: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_torch_alone_cannot_be_imported_there(environment: dict[str, str]) -> None:
    done = python(environment, "import torch")
    assert done.returncode == 1 and "backend extension: torch_npu" in done.stderr


def test_doctor_says_what_to_source(environment: dict[str, str], home: Path) -> None:
    script = home / "Ascend" / "ascend-toolkit" / "set_env.sh"
    script.parent.mkdir(parents=True)
    script.touch()
    code = "from internlm_lib.cli import main; main()"
    done = python({**environment, "HOME": str(home)}, code, "doctor", "--json")
    assert done.returncode == 1, done.stderr
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["torch_npu"]["found"] == pinned().partition("==")[2]
    assert (found["cpu"]["status"], found["torch_npu"]["status"]) == ("ok", "ok")
    for name in ("CANN", "npu"):
        assert found[name]["status"] == "fail" and "libhccl.so" in found[name]["found"]
        assert found[name]["fix"].startswith("source ")
        assert "ascend-toolkit/set_env.sh" in found[name]["fix"]


def test_all_packages_work_as_on_a_cpu(environment: dict[str, str]) -> None:
    done = python(environment, LLAMA + SELECT + WORKER)
    assert done.returncode == 0, done.stderr[-3000:]


def test_with_half_of_cann_they_do_once_a_device_is_selected(
    torch_npu: Stubbed, environment: dict[str, str], tmp_path: Path
) -> None:
    """As every rank does first: the loader finds CANN, and still torch_npu cannot be imported."""
    shutil.copy(torch_npu.libraries / "libhccl.so", tmp_path)
    done = python({**environment, "LD_LIBRARY_PATH": str(tmp_path)}, SELECT + LLAMA)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_training_runs_in_ranks_that_have_it(environment: dict[str, str], tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        Layout(engine="deepspeed", zero_stage=1),
        **{"training.train_iters": 2, "parallel.environment": {"OMP_NUM_THREADS": 1}},
    )
    done = python(environment, TRAIN, str(run.path))
    assert done.returncode == 0, done.stderr[-3000:]
    journal = run.training("candidate").journal
    assert [step["step"] for step in training_steps(journal)] == [1, 2]
    (start,) = events(journal, "start")
    assert (start["device"], start["environment"]["OMP_NUM_THREADS"]) == ("cpu", "1")
    assert start["packages"]["torch_npu"] == pinned().partition("==")[2]


@pytest.fixture(scope="module")
def library(torch_npu: Stubbed) -> bytes:
    with (torch_npu.packages / "torch_npu" / "lib" / "libtorch_npu.so").open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # type: ignore[return-value]


@pytest.mark.parametrize("variable", SEEN_BY_TORCH_NPU.values(), ids=SEEN_BY_TORCH_NPU)
def test_torch_npu_reads_the_variable_and_allows_what_the_table_does(
    library: bytes, variable: Variable
) -> None:
    name = variable.name.encode()
    assert library.find(b"\0" + name + b"\0") >= 0, "the name is not in the library"
    if said := re.search(name + rb" should be ([\d, or]+\d)", library):
        assert re.findall(r"\d", said[1].decode()) == variable.values


def test_what_torch_npu_says_of_values_is_found(library: bytes) -> None:
    """Or the test above would compare nothing."""
    told = [
        name for name in SEEN_BY_TORCH_NPU if re.search(name.encode() + rb" should be", library)
    ]
    assert {"TASK_QUEUE_ENABLE", "COMBINED_ENABLE", "INF_NAN_MODE_ENABLE"} <= set(told)
    assert b"Both PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF have been set" in library[:]
