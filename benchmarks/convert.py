"""How fast conversions are beside a plain copy of the same bytes, and how much memory they take.

    python benchmarks/convert.py [--directory FOLDER] [--repeats 3] > convert.json

Draws an InternLM of 1.13 billion parameters in fp16 (2.3 GB) into a temporary folder below FOLDER
(by default the current one), needs up to 7 GB there, and removes all of it. Prints one JSON object;
what is being done goes to stderr. A limit that is missed is reported, and is no failure.

Before every conversion the source is copied once, so that both meet the same disk, the same page
cache and the same neighbours. Times are medians, memory is the most of any repeat. Each conversion
has a fresh process, whose memory is read before it begins (what the imports took) and at its end.
A conversion computes, a copy hardly does: beside busy neighbours the ratio is larger than on a
machine of its own. The load before the start and each conversion's CPU seconds tell.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from internlm_lib import __version__
from internlm_lib.experiment.presets import PRESETS
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.files import sync
from internlm_lib.model.arithmetic import parameter_count
from internlm_lib.provenance import record

SEED = 1234
DTYPE = "float16"
COPY_BYTES = 8 << 20
"""Read and written at a time by the copy it is measured against."""
DISK_FACTOR = 3
"""Most copies of the weights that lie on the disk at the same time."""
LIMITS = {"ratio_to_copy": 1.5, "rss_above_import_mib": 600}

HUGGINGFACE: dict[str, Any] = {"to": "huggingface"}
MEGATRON: dict[str, Any] = {"to": "megatron"}
CLASSIC: dict[str, Any] = {"to": "classic", "tensor_parallel": 4, "pipeline_parallel": 2}


@dataclass
class Case:
    """A conversion and what was measured of it, once per repeat."""

    name: str
    source: str
    target: str
    order: dict[str, Any]
    """Keyword arguments of `weights.convert.Order`."""
    last: bool
    """Whether nothing reads `target` after it, or `source` unless that is the drawn model."""
    results: list[dict[str, Any]] = field(default_factory=list)


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in CHILDREN:
        print(json.dumps(CHILDREN[sys.argv[1]](json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, default=Path("."))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    # As after Ctrl-C, the temporary folder is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=arguments.directory) as folder:
        print(json.dumps(measure(Path(folder), arguments.repeats), indent=2))


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Run everything below an empty folder; returns what is printed."""
    load = os.getloadavg()[0]
    model = benchmark_model()
    nbytes = 2 * parameter_count(model)
    if shutil.disk_usage(folder).free < DISK_FACTOR * nbytes:
        sys.exit(f"{DISK_FACTOR * nbytes:,} bytes must be free on the disk; see --directory")
    tell(f"drawing {parameter_count(model):,} parameters")
    in_child("draw", {"folder": str(folder), "model": model.model_dump(mode="json")})
    source = folder / "source"
    copies: list[float] = []
    cases = [
        Case("huggingface to megatron", "source", "megatron", MEGATRON, last=False),
        Case("megatron to huggingface", "megatron", "again", HUGGINGFACE, last=True),
        Case("huggingface to classic TP4 PP2", "source", "classic", CLASSIC, last=False),
        Case("classic TP4 PP2 to huggingface", "classic", "again", HUGGINGFACE, last=True),
    ]
    for repeat in range(repeats):
        for case in cases:
            copies.append(copy(source, folder / "copy"))
            tell(f"{repeat + 1} of {repeats}: copy {copies[-1]:.1f} s")
            shutil.rmtree(folder / "copy")
            paths = {"source": str(folder / case.source), "target": str(folder / case.target)}
            case.results.append(in_child("convert", {**paths, "order": case.order}))
            tell(f"{repeat + 1} of {repeats}: {case.name} {case.results[-1]['seconds']:.1f} s")
            if case.last:
                shutil.rmtree(folder / case.source)
                shutil.rmtree(folder / case.target)
    conversions = [summary(case, median(copies)) for case in cases]
    hashes = {result["tensor_hash"] for case in cases for result in case.results}
    file_bytes = sum(path.stat().st_size for path in files_of(source))
    return {
        "kit": __version__,
        **record(),
        "device": "cpu",
        "filesystem": filesystem(folder),
        "page_cache": "warm",
        "load_average_before": round(load, 2),
        "model": model.model_dump(mode="json", exclude={"weights"}),
        "dtype": DTYPE,
        "parameters": parameter_count(model),
        "bytes": nbytes,
        "repeats": repeats,
        "copy": {
            "seconds": round(median(copies), 3),
            "mib_per_second": round(file_bytes / median(copies) / 2**20, 1),
            "bytes": file_bytes,
            "all_seconds": [round(seconds, 3) for seconds in copies],
        },
        "conversions": conversions,
        "same_tensor_hash_everywhere": len(hashes) == 1,
        "limits": LIMITS,
        "within": all(all(conversion["within"].values()) for conversion in conversions),
    }


def benchmark_model() -> ModelSection:
    """InternLM-7B's vocabulary and biases at half its width and fewer layers."""
    shape = {
        "num_layers": 14,
        "hidden_size": 2048,
        "ffn_hidden_size": 5504,
        "num_attention_heads": 16,
    }
    return ModelSection(**{**PRESETS["internlm-7b"], **shape}, preset="internlm-7b")


def copy(source: Path, target: Path) -> float:
    """Read, write and sync every file of a folder; returns seconds.

    Not shutil.copyfile: it lets the kernel copy, which on some file systems copies nothing.
    """
    os.sync()  # so that nobody pays for what was written before
    started = time.monotonic()
    for path in files_of(source):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb", buffering=0) as from_, copied.open("wb", buffering=0) as to:
            shutil.copyfileobj(from_, to, COPY_BYTES)
            os.fsync(to.fileno())
    sync(target, recursive=False)
    return time.monotonic() - started


def in_child(work: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What one of `CHILDREN` returns, in a fresh process."""
    os.sync()
    command = [sys.executable, __file__, work, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def draw(arguments: dict[str, Any]) -> dict[str, Any]:
    """Child: random weights in `source`, in `DTYPE`, with a manifest as every conversion's."""
    from internlm_lib.weights.convert import Order, convert, plan_conversion
    from internlm_lib.weights.initial import write_random

    folder, model = Path(arguments["folder"]), ModelSection(**arguments["model"])
    drawn = write_random(folder / "drawn", model, SEED, "bf16")
    convert(plan_conversion(drawn, folder / "source", Order("huggingface", dtype=DTYPE)))
    shutil.rmtree(drawn)
    return {}


def convert_once(arguments: dict[str, Any]) -> dict[str, Any]:
    """Child: one conversion; returns its record, with the memory taken before it began."""
    from internlm_lib.weights.convert import Order, convert, plan_conversion

    imported = psutil.Process().memory_info().rss / 2**20
    started, computed = time.monotonic(), time.process_time()
    order = Order(**arguments["order"])
    plan = plan_conversion(Path(arguments["source"]), Path(arguments["target"]), order)
    result = convert(plan)
    return {
        **result,
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - computed,
        "import_rss_mib": imported,
    }


CHILDREN: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "draw": draw,
    "convert": convert_once,
}


def summary(case: Case, copy_seconds: float) -> dict[str, Any]:
    seconds = [result["seconds"] for result in case.results]
    peaks = [result["peak_rss_mib"] for result in case.results]
    imported = [result["import_rss_mib"] for result in case.results]
    above = [peak - before for peak, before in zip(peaks, imported, strict=True)]
    measured = {"ratio_to_copy": median(seconds) / copy_seconds, "rss_above_import_mib": max(above)}
    return {
        "conversion": case.name,
        "seconds": round(median(seconds), 3),
        "cpu_seconds": round(median(result["cpu_seconds"] for result in case.results), 3),
        "ratio_to_copy": round(measured["ratio_to_copy"], 3),
        "peak_rss_mib": max(peaks),
        "import_rss_mib": round(max(imported), 1),
        "rss_above_import_mib": round(max(above), 1),
        "all_seconds": [round(value, 3) for value in seconds],
        "all_peak_rss_mib": peaks,
        "all_import_rss_mib": [round(value, 1) for value in imported],
        "within": {key: measured[key] <= limit for key, limit in LIMITS.items()},
    }


def filesystem(folder: Path) -> str:
    """Type of the file system a folder lies on."""
    above = {str(parent) for parent in (folder.resolve(), *folder.resolve().parents)}
    mounts = [mount for mount in psutil.disk_partitions(all=True) if mount.mountpoint in above]
    return max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else "unknown"


def files_of(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
