"""A rank that only says who it is, and adds itself to all others over gloo."""

import json
import os

from internlm_lib.files import write_text
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")


def add(folder: RunFolder) -> None:
    """Writes `rank<N>.json`: torchrun's numbers, and the sum of all ranks' numbers."""
    import torch

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    total = torch.tensor(rank)
    torch.distributed.all_reduce(total)
    seen = {**{name: int(os.environ[name]) for name in NAMES}, "sum": int(total)}
    write_text(folder.path / f"rank{rank}.json", json.dumps(seen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    rank_main(add)
