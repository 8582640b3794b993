"""One rank of `test_order.py`: `python -m tests.parity.order_worker RUN_FOLDER RESULT`."""

import os
from pathlib import Path
from typing import Any

import torch

from internlm_lib.devices import select_device
from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import Experiment, Layout
from internlm_lib.files import write_json
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder

STEPS = 3


def sources(folder: RunFolder) -> dict[str, Any]:
    """What to read, and how, by name."""
    prefix = folder.corpus_prefix
    blend = [(2.0, prefix), (1.0, prefix.with_name("more"))]
    return {
        "pretrain": (prefix, "pretrain"),
        "instruction": (prefix, "instruction"),
        "blend": (blend, "pretrain"),
    }


def work(folder: RunFolder, result: str) -> None:
    """What every rank reads, with an empty cache, and with one that was cut off since."""
    device = select_device("cpu")
    device.adapt_megatron()
    from internlm_lib.model.parallel import initialize_parallel, shutdown

    _, experiment = load_experiment(folder.experiment)
    size = int(os.environ["WORLD_SIZE"])
    initialize_parallel(Layout(data_parallel_size=size), device)
    rank = torch.distributed.get_rank()
    found = {"empty": _read(folder, experiment), "empty again": _read(folder, experiment)}
    torch.distributed.barrier()
    if rank == 0:
        for path in (folder.data / "index").glob("*/documents.npy"):
            os.truncate(path, path.stat().st_size // 2)
    torch.distributed.barrier()
    found["cut off"] = _read(folder, experiment)
    write_json(Path(f"{result}.{rank}"), found)
    shutdown()


def _read(folder: RunFolder, experiment: Experiment) -> dict[str, Any]:
    """Hash of each order, and the tokens of this rank's batches of some steps."""
    from megatron.core import parallel_state

    from internlm_lib.data.batches import BatchStream, build_datasets

    training, found = experiment.training, {}
    for name, (source, kind) in sources(folder).items():
        dataset = build_datasets(
            source, experiment.data, training, experiment.model.vocab_size, kind=kind
        ).train
        stream = BatchStream(
            dataset, global_batch_size=training.global_batch_size, micro_batch_size=2,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            device=torch.device("cpu"),
        )  # fmt: skip
        steps = [[batch.tokens.tolist() for batch in stream.step(n)] for n in range(STEPS)]
        found[name] = {"sha256": dataset.order_sha256, "steps": steps}
    return found


if __name__ == "__main__":
    rank_main(work)
