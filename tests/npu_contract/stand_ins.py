"""CPU kernels for operators of torch_npu, under their real schemas, forward and backward.

They compute what torch_npu's documentation says and insist on its limits, which its own meta
kernels do not. What it says and these do not model (dropout, position biases, packed sequences …)
they refuse. A backward pass goes through the operator's real `*_backward` schema, on the meta
device too, where torch_npu has the kernels but no derivative. None of this tells what a device
rounds.

Import only in a process that has torch_npu. Importing registers everything.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch_npu  # noqa: F401
from torch import Tensor
from torch_npu.op_plugin.meta import _meta_registrations

MASK_SIZE = 2048
FLOATS = (torch.float16, torch.bfloat16, torch.float32)

# The meta kernel of attention asks a device for its generation once, to warn of something else.
assert _meta_registrations._npu_fusion_attention_warning_printed is False
_meta_registrations._npu_fusion_attention_warning_printed = True

_LIBRARY = torch.library.Library("npu", "IMPL")
_OPERATORS = torch.ops.npu


def _register(name: str, kernel: Callable[..., Any], *keys: str) -> None:
    for key in keys:
        _LIBRARY.impl(name, kernel, key)


def _named(name: str, kernel: Callable[..., Any], first: int) -> Callable[..., Any]:
    """The dispatcher hands over by position what the schema lets a caller give by name."""
    arguments = getattr(_OPERATORS, name).default._schema.arguments
    names = [argument.name for argument in arguments[first:]]

    def call(*values: Any, **options: Any) -> Any:
        return kernel(*values[:first], **dict(zip(names, values[first:], strict=False)), **options)

    return call


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"not as documented: {what}")


def _below_autograd(operator: Any, *arguments: Any, **options: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments, **options)


# Attention. softmax(scale · q kᵀ, masked) v; True in the mask is left out.


def attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, **options: Any
) -> tuple[Any, ...]:
    q, k, v = (_heads_first(x, head_num, input_layout) for x in (query, key, value))
    _require(q.dtype == k.dtype == v.dtype and q.dtype in FLOATS, f"dtypes {q.dtype}, {k.dtype}")
    _require(q.shape[1] <= 256 and q.shape[3] <= 768, f"heads {q.shape[1]} of {q.shape[3]}")
    scores = _scores(q, k, options.pop("scale", 1.0), **_mask_options(options))
    maximum = scores.amax(-1, keepdim=True)
    weights = (scores - maximum).exp()
    total = weights.sum(-1, keepdim=True)
    out = ((weights / total) @ v.float()).to(query.dtype)
    statistics = (x.expand(*x.shape[:3], 8).contiguous() for x in (maximum, total))
    return (_as_layout(out, input_layout), *statistics, query.new_empty(0), 0, 0, 0)


def attention_backward(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str,
    *, softmax_max: Tensor, softmax_sum: Tensor, attention_in: Tensor, scale_value: float = 1.0,
    **options: Any,
) -> tuple[Any, ...]:  # fmt: skip
    heads = (_heads_first(x, head_num, input_layout).float()
             for x in (query, key, value, dy, attention_in))  # fmt: skip
    q, k, v, gradient, out = heads
    scores = _scores(q, k, scale_value, **_mask_options(options))
    weights = (scores - softmax_max[..., :1]).exp() / softmax_sum[..., :1]
    of_scores = weights * (gradient @ v.mT - (gradient * out).sum(-1, keepdim=True))
    parts = (of_scores @ k * scale_value, of_scores.mT @ q * scale_value, weights.mT @ gradient)
    laid_out = (_as_layout(x, input_layout).to(query.dtype) for x in parts)
    return (*laid_out, query.new_empty(0), query.new_empty(0))


def _mask_options(options: dict[str, Any]) -> dict[str, Any]:
    """What decides about the mask; refuses what is asked for besides."""
    known = {
        "atten_mask": None,
        "sparse_mode": 0,
        "pre_tockens": 2**31 - 1,
        "next_tockens": 2**31 - 1,
    }
    free = {"inner_precise", "gen_mask_parallel", "sync", "seed", "offset", "numels"}
    defaults = {"keep_prob": 1.0, "softmax_layout": ""}
    for name, value in options.items():
        if name not in known and name not in free and value not in (None, defaults.get(name)):
            raise NotImplementedError(f"{name} = {value!r} is not modelled")
    return {name: options.get(name, default) for name, default in known.items()}


def _scores(q: Tensor, k: Tensor, scale: float, **mask: Any) -> Tensor:
    scores = (q.float() @ k.float().mT) * scale
    hidden = _hidden(q.shape[2], k.shape[2], **mask)
    return scores if hidden is None else scores.masked_fill(hidden, torch.finfo(scores.dtype).min)


def _hidden(
    s: int, t: int, atten_mask: Tensor | None, sparse_mode: int, pre_tockens: int, next_tockens: int
) -> Tensor | None:
    """[s, t], True where a query may not look. No mask is full attention, whatever the mode."""
    if atten_mask is None:
        return None
    _require(atten_mask.dtype in (torch.bool, torch.uint8), f"a mask of {atten_mask.dtype}")
    mask = atten_mask.bool()
    if sparse_mode in (2, 3):
        triangle = torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool).triu(1)
        _require(mask.shape == triangle.shape, f"a compressed mask of {list(mask.shape)}")
        _require(bool((mask == triangle).all()), "a compressed mask that is not triu(1)")
        return torch.ones(s, t, dtype=torch.bool).triu(1 if sparse_mode == 2 else 1 + t - s)
    if sparse_mode not in (0, 1):
        raise NotImplementedError(f"sparse_mode = {sparse_mode}")
    _require(mask.shape[-2:] == (s, t), f"a whole mask of {list(mask.shape)} for {s} × {t}")
    ahead = torch.arange(t) - torch.arange(s)[:, None]
    outside = (ahead > next_tockens) | (-ahead > pre_tockens)
    return mask | outside if sparse_mode == 0 else mask


def _heads_first(x: Tensor, heads: int, layout: str) -> Tensor:
    if layout == "SBH":
        return x.unflatten(2, (heads, -1)).permute(1, 2, 0, 3)
    if layout == "BSH":
        return x.unflatten(2, (heads, -1)).transpose(1, 2)
    raise NotImplementedError(f"layout {layout!r} is not modelled")


def _as_layout(x_BNSD: Tensor, layout: str) -> Tensor:
    order = (2, 0, 1, 3) if layout == "SBH" else (0, 2, 1, 3)
    return x_BNSD.permute(*order).flatten(2).contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, layout: str,
                options: dict[str, Any]) -> Any:  # fmt: skip
        results = _below_autograd(
            _OPERATORS.npu_fusion_attention, q, k, v, heads, layout, **options
        )
        ctx.save_for_backward(q, k, v, *results[:3])
        ctx.settings = (heads, layout, options)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, out, maximum, total = ctx.saved_tensors
        heads, layout, options = ctx.settings
        same = {name: value for name, value in options.items() if name != "scale"}
        parts = _OPERATORS.npu_fusion_attention_grad(
            q, k, v, gradients[0], heads, layout, softmax_max=maximum, softmax_sum=total,
            attention_in=out, scale_value=options.get("scale", 1.0), **same,
        )  # fmt: skip
        return (*parts[:3], None, None, None)


# RMSNorm. x / √(mean(x²) + eps) · gamma over gamma's dimensions; statistics in fp32.


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    _require(x.dtype == gamma.dtype and x.dtype in FLOATS, f"dtypes {x.dtype} and {gamma.dtype}")
    _require(x.shape[-gamma.ndim :] == gamma.shape, f"gamma {list(gamma.shape)}")
    dimensions = tuple(range(-gamma.ndim, 0))
    rstd = (x.float().square().mean(dimensions, keepdim=True) + epsilon).rsqrt()
    return (x.float() * rstd * gamma.float()).to(x.dtype), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    normed, weighted = x.float() * rstd, dy.float() * gamma.float()
    mean = (weighted * normed).mean(tuple(range(-gamma.ndim, 0)), keepdim=True)
    of_gamma = (dy.float() * normed).sum(tuple(range(x.ndim - gamma.ndim)))
    return ((weighted - normed * mean) * rstd).to(x.dtype), of_gamma


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, epsilon: float) -> Any:
        y, rstd = _below_autograd(_OPERATORS.npu_rms_norm, x, gamma, epsilon)
        ctx.save_for_backward(x, gamma, rstd)
        return y, rstd

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (*_OPERATORS.npu_rms_norm_backward(gradients[0], *ctx.saved_tensors), None)


# Rotary embedding. x · r1 + rotate(x) · r2.


def rotary(
    x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    _check_rotary(x, r1, r2, rotary_mode, rotate)
    return x * r1 + _rotated(x, rotary_mode) * r2


def rotary_backward(
    grad: Tensor, x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    of_x = grad * r1 - _rotated(grad * r2, rotary_mode)
    of_r1, of_r2 = grad * x, grad * _rotated(x, rotary_mode)
    return of_x, of_r1.sum_to_size(r1.shape), of_r2.sum_to_size(r2.shape)


def _rotated(x: Tensor, mode: str) -> Tensor:
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _check_rotary(x: Tensor, r1: Tensor, r2: Tensor, mode: str, rotate: Tensor | None) -> None:
    _require(mode in ("half", "interleave") and rotate is None, f"rotary_mode {mode!r}")
    _require(
        x.ndim == 4 and x.dtype == r1.dtype == r2.dtype, f"x {x.ndim}-d, {x.dtype}, {r1.dtype}"
    )
    s, b, n, d = x.shape  # SBND: so the kit has it
    allowed = [(s, 1, 1, d), (s, b, 1, d), (s, b, n, d)]
    _require(r1.shape == r2.shape and tuple(r1.shape) in allowed, f"r1 {list(r1.shape)} for SBND")
    _require(d % 2 == 0 and d < 896 and b < 1000 and n < 1000, f"x {list(x.shape)}")
    _require(max(float(r.abs().max()) for r in (r1, r2)) <= 1, "cos and sin beyond [-1, 1]")


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, r1: Tensor, r2: Tensor, mode: str) -> Any:
        ctx.save_for_backward(x, r1, r2)
        ctx.mode = mode
        return _below_autograd(_OPERATORS.npu_rotary_mul, x, r1, r2, rotary_mode=mode)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, r1, r2 = ctx.saved_tensors
        parts = _OPERATORS.npu_rotary_mul_backward(gradients[0], x, r1, r2, rotary_mode=ctx.mode)
        return (*parts, None)


# SwiGLU. silu(first half) · second half.


def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    _require(x.shape[dim] % 2 == 0, f"no two halves in {x.shape[dim]}")
    gate, up = x.chunk(2, dim)
    return torch.nn.functional.silu(gate) * up


def swiglu_backward(grad_output: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    gate, up = x.chunk(2, dim)
    sigmoid = gate.sigmoid()
    of_gate = grad_output * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((of_gate, grad_output * gate * sigmoid), dim)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Any:
        ctx.save_for_backward(x)
        ctx.dim = dim
        return _below_autograd(_OPERATORS.npu_swiglu, x, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return _OPERATORS.npu_swiglu_backward(gradients[0], x, ctx.dim), None


_AUTOGRAD = ("AutogradCPU", "AutogradMeta")

_register("npu_fusion_attention", _named("npu_fusion_attention", attention, 5), "CPU")
_register("npu_fusion_attention_grad", attention_backward, "CPU")
_register(
    "npu_fusion_attention",
    _named(
        "npu_fusion_attention",
        lambda q, k, v, heads, layout, **options: _Attention.apply(q, k, v, heads, layout, options),
        5,
    ),
    *_AUTOGRAD,
)
_register("npu_rms_norm", rms_norm, "CPU")
_register("npu_rms_norm_backward", rms_norm_backward, "CPU")
_register("npu_rms_norm", lambda x, gamma, eps=1e-6: _RmsNorm.apply(x, gamma, eps), *_AUTOGRAD)
_register("npu_rotary_mul", rotary, "CPU")
_register("npu_rotary_mul_backward", rotary_backward, "CPU")
_register(
    "npu_rotary_mul",
    lambda x, r1, r2, rotary_mode="half", rotate=None: _Rotary.apply(x, r1, r2, rotary_mode),
    *_AUTOGRAD,
)
_register("npu_swiglu", swiglu, "CPU")
_register("npu_swiglu_backward", swiglu_backward, "CPU")
_register("npu_swiglu", lambda x, dim=-1: _SwiGLU.apply(x, dim), *_AUTOGRAD)
