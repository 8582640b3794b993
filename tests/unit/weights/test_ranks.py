"""The table against megatron-core's own model: every rank of 65B, built without its weights.

Each rank is built on the meta device over a fake process group, as it would be in a job of 32.
"""

import contextlib
import json
import subprocess
import sys

import pytest

from internlm_lib.errors import InputError

BUILD = """
import json
import math

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from internlm_lib.devices import select_device
from internlm_lib.experiment.presets import PRESETS
from internlm_lib.experiment.schema import Layout, ModelSection, TrainingSection

device = select_device("cpu")
device.adapt_megatron()
type(device).current = lambda self: torch.device("meta")
from megatron.core import parallel_state, tensor_parallel

from internlm_lib.model.arithmetic import parameter_count
from internlm_lib.model.build import build_gpt_model
from internlm_lib.weights.layout import rules
from internlm_lib.weights.megatron import named_parameters
from internlm_lib.weights.plan import partition, rank_tensors

preset, tp, pp = {preset!r}, {tp}, {pp}
model = ModelSection(**PRESETS[preset], preset=preset)
layout = Layout(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
split, table = partition(model, tp, pp), rules(model)
wrong, elements = [], 0
for rank in range(tp * pp):
    store = FakeStore()
    torch.distributed.init_process_group("fake", store=store, rank=rank, world_size=tp * pp)
    parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    with torch.device("meta"):
        gpt = build_gpt_model(model, layout, TrainingSection(), device)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    built = {{name: tuple(p.shape) for name, p in gpt.named_parameters()}}
    planned = {{t.name: t.shape for t in rank_tensors(table, split, tp_rank, stage)}}
    if built != planned:
        wrong.append([rank, sorted(set(built.items()) ^ set(planned.items()))[:4]])
    whole = {{r.name for r in table if r.split == "replicated"}}
    for name, parameter in named_parameters(gpt).items():
        if name not in whole or tp_rank == 0:
            elements += math.prod(parameter.shape)
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
print(json.dumps({{"wrong": wrong, "elements": elements, "parameters": parameter_count(model)}}))
"""


def test_weights_that_fp16_cannot_hold_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from internlm_lib.devices import select_device

    select_device("cpu").adapt_megatron()
    from internlm_lib.weights import megatron

    fits, large = torch.tensor([1.0, -65504.0]), torch.tensor([1.0, 65536.0])
    pairs = [
        (n, torch.nn.Parameter(torch.zeros(2).half()), v) for n, v in (("a", fits), ("b", large))
    ]
    monkeypatch.setattr(megatron, "open_checkpoint", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(megatron, "_pairs", lambda *_: pairs)
    with pytest.raises(InputError, match=r"b has values up to 6.55e\+04, more than fp16 can hold"):
        megatron.load_weights(None, None, None)  # type: ignore[arg-type]
    assert pairs[0][1].tolist() == fits.tolist()


@pytest.mark.parametrize(
    "preset, tp, pp", [("internlm-65b", 8, 4), ("internlm-20b", 4, 2), ("internlm-7b", 8, 1)]
)
def test_every_rank_holds_what_is_planned(preset: str, tp: int, pp: int) -> None:
    code = BUILD.format(preset=preset, tp=tp, pp=pp)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["elements"] == found["parameters"]
