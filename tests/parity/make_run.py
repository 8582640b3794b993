"""A run folder with a small experiment, weights none of which is 0, and a corpus of random ids."""

from pathlib import Path
from typing import Any

from internlm_lib.data.indexed import indexed_writer
from internlm_lib.experiment.load import load_experiment, save_experiment
from internlm_lib.experiment.schema import Layout
from internlm_lib.run_folder import RunFolder
from internlm_lib.selftest.corpus import write_weights

PARAMS = Path(__file__).resolve().parents[2] / "params" / "tiny.yaml"

SMALL = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 176,
    "model.num_attention_heads": 4,
    "model.direct_start": True,
    "training.seq_length": 32,
    "training.micro_batch_size": 2,
    "training.global_batch_size": 8,
    "training.train_iters": 10,
    "training.auto_recompute_device_memory_mib": None,
}


def make_run(root: Path, candidate: Layout, **overrides: Any) -> RunFolder:
    """A run of the tiny experiment at a smaller size, ready for stage 03 to start directly."""
    folder = RunFolder.of("parity", root)
    values = {**SMALL, "parallel.reference": None, "parallel.candidate": candidate.model_dump()}
    _, experiment = load_experiment(PARAMS, {**values, **overrides})
    save_experiment(folder.experiment, folder.name, experiment)
    write_weights(folder.huggingface, experiment.model, experiment.training.seed)
    _write_corpus(folder, experiment.model.vocab_size)
    return folder


def _write_corpus(folder: RunFolder, vocab_size: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(3)
    with indexed_writer(folder.corpus_prefix, vocab_size) as writer:
        for _ in range(200):
            ids = torch.randint(3, vocab_size, (30,), generator=generator).tolist()
            writer.add_document([1, *ids, 2])
