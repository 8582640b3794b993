"""What an optimizer keeps of each parameter on this rank, as flat pieces of memory.

Engines lay them out in their own ways; a checkpoint reads and fills them through this one view.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a parameter's state, in row-major order."""

    parameter: Parameter
    kind: str
    """`main` (the weight that is updated, fp32), or one of Adam's `exp_avg`, `exp_avg_sq`."""
    start: int
    """First of the elements in the rank's whole part of the parameter."""
    value: Tensor
    """float32 [n]: the optimizer's own memory, not a copy."""
    shared: bool
    """Whether every data parallel rank holds the same."""


def adam_state(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """Adam's state of a tensor; before the first step that of a step 0, as torch would make it."""
    state: dict[str, Tensor] = optimizer.state[tensor]
    if not state:
        fused = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        device = tensor.device if fused else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for name in MOMENTS:
            state[name] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return state


def pieces_of(
    optimizer: torch.optim.Optimizer,
    parameter: Parameter,
    tensor: Tensor,
    *,
    start: int = 0,
    where: slice = slice(None),
    shared: bool = False,
) -> Iterator[Fragment]:
    """The three fragments of a parameter.

    Args:
        tensor: what the optimizer updates, of which `where` are this parameter's elements.
    """
    state = adam_state(optimizer, tensor)
    values = {"main": tensor.detach(), **{name: state[name] for name in MOMENTS}}
    for kind, value in values.items():
        yield Fragment(parameter, kind, start, value.view(-1)[where], shared)


def adam_step(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Updates taken so far; 0 on a rank that owns no element."""
    steps = {int(state["step"]) for o in optimizers for state in o.state.values() if state}
    return max(steps, default=0)


def set_adam_step(optimizers: Iterable[torch.optim.Optimizer], step: int) -> None:
    """Give every state a counter of its own: torch counts up in place."""
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state["step"] = torch.full_like(state["step"], step)
