"""megatron-core on a CPU: each adapted point, and that nobody else's torch is touched."""

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from internlm_lib.devices import cpu_megatron, megatron_points, select_device
from internlm_lib.devices.base import Device, check_world_size
from internlm_lib.devices.cpu import CpuDevice
from internlm_lib.errors import InputError

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
SHAPES: dict[str, tuple[Any, ...]] = {
    "tensor": ([1.0, 2.0],), "full": ((2,), 7.0), "arange": (2,), "randint": (0, 5, (2,)),
    **{name: (2,) for name in ("zeros", "ones", "empty", "rand", "randn")},
    **{name: (torch.ones(2),) for name in ("zeros_like", "ones_like", "empty_like")},
    "full_like": (torch.ones(2), 7.0),
}  # fmt: skip
"""Arguments that make two values with each of the adapted factories."""


@pytest.fixture(autouse=True, scope="module")
def adapted() -> None:
    select_device("cpu").adapt_megatron()


@pytest.fixture
def seen() -> Any:
    """`torch` as megatron's modules see it."""
    from megatron.core import parallel_state

    return parallel_state.torch


@pytest.fixture
def cuda(seen: Any) -> Any:
    return seen.cuda


def same_draws(restore: Callable[[Any], None], state: Any) -> bool:
    """Whether restoring a state taken just before makes torch's CPU generator draw again."""
    first = torch.rand(4)
    restore(state)
    return bool((torch.rand(4) == first).all())


def current_device(cuda: Any) -> None:
    assert cuda.current_device() == torch.device("cpu")


def waiting_and_binding(cuda: Any) -> None:
    assert cuda.synchronize() is cuda.synchronize(0) is cuda.empty_cache() is None
    assert cuda.set_device(3) is None


def device_count(cuda: Any) -> None:
    assert cuda.device_count() == 1


def streams_and_events(cuda: Any) -> None:
    stream, event = cuda.Stream(device=0, priority=-1), cuda.Event(enable_timing=True)
    stream.wait_stream(cuda.current_stream())
    event.record(cuda.default_stream())
    stream.wait_event(event)
    event.wait()
    event.synchronize()
    entered = False
    with cuda.stream(stream):
        entered = True
    assert entered


def generator_state(cuda: Any) -> None:
    cuda.manual_seed(5)
    assert (cuda.get_rng_state() == torch.Generator().manual_seed(5).get_state()).all()
    assert same_draws(cuda.set_rng_state, cuda.get_rng_state())
    assert same_draws(lambda state: cuda.set_rng_state(state, 0), cuda.get_rng_state("cuda"))


def megatrons_generator_state(cuda: Any) -> None:
    from megatron.core.tensor_parallel import random

    state = random._get_cuda_rng_state()
    assert (state == torch.get_rng_state()).all()
    assert same_draws(random._set_cuda_rng_state, state)
    clone = random._get_cuda_rng_state(clone=True, graph_safe=False)
    assert same_draws(lambda s: random._set_cuda_rng_state(s, graph_safe=False), clone)


def seeded_tracker(cuda: Any) -> None:
    """What stands on those: two named streams of random numbers that do not mix."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("one", 1)
    torch.manual_seed(2)
    with tracker.fork("one"):
        forked = torch.rand(4)
    assert (torch.rand(4) == torch.rand(4, generator=torch.Generator().manual_seed(2))).all()
    assert (forked == torch.rand(4, generator=torch.Generator().manual_seed(1))).all()


def tensor_types(cuda: Any) -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    clip_grad_by_total_norm_fp32([weight], max_norm=1.0, total_norm=5.0)
    assert weight.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)


def loaded_loss_scale(cuda: Any) -> None:
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    one, other = (DynamicGradScaler(2.0**20, 1.0, 2.0, 0.5, 4, 2) for _ in range(2))
    for overflow in (True, True, False):
        one.update(overflow)
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict() and other.scale.item() == 2.0**19


def adamw(cuda: Any) -> None:
    """The fused form, which is one to megatron and changes nothing but rounding."""
    from megatron.core import optimizer

    start = torch.linspace(-1, 1, 100)
    both = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    settings = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    fused, plain = optimizer.torch.optim.AdamW([both[0]], **settings), torch.optim.AdamW
    assert isinstance(fused, plain) and fused.param_groups[0]["fused"]
    steps = (fused, plain([both[1]], foreach=False, **settings))
    for _ in range(3):
        for parameter, one in zip(both, steps, strict=True):
            parameter.grad = start.sin()
            one.step()
    assert torch.allclose(*both, rtol=1e-6, atol=1e-7)


def lone_ranks(cuda: Any) -> None:
    """Left out only if one rank would copy a buffer onto itself and nobody waits for a handle."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    found: list[Any] = []
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        assert isinstance(getattr(buffers, name), cpu_megatron._UnlessAlone)
    call = cpu_megatron._UnlessAlone(lambda *tensors, **options: found.append(options) or "done")
    buffer, one = torch.ones(4), types.SimpleNamespace(size=lambda: 1)
    two = types.SimpleNamespace(size=lambda: 2)
    assert call(buffer, buffer.view(4), group=one, async_op=False) is None and not found
    assert call(buffer, buffer, group=two, async_op=False) == "done"
    assert call(buffer, buffer, group=one, async_op=True) == "done"
    assert call(buffer, torch.ones(4), group=one) == "done"


@pytest.mark.parametrize(
    "holds",
    [
        adamw, lone_ranks, current_device, waiting_and_binding, device_count,
        streams_and_events, generator_state,
        megatrons_generator_state, seeded_tracker, tensor_types, loaded_loss_scale,
    ],
    ids=lambda holds: holds.__name__.replace("_", " "),
)  # fmt: skip
def test_what_stands_in_for_cuda(holds: Callable[[Any], None], cuda: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        holds(cuda)


@pytest.mark.parametrize("name", cpu_megatron._FACTORIES)
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 1)], ids=str)
def test_tensors_asked_for_on_cuda_lie_on_the_cpu(seen: Any, name: str, device: Any) -> None:
    made = getattr(seen, name)(*SHAPES[name], device=device)
    assert made.device == torch.device("cpu") and made.shape == (2,)


@pytest.mark.parametrize("device", ["meta", "cpu", None])
def test_tensors_asked_for_elsewhere_lie_there(seen: Any, device: str | None) -> None:
    made = seen.full((2,), 7, device=device, dtype=torch.int32)
    assert (made.device.type, made.dtype) == (device or "cpu", torch.int32)


def test_names_that_are_not_adapted_are_torchs_own(seen: Any) -> None:
    adapted = {*vars(seen), *dir(types.ModuleType)}
    names = [n for n in dir(torch) if n not in adapted and not n.startswith("__")]
    assert len(names) > 1000
    assert all(getattr(seen, name) is getattr(torch, name) for name in names)
    own = ("is_available", "is_current_stream_capturing", "nvtx", "memory_allocated", "amp")
    assert all(getattr(seen.cuda, name) is getattr(torch.cuda, name) for name in own)


@pytest.mark.parametrize("where", ["torch", "torch.cuda"])
def test_a_name_that_torch_lacks_is_lacking(seen: Any, where: str) -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = (seen if where == "torch" else seen.cuda).no_such_name


def test_torch_itself_is_untouched() -> None:
    assert type(torch) is type(torch.cuda) is types.ModuleType
    for name in cpu_megatron._FACTORIES:
        assert isinstance(getattr(torch, name), types.BuiltinFunctionType), name
    for name in vars(cpu_megatron.CpuInPlaceOfCuda):
        if not name.startswith("__"):
            assert getattr(torch.cuda, name).__module__.startswith("torch."), name
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


def test_every_module_of_megatron_sees_the_stand_in(seen: Any) -> None:
    modules = cpu_megatron.megatron_modules()
    found = {m.__name__: vars(m)["torch"] for m in modules if "torch" in vars(m)}
    del found["megatron.core.dist_checkpointing.strategies"]  # a submodule of that name
    assert found.pop("megatron.core.optimizer").before is seen  # with another AdamW
    assert len(found) > 100
    assert [name for name, each in found.items() if each is not seen] == []
    assert seen is not torch


def code_of_megatron() -> Iterator[types.CodeType]:
    """The code of all functions and methods of megatron-core's loaded modules."""
    for module in cpu_megatron.megatron_modules():
        owned = [
            v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__
        ]
        for value in owned:
            for member in vars(value).values() if isinstance(value, type) else [value]:
                plain = inspect.unwrap(getattr(member, "__func__", member))
                if isinstance(plain, types.FunctionType):
                    yield plain.__code__


def strings(constant: Any) -> Iterator[str]:
    """All string constants of code, at any depth."""
    if isinstance(constant, types.CodeType):
        constant = constant.co_consts
    if isinstance(constant, (tuple, frozenset)):
        for item in constant:
            yield from strings(item)
    elif isinstance(constant, str):
        yield constant


def test_no_cuda_tensor_type_is_left_in_megatrons_code() -> None:
    constants = {text for code in code_of_megatron() for text in strings(code)}
    assert {"torch.FloatTensor", "torch.HalfTensor", "torch.BFloat16Tensor"} <= constants
    names = (f"torch.cuda.{kind}Tensor" for kind in ("Float", "Half", "BFloat16"))
    assert constants.isdisjoint(names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weights_gradient_is_added_to_what_is_there(dtype: torch.dtype) -> None:
    from megatron.core.tensor_parallel import layers

    inputs, gradient = torch.randn(6, 3).to(dtype), torch.randn(6, 4).to(dtype)
    total = torch.ones(4, 3)
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(inputs, gradient, total)
    expected = 1 + gradient.double().t() @ inputs.double()
    torch.testing.assert_close(total.double(), expected, **TOLERANCE[dtype])


def test_type_names_are_swapped_at_any_depth() -> None:
    def outer(x: Any) -> Any:
        def inner() -> bool:
            return x in ("torch.cuda.HalfTensor", ("torch.cuda.FloatTensor", "torch.cuda.Other"))

        return x == "torch.cuda.FloatTensor" or inner()

    outer.__code__ = megatron_points._renamed(outer.__code__, "torch.")
    assert set(strings(outer.__code__)) >= {"torch.FloatTensor", "torch.HalfTensor"}
    assert [t for t in strings(outer.__code__) if "cuda" in t] == ["torch.cuda.Other"]
    assert outer("torch.FloatTensor") and outer("torch.HalfTensor")
    assert not outer("torch.cuda.FloatTensor")


def test_adapting_twice_changes_nothing() -> None:
    from megatron.core.tensor_parallel import random

    def state() -> tuple[Any, ...]:
        modules = {m.__name__: id(vars(m).get("torch")) for m in cpu_megatron.megatron_modules()}
        generators = (random._set_cuda_rng_state, random._get_cuda_rng_state)
        return modules, list(code_of_megatron()), [function.__code__ for function in generators]

    before = state()
    cpu_megatron.adapt()
    assert state() == before


def test_a_process_that_has_the_cpu_cannot_turn_to_the_meta_device() -> None:
    with pytest.raises(RuntimeError, match="already runs on another device than meta"):
        cpu_megatron.adapt("meta")
    cpu_megatron.adapt()


class Four(CpuDevice):
    name = "npu"

    def count(self) -> int:  # type: ignore[override]
        return 4


def test_more_ranks_than_devices_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        check_world_size(Four(), 8, "parallel.candidate")
    assert str(caught.value) == (
        "parallel.candidate needs 8 npu devices (tensor × pipeline × data parallel size), "
        "this node has 4; lower the sizes, or train on several nodes: `internlm launch`"
    )


@pytest.mark.parametrize(("device", "ranks"), [(Four(), 4), (Four(), 1), (CpuDevice(), 1000)])
def test_ranks_that_have_a_device_each_or_share_the_cpu_are_welcome(
    device: Device, ranks: int
) -> None:
    check_world_size(device, ranks, "parallel.candidate")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(InputError, match=r"parallel\.device = 'cuda' is not usable .* found: cpu"):
        select_device("cuda")


@pytest.mark.parametrize(
    ("asked", "present", "given"),
    [
        ("auto", ("npu", "cuda", "cpu"), "npu"),
        ("auto", ("cuda", "cpu"), "cuda"),
        ("auto", ("cpu",), "cpu"),
        ("cuda", ("npu", "cuda", "cpu"), "cuda"),
        ("cpu", ("npu", "cuda", "cpu"), "cpu"),
    ],
)
def test_auto_takes_the_first_of_npu_cuda_cpu(
    monkeypatch: pytest.MonkeyPatch, asked: str, present: tuple[str, ...], given: str
) -> None:
    from internlm_lib.devices.cuda import CudaDevice
    from internlm_lib.devices.npu import NpuDevice

    for device in (NpuDevice, CudaDevice):
        monkeypatch.setattr(device, "available", lambda self: self.name in present)
    assert select_device(asked).name == given
