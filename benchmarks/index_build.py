"""How long does the order of samples take to make, and how much memory?

    python benchmarks/index_build.py [--json] [--samples 1000000,10000000]

Writes a corpus of Alpaca's size (52,002 documents, 6 million tokens of random ids), then asks for
so many training samples of 2048 tokens, each in a process of its own: from the kit with an empty
cache, from the kit once more, and from megatron-core's GPTDataset. Seconds are those of building
the datasets; memory is the process's peak above what it held before. An order that megatron-core
would need more than `--limit-gib` for is left out on its side. Exit code 1 if a million samples
take 10 s or longer, or more of them longer than in proportion. What is being done goes to stderr.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SAMPLES = (1_000_000, 6_400_000, 10_000_000, 128_000_000)
"""Among them those of the predecessor's whole recipes: 6.4 million for 65B, 128 million for 7B."""
SECONDS_PER_MILLION = 10.0
SEQ_LENGTH, DOCUMENTS, VOCABULARY = 2048, 52_002, 103_168
SPLIT = "949,50,1"
GIB = 1 << 30
_MEGATRON_BYTES = 20
"""What GPTDataset holds per document of every epoch while it builds: two int64 and an int32."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, not a table")
    parser.add_argument("--samples", default=",".join(map(str, SAMPLES)), help="numbers of samples")
    parser.add_argument("--limit-gib", type=float, default=8.0, help="memory for megatron-core")
    arguments = parser.parse_args()
    counts = [int(float(count)) for count in arguments.samples.split(",")]
    with tempfile.TemporaryDirectory(prefix="index-") as folder:
        result = measure(Path(folder), counts, arguments.limit_gib)
    print(json.dumps(result, indent=2) if arguments.json else as_text(result))
    sys.exit(0 if result["passed"] else 1)


def measure(folder: Path, counts: list[int], limit_gib: float) -> dict[str, Any]:
    """Build the order of each number of samples below an empty folder; what is printed."""
    from internlm_lib.provenance import record

    load = os.getloadavg()[0]
    tell("writing a corpus")
    tokens = write_corpus(folder / "corpus")
    rows = []
    for count in counts:
        row: dict[str, Any] = {"samples": count}
        row["kit"] = in_child("kit", folder, count)
        row["kit_again"] = in_child("kit", folder, count)
        epochs = -(-count * SEQ_LENGTH // tokens)
        if epochs * DOCUMENTS * _MEGATRON_BYTES < limit_gib * GIB:
            row["megatron_core"] = in_child("megatron_core", folder, count)
        rows.append(row)
    limits = {row["samples"]: SECONDS_PER_MILLION * max(1.0, row["samples"] / 1e6) for row in rows}
    return {
        "benchmark": "index_build",
        "corpus": {"documents": DOCUMENTS, "tokens": tokens, "seq_length": SEQ_LENGTH},
        "limit_seconds_per_million_samples": SECONDS_PER_MILLION,
        "orders": rows,
        "passed": all(row["kit"]["seconds"] < limits[row["samples"]] for row in rows),
        "load_before": round(load, 2),
        "made_with": record(),
    }


def write_corpus(prefix: Path) -> int:
    """Documents as long as Alpaca's; returns the number of tokens."""
    import numpy

    from internlm_lib.data.indexed import indexed_writer

    random = numpy.random.default_rng(0)
    lengths = random.lognormal(numpy.log(100), 0.55, DOCUMENTS).clip(20, 1500).astype(int)
    with indexed_writer(prefix, VOCABULARY) as writer:
        for length in lengths.tolist():
            writer.add_document(random.integers(3, VOCABULARY, length).tolist())
    return int(lengths.sum())


def in_child(who: str, folder: Path, samples: int) -> dict[str, Any]:
    tell(f"{samples:,} samples: {who}")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "child", who, str(folder), str(samples)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def as_text(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [
        "| samples | made by | seconds | MiB | epochs shuffled together |",
        "|---|---|---|---|---|",
    ]
    for row in result["orders"]:
        for name in ("kit", "kit_again", "megatron_core"):
            if found := row.get(name):
                lines.append(
                    f"| {row['samples']:,} | {name.replace('_', ' ')} | {found['seconds']:.2f} | "
                    f"{found['mib']:,.0f} | {found['epochs_shuffled_together']:,} of "
                    f"{found['epochs']:,} |"
                )
    return "\n".join(lines)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# What follows runs in the children.


def build(who: str, folder: Path, samples: int) -> dict[str, Any]:
    from internlm_lib.devices import select_device

    select_device("cpu").adapt_megatron()
    make = {"kit": _kit, "megatron_core": _megatron}[who]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    facts = make(folder, samples)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {**facts, "seconds": round(seconds, 3), "mib": round(peak / 1024, 1)}


def _kit(folder: Path, samples: int) -> dict[str, Any]:
    from internlm_lib.data.batches import build_datasets
    from internlm_lib.experiment.schema import DataSection, TrainingSection

    training = TrainingSection(seq_length=SEQ_LENGTH, global_batch_size=1, train_iters=samples)
    data = DataSection(split=SPLIT)
    facts = build_datasets(folder / "corpus", data, training, VOCABULARY).train.facts
    return {key: facts[key] for key in ("epochs", "epochs_shuffled_together")}


def _megatron(folder: Path, samples: int) -> dict[str, Any]:
    import numpy
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        vocab_size, eod, unique_identifiers = VOCABULARY, 2, ()

    config = GPTDatasetConfig(
        random_seed=1234, sequence_length=SEQ_LENGTH, blend=([str(folder / "corpus")], None),
        split=SPLIT, path_to_cache=str(folder / f"megatron-{samples}"), tokenizer=Tokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False,
    )  # fmt: skip
    config.split_matrix = [config.split_matrix[0], None, None]
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config)
    index = builder.build()[0].document_index
    epochs = len(index) // int(numpy.max(index) + 1)
    return {"epochs": epochs, "epochs_shuffled_together": epochs}


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(build(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
