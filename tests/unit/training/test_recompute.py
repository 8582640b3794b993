"""How many layers are recomputed, and whether the memory it is decided by is real."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from internlm_lib.errors import InputError
from internlm_lib.experiment.load import resolve
from internlm_lib.experiment.schema import Experiment, Layout
from internlm_lib.kernels.attention import causal_attention
from internlm_lib.kernels.rmsnorm import rms_norm
from internlm_lib.training.recompute import RecomputePlan, _activation_bytes, plan_recompute

MIB = 1 << 20
PLENTY = 1 << 30
"""MiB that hold any model."""

SEVEN = {"model": {"preset": "internlm-7b"}}


def experiment(limit: int | None, shape: dict[str, Any] = SEVEN, **training: Any) -> Experiment:
    keys = {"auto_recompute_device_memory_mib": limit, **training}
    _, resolved = resolve({**shape, "training": keys}, {}, source="test", default_run_name="test")
    return resolved


def plan(layout: Layout, limit: int = PLENTY, **training: Any) -> RecomputePlan:
    found = plan_recompute(experiment(limit, **training), layout)
    assert found is not None
    return found


def megatron(tensor: int = 1, pipeline: int = 1, data: int = 1, **keys: Any) -> Layout:
    return Layout(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        data_parallel_size=data,
        **keys,
    )


def zero(stage: int, data: int = 8) -> Layout:
    return Layout(engine="deepspeed", zero_stage=stage, data_parallel_size=data)


LAYOUTS = [
    megatron(8), megatron(8, sequence_parallel=True), megatron(2, 4), megatron(1, 8), zero(2),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.label)
def test_without_the_key_nothing_is_planned(layout: Layout) -> None:
    assert plan_recompute(experiment(None), layout) is None


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.label)
def test_with_plenty_of_memory_no_layer_is_recomputed(layout: Layout) -> None:
    assert plan(layout).num_layers == 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.label)
def test_each_mib_less_than_a_plan_needs_recomputes_more_layers(layout: Layout) -> None:
    """One recomputed layer saves nothing, as one is whole while backward runs: two come next."""
    layers, limit = [], PLENTY
    while not layers or layers[-1] < 32 // layout.pipeline_model_parallel_size:
        found = plan(layout, limit)
        assert found.estimated_bytes <= limit * MIB
        layers.append(found.num_layers)
        limit = (found.estimated_bytes - 1) // MIB
    assert layers == [0, *range(2, layers[-1] + 1)]


@pytest.mark.parametrize(("layout", "layers"), [(megatron(), 32), (megatron(1, 4), 8)])
def test_too_little_memory_names_the_key_the_layout_and_what_is_needed(
    layout: Layout, layers: int
) -> None:
    with pytest.raises(InputError) as caught:
        plan(layout, 1000)
    message = str(caught.value)
    needed = int(message.partition("needs about ")[2].partition(" MiB")[0])
    assert message.startswith(f"training.auto_recompute_device_memory_mib = 1000 MiB: {layout.label} ")
    assert f"even when all {layers} layers of a stage are recomputed" in message
    assert "lower training.micro_batch_size" in message
    assert plan(layout, needed + 1).num_layers == layers
    with pytest.raises(InputError):
        plan(layout, needed)


@pytest.mark.parametrize(
    ("more", "less"),
    [
        (zero(1), zero(2)),
        (zero(2), zero(3)),
        (zero(1, data=2), zero(1, data=8)),
        (zero(2, data=2), zero(2, data=8)),
        (zero(3, data=2), zero(3, data=8)),
        (megatron(data=1), megatron(data=8)),
        (megatron(data=8, use_distributed_optimizer=False), megatron(data=8)),
        (megatron(2), megatron(4)),
        (megatron(1, 1), megatron(1, 4)),
        (megatron(4), megatron(4, sequence_parallel=True)),
    ],
    ids=lambda layout: layout.label + ("" if layout.use_distributed_optimizer else " whole Adam"),
)  # fmt: skip
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_layout_that_shares_more_needs_less(more: Layout, less: Layout, precision: str) -> None:
    estimates = [plan(layout, precision=precision).estimated_bytes for layout in (more, less)]
    assert estimates[1] < estimates[0]


def test_data_parallel_ranks_that_share_nothing_need_as_much_as_one() -> None:
    layouts = [megatron(data=n, use_distributed_optimizer=False) for n in (1, 8)]
    one, eight = (plan(layout).estimated_bytes for layout in layouts)
    assert one == eight


@pytest.mark.parametrize(("precision", "per_parameter"), [("fp32", 16), ("bf16", 18)])
def test_states_are_weights_gradients_and_adams(precision: str, per_parameter: int) -> None:
    """Less the activations of one token, they are what the 7B's parameters take."""
    whole = plan(megatron(), precision=precision, seq_length=1, global_batch_size=1)
    assert whole.estimated_bytes == pytest.approx(per_parameter * 7.3216e9, rel=1e-3)


class _FusedNorm(torch.autograd.Function):
    """Keeps what the derivative of torch's fused operator keeps: input, weight and 1/√mean(x²).
    On a CPU torch spells the operator out and keeps more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True)))
        return functional.rms_norm(x, weight.shape, weight)


class Layer(torch.nn.Module):
    """One transformer layer that does what the kit's does, as megatron-core runs it on one rank."""

    def __init__(self, experiment: Experiment, dtype: torch.dtype) -> None:
        super().__init__()
        model, self.training_keys = experiment.model, experiment.training
        h, f = model.hidden_size, model.ffn_hidden_size
        self.heads = model.num_attention_heads
        new = {"dtype": dtype}
        self.norms = torch.nn.ParameterList(torch.ones(h, **new) for _ in range(2))
        self.qkv, self.o = torch.nn.Linear(h, 3 * h, **new), torch.nn.Linear(h, h, **new)
        self.fc1 = torch.nn.Linear(h, 2 * f, bias=False, **new)
        self.fc2 = torch.nn.Linear(f, h, bias=False, **new)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.o(self.attention(self.norm(x, self.norms[0]), angles))
        gate, up = self.fc1(self.norm(x, self.norms[1])).chunk(2, dim=-1)
        return x + self.fc2(functional.silu(gate) * (up + 0.0))  # megatron's glu_linear_offset

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.training_keys.use_fused_rmsnorm:
            return _FusedNorm.apply(x, weight)
        return rms_norm(x, weight, 1e-6, fused=False)

    def attention(self, x_SBH: Tensor, angles: Tensor) -> Tensor:
        q, k, v = self.qkv(x_SBH).unflatten(-1, (self.heads, -1)).chunk(3, dim=-1)
        q, k = rotate(q, angles), rotate(k, angles)
        if self.training_keys.use_flash_attn:
            return causal_attention(q, k, v)
        length, batch, heads, width = q.shape
        q, k, v = (part.reshape(length, batch * heads, width).transpose(0, 1) for part in (q, k, v))
        scores = torch.baddbmm(
            q.new_empty(len(q), length, length), q, k.mT, beta=0.0, alpha=width**-0.5
        )
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        probabilities = scores.float().masked_fill(hidden, -10000.0).softmax(-1).to(q.dtype)
        out = torch.bmm(probabilities, v).unflatten(0, (batch, heads))
        return out.permute(2, 0, 1, 3).contiguous().flatten(2)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


def saved_bytes(layer: Layer, x: Tensor, angles: Tensor) -> int:
    """Bytes of the distinct storages, parameters apart, that backward will ask for."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, angles)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("fused_norm", [True, False], ids=["fused norm", "spelled-out norm"])
@pytest.mark.parametrize("flash", [True, False], ids=["flash", "scores"])
@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_a_layer_are_what_torch_saves(
    precision: str, micro_batch: int, flash: bool, fused_norm: bool
) -> None:
    shape = {"num_layers": 1, "hidden_size": 256, "ffn_hidden_size": 688, "num_attention_heads": 16}
    resolved = experiment(
        None, {"model": shape}, precision=precision, seq_length=128, micro_batch_size=micro_batch,
        use_flash_attn=flash, use_fused_rmsnorm=fused_norm,
    )  # fmt: skip
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    x = torch.randn(128, micro_batch, 256, dtype=dtype, requires_grad=True)
    angles = torch.rand(128, 1, 1, 16)
    measured = saved_bytes(Layer(resolved, dtype), x, angles)

    head = _activation_bytes(resolved, Layout(), layers=0, recomputed=0)
    estimated = _activation_bytes(resolved, Layout(), layers=1, recomputed=0) - head
    assert estimated == pytest.approx(measured, rel=0.03)


def test_a_recomputed_layer_keeps_its_input_and_one_layer_is_whole_at_a_time() -> None:
    resolved = experiment(PLENTY)
    none, all_but_none, every = (
        _activation_bytes(resolved, Layout(), layers=4, recomputed=n) for n in (0, 1, 4)
    )
    head = _activation_bytes(resolved, Layout(), layers=0, recomputed=0)
    whole, layer_input = (none - head) // 4, 2048 * 4096 * 2
    assert all_but_none == none + layer_input
    assert every == head + 4 * layer_input + whole
