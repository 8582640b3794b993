"""What ranks agree on between steps. Import torch.distributed's process group first."""

from collections.abc import Callable

import torch


def any_rank(device: torch.device, *flags: bool) -> list[bool]:
    """Each flag, if it is set on any rank. Collective: one small all-reduce."""
    values = torch.tensor(flags, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def on_rank_zero(work: Callable[[], None]) -> str:
    """Do `work` on rank 0; every rank gets the text of its OSError, or "". Collective."""
    errors = [""]
    if torch.distributed.get_rank() == 0:
        try:
            work()
        except OSError as error:
            errors = [f"{type(error).__name__}: {error}"]
    torch.distributed.broadcast_object_list(errors)
    return errors[0]
