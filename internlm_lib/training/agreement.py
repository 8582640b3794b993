"""What ranks agree on between steps. Import torch.distributed's process group first."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch

Result = TypeVar("Result")


def any_rank(device: torch.device, *flags: bool) -> list[bool]:
    """Each flag, if it is set on any rank. Collective: one small all-reduce."""
    values = torch.tensor(flags, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def from_rank_zero(work: Callable[[], Result]) -> Result:
    """What `work` returns on rank 0, which alone does it; on every rank. Collective."""
    found = [work() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found)
    return cast(Result, found[0])


def on_rank_zero(work: Callable[[], None]) -> str:
    """Do `work` on rank 0; every rank gets the text of its OSError, or "". Collective."""

    def attempt() -> str:
        try:
            work()
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    return from_rank_zero(attempt)
