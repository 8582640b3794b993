"""What the kit's NPU kernels must do, held against the real schemas and the plain formulas.

Import only in a process that has torch_npu, with stubs; `worker` runs these.
"""

from collections.abc import Callable, Sequence

import torch
import torch_npu
from torch import Tensor

from internlm_lib.devices.cpu import CpuDevice
from internlm_lib.errors import InputError
from internlm_lib.experiment.presets import PRESETS
from internlm_lib.experiment.schema import Layout, ModelSection, TrainingSection
from internlm_lib.kernels import REFERENCE, Kernels, kernels_of
from tests.npu_contract import stand_ins
from tests.npu_contract.calls import dotted_names, operator_calls
from tests.unit.selftest.small import SIZES

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-6}
"""Largest difference relative to the largest element. Both sides round to the dtype, but at other
places: of bfloat16's 8 bits two may be lost."""
HEAD_DIM = 128
"""InternLM's."""


def every_operator_call_fits_its_schema() -> None:
    calls = operator_calls()
    assert {call.name for call in calls} >= {
        "npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu"
    }  # fmt: skip
    for call in calls:
        schema = getattr(torch.ops.npu, call.name).default._schema
        names = [argument.name for argument in schema.arguments]
        taken = set(names[: call.positional])
        unknown = set(call.keywords) - set(names)
        assert not unknown, f"{call.where}: {call.name} has no {unknown}; it has {names}"
        assert call.positional <= len(names) and not taken & set(call.keywords), call
        needed = {a.name for a in schema.arguments if not a.has_default_value()}
        assert needed <= taken | set(call.keywords), f"{call.where}: {needed} must be given"


def every_name_of_torch_npu_exists() -> None:
    for name, where in dotted_names().items():
        value = {"torch": torch, "torch_npu": torch_npu}[name.partition(".")[0]]
        for part in name.split(".")[1:]:
            assert hasattr(value, part), f"{where}: {name} does not exist"
            value = getattr(value, part)


def attention_is_causal_softmax_in_training() -> None:
    _attend(queries=37, keys=37)


def attention_decodes_with_fewer_queries_than_keys() -> None:
    _attend(queries=5, keys=37)
    _attend(queries=1, keys=37)


def rms_norm_is_llamas() -> None:
    for eps in (1e-6, 1e-2):
        _compare(
            lambda k, eps=eps: lambda x, w: k.rms_norm(x, w, eps), _random(7, 2, 24), _random(24)
        )


def rotary_turns_halves() -> None:
    angles = torch.rand(7, 1, 1, HEAD_DIM // 2, generator=_generator()).repeat(1, 1, 1, 2) * 6
    _compare(lambda k: lambda x: k.rotary(x, angles), _random(7, 2, 3, HEAD_DIM))


def swiglu_gates_with_the_first_half() -> None:
    _compare(lambda k: k.swiglu, _random(7, 2, 22))


def what_the_operators_do_not_take_is_refused() -> None:
    npu = kernels_of("npu")
    wide, many, double = _random(2, 1, 1, 770), _random(2, 1, 300, 8), _random(2, 1, 1, 8).double()
    x = _random(2, 1, 1, 8)
    for refused in (
        *(lambda bad=bad: npu.attention(bad, bad, bad) for bad in (wide, many, double)),
        lambda: npu.attention(x, x[:1], x[:1]),
        lambda: npu.rms_norm(x.bfloat16(), _random(8), 1e-6),
        lambda: npu.rms_norm(x, _random(4), 1e-6),
        lambda: npu.rotary(_random(2, 1, 1, 896), torch.ones(2, 1, 1, 896)),
        lambda: npu.rotary(x, torch.ones(2, 1, 1, 8), True),
        lambda: npu.swiglu(_random(2, 7)),
    ):
        try:
            refused()
        except InputError:
            continue
        raise AssertionError("an operator was called with what it is not documented to take")


def stand_ins_have_the_meta_kernels_shapes_and_dtypes() -> None:
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    q, x, wide = _random(4, 2, 24), _random(4, 2, 24), _random(4, 2, 3, 8)
    for dtype in TOLERANCES:
        for operator, tensors, options in (
            (torch.ops.npu.npu_fusion_attention, (q, q, q), {"atten_mask": mask, "sparse_mode": 3}),
            (torch.ops.npu.npu_rms_norm, (x, _random(24)), {}),
            (torch.ops.npu.npu_rotary_mul, (wide, *2 * [_random(4, 1, 1, 8).clamp(-1, 1)]), {}),
            (torch.ops.npu.npu_swiglu, (x,), {}),
        ):
            given = [t.to(dtype) for t in tensors]
            fixed = (3, "SBH") if operator is torch.ops.npu.npu_fusion_attention else ()
            on_cpu = operator(*given, *fixed, **options)
            on_meta = operator(*(t.to("meta") for t in given), *fixed, **_on_meta(options))
            assert _forms(on_cpu) == _forms(on_meta), (operator, _forms(on_cpu), _forms(on_meta))


def fused_adamw_has_a_kernel() -> None:
    """Which is why the kit takes torch's own AdamW, fused, on an NPU too."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_adamw_", "PrivateUse1")
    assert has and torch._C._get_privateuse1_backend_name() == "npu"


def a_tiny_model_computes_as_on_a_cpu() -> None:
    """Logits, loss and all gradients, with every switch on."""
    from internlm_lib.model.build import build_gpt_model

    shape = {**PRESETS["internlm-tiny"], "vocab_size": 256}
    model = ModelSection(preset="internlm-tiny", **shape)
    training = TrainingSection(precision="fp32", seq_length=48, recompute_granularity=None)
    tokens = torch.randint(0, 256, (2, 49), generator=_generator())
    found = []
    for device in (CpuDevice(), _CpuWithNpuKernels()):
        gpt = build_gpt_model(model, Layout(), training, device)
        for parameter, value in zip(gpt.parameters(), _weights(gpt), strict=True):
            parameter.data.copy_(value)
        positions = torch.arange(48).expand(2, -1)
        logits = gpt(tokens[:, :-1], positions, None)
        loss = gpt(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
        loss.backward()
        found.append([logits, loss, *(p.grad for p in gpt.parameters())])
    for ours, theirs in zip(*found, strict=True):
        _assert_close(ours, theirs, torch.float32, factor=5)


def the_selftests_cases_pass() -> None:
    """What `internlm selftest` asks of an NPU is what its documentation promises."""
    from internlm_lib.selftest.kernels import TOLERANCES as allowed
    from internlm_lib.selftest.kernels import cases, compare

    for case in cases(SIZES):
        for dtype in SIZES.dtypes:
            figure = compare(case, dtype, kernels_of("npu"), torch.device("cpu")).figure
            assert figure <= allowed[dtype], f"{case.name}, {dtype}: {figure:.2g}"


SOURCE_CHECKS: Sequence[Callable[[], None]] = (
    every_operator_call_fits_its_schema,
    every_name_of_torch_npu_exists,
)
KERNEL_CHECKS: Sequence[Callable[[], None]] = (
    attention_is_causal_softmax_in_training,
    attention_decodes_with_fewer_queries_than_keys,
    rms_norm_is_llamas,
    rotary_turns_halves,
    swiglu_gates_with_the_first_half,
    what_the_operators_do_not_take_is_refused,
    stand_ins_have_the_meta_kernels_shapes_and_dtypes,
    fused_adamw_has_a_kernel,
    a_tiny_model_computes_as_on_a_cpu,
    the_selftests_cases_pass,
)


class _CpuWithNpuKernels(CpuDevice):
    @property
    def kernels(self) -> str:
        return "npu"


def _attend(queries: int, keys: int) -> None:
    shapes = ((queries, 2, 3, HEAD_DIM), (keys, 2, 3, HEAD_DIM), (keys, 2, 3, HEAD_DIM))
    _compare(lambda k: k.attention, *(_random(*shape, seed=n) for n, shape in enumerate(shapes)))


def _compare(function: Callable[[Kernels], Callable[..., Tensor]], *inputs: Tensor) -> None:
    """The NPU's kernel against the formula: values, and the gradient of every input."""
    for dtype in TOLERANCES:
        results = []
        for kernels in (kernels_of("npu"), REFERENCE):
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            value = function(kernels)(*leaves)
            direction = _random(*value.shape, seed=9).to(dtype)
            results.append([value, *torch.autograd.grad(value, leaves, direction)])
        for ours, theirs in zip(*results, strict=True):
            _assert_close(ours, theirs, dtype)


def _assert_close(ours: Tensor, theirs: Tensor, dtype: torch.dtype, factor: float = 1) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (ours.shape, theirs.shape)
    difference = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert difference <= factor * TOLERANCES[dtype], f"{difference:.2g} of the largest, {dtype}"


def _weights(gpt: torch.nn.Module) -> list[Tensor]:
    scale = {1: 1.0, 2: 0.05}
    return [
        (p.ndim == 1) * 1.0 + scale[p.ndim] * 0.5 * _random(*p.shape, seed=n)
        for n, p in enumerate(gpt.parameters())
    ]


def _forms(results: object) -> list[object]:
    parts = results if isinstance(results, (tuple, list)) else [results]
    return [(tuple(p.shape), p.dtype) if isinstance(p, Tensor) else type(p) for p in parts]


def _on_meta(options: dict[str, object]) -> dict[str, object]:
    return {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in options.items()}


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_generator(seed))


assert stand_ins  # imported for what it registers
