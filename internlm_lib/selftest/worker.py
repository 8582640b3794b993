"""One rank of the selftest: `python -m internlm_lib.selftest.worker RUN_FOLDER DEVICE`."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from internlm_lib.devices import Device, select_device
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder
from internlm_lib.selftest.checks import Check, as_values, carry_out
from internlm_lib.selftest.recipe import parity_layout
from internlm_lib.selftest.sizes import sizes_of

_TIMEOUT_MINUTES = 10.0


def selftest_in_rank(folder: RunFolder, name: str) -> None:
    device = select_device(name)
    device.adapt_megatron()
    import torch

    from internlm_lib.model.parallel import initialize_parallel, shutdown

    layout = parity_layout(int(os.environ["WORLD_SIZE"]))
    initialize_parallel(layout, device, timeout_minutes=_TIMEOUT_MINUTES)
    rank = torch.distributed.get_rank()
    with rows_path(folder, rank).open("w", encoding="utf-8") as file:
        for check in _checks(device, layout.world_size, folder.path):
            file.write(json.dumps(as_values(carry_out(check, rank))) + "\n")
            file.flush()
    shutdown()


def rows_path(folder: RunFolder, rank: int) -> Path:
    """JSON lines: the rows of a rank, in the order of its checks."""
    return folder.path / "checks" / f"rank{rank}.jsonl"


def _checks(device: Device, ranks: int, folder: Path) -> Iterator[Check]:
    from internlm_lib.selftest.collectives import collective_checks
    from internlm_lib.selftest.kernels import kernel_checks
    from internlm_lib.selftest.memory import memory_checks
    from internlm_lib.selftest.parity import parity_checks
    from internlm_lib.selftest.rates import rate_checks

    sizes = sizes_of(device.name)
    yield from kernel_checks(device, sizes)
    yield from collective_checks(device, sizes)
    yield from memory_checks(device, sizes)
    yield from rate_checks(device, sizes)
    yield from parity_checks(device, ranks, folder)


if __name__ == "__main__":
    rank_main(selftest_in_rank)
