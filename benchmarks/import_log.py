"""How fast a training log is imported, and how much memory that takes.

    python benchmarks/import_log.py [--megabytes 1024] [--directory FOLDER] > import_log.json

Writes a log in AscendSpeed's shape into a temporary folder below FOLDER (by default the current
one): per ten iterations ten metric lines, five timing lines, one line of 20 states of a progress
bar, and now and then a validation, a checkpoint and a line nobody knows. Imports it, and one of an
eighth of its size, each in a process of its own. Prints one JSON object; what is being done goes to
stderr. A limit that is missed is reported, and is no failure.

Beside it, in the same run and also in a process of its own, a peer reads the same file: a Python
loop with one regular expression that takes step and loss of a metric line, and writes nothing. The
ratio says what the rest costs: all fields, restarts and repetitions, the journal.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from internlm_lib import __version__
from internlm_lib.provenance import record

LIMITS = {"seconds": 60.0, "peak_growth_mib": 64.0}
"""For the default size. The growth is that of the peak memory between the two sizes."""
SMALL_SHARE = 8
DISK_FACTOR = 3
"""Space needed on the disk, in sizes of the log: the log and its journal."""
_PEER = re.compile(r"iteration +(\d+)/.*lm loss: (\S+)")


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in CHILDREN:
        print(json.dumps(CHILDREN[sys.argv[1]](Path(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--directory", type=Path, default=Path("."))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix=".import-log-", dir=arguments.directory) as folder:
        print(json.dumps(measure(Path(folder), arguments.megabytes), indent=2))


def measure(folder: Path, megabytes: int) -> dict[str, Any]:
    """Run everything below an empty folder; returns what is printed."""
    load = os.getloadavg()[0]
    if shutil.disk_usage(folder).free < DISK_FACTOR * megabytes << 20:
        sys.exit(f"{DISK_FACTOR * megabytes} MiB must be free on the disk; see --directory")
    big, small = folder / "big.log", folder / "small.log"
    tell(f"writing {megabytes} MiB")
    write_log(big, megabytes << 20)
    write_log(small, (megabytes << 20) // SMALL_SHARE)
    tell("importing the small log")
    few = in_child("import", small)
    tell("the peer reads the big log")
    peer = in_child("peer", big)
    tell("importing the big log")
    much = in_child("import", big)
    growth = much["peak_mib"] - few["peak_mib"]
    measured = {"seconds": much["seconds"], "peak_growth_mib": growth}
    return {
        "kit": __version__,
        **record(),
        "load_average_before": round(load, 2),
        "load_average_after": round(os.getloadavg()[0], 2),
        "megabytes": megabytes,
        "big": much,
        "small": few,
        "peer": peer,
        "ratio_to_peer": round(much["seconds"] / peer["seconds"], 2),
        "cpu_ratio_to_peer": round(much["cpu_seconds"] / peer["cpu_seconds"], 2),
        "peak_growth_mib": round(growth, 1),
        "limits": LIMITS,
        "within": {key: measured[key] <= limit for key, limit in LIMITS.items()},
    }


def write_log(path: Path, nbytes: int) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(arguments_dump())
        for block in blocks():
            stream.write(block)
            if stream.tell() >= nbytes:
                return


def arguments_dump() -> str:
    values = {
        "bf16": True, "global_batch_size": 256, "hidden_size": 4096, "num_layers": 32,
        "pipeline_model_parallel_size": 1, "seq_length": 2048, "train_iters": 50_000_000,
        "tensor_model_parallel_size": 8, "world_size": 8,
    }  # fmt: skip
    lines = (f"  {name} {'.' * (48 - len(name))} {value}" for name, value in values.items())
    title = "AscendSpeed Arguments"
    framed = [f"{'-' * 24} {title} {'-' * 24}", *lines, f"{'-' * 20} end of {title} {'-' * 20}"]
    return "\n".join(framed) + "\n"


def blocks() -> Iterator[str]:
    """Ten iterations at a time, with what stands around them."""
    timing = "time (ms) | forward-compute: 7012.44 | backward-compute: 11234.01 | optimizer: 98.7\n"
    bar = "".join(f"\r {n * 5:3d}%|{'#' * (n // 2):10s}| {n}/20 [00:01<00:01]" for n in range(20))
    for block in range(1 << 40):
        for step in range(10 * block + 1, 10 * block + 11):
            yield metric_line(step) + (timing if step % 2 else "")
        yield bar + "\n"
        if block % 10 == 9:
            step, loss = 10 * block + 10, 1.5 + 9 / (block + 1)
            yield (
                f"{'-' * 80}\n validation loss at iteration {step} | lm loss value: {loss:.6E} | "
                f"lm loss PPL: 4.481689E+00 | \n{'-' * 80}\n"
                f"saving checkpoint at iteration {step:7d} to ckpt\n"
                f"  successfully saved checkpoint at iteration {step:7d} to ckpt\n"
                f"node{block % 7}: a line that nobody knows\n"
            )


def metric_line(step: int) -> str:
    noise = (step * 2654435761 % 1000) / 1000
    return (
        f" iteration {step:8d}/50000000 | consumed samples: {step * 256:12d} | "
        f"consumed tokens: {step * 524288:12d} | "
        f"elapsed time per iteration (ms): {19600 + 100 * noise:.1f} | "
        f"learning rate: {1e-5 * (1 - step / 5e7):.3E} | global batch size:   256 | "
        f"lm loss: {1.5 + noise / 10 + 9 / step:.6E} | loss scale: 1.0 | grad norm: {noise:.3f} | "
        "actual seqlen:  2048 | number of skipped iterations:   0 | "
        f"number of nan iterations:   0 | samples per second: {13 + noise:.3f} | TFLOPs: 145.75 |\n"
    )


def in_child(work: str, path: Path) -> dict[str, Any]:
    """What one of `CHILDREN` returns, in a fresh process."""
    os.sync()
    command = [sys.executable, __file__, work, str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def import_once(path: Path) -> dict[str, Any]:
    """Child: one import into a project of its own."""
    from internlm_lib.logs.import_log import import_log

    started, computed = time.monotonic(), time.process_time()
    result = import_log(path, root=path.parent / f"project-{path.stem}")
    seconds = time.monotonic() - started
    steps = result["steps_logged"]
    return measured(path, seconds, computed, result["lines"]) | {
        "steps": steps,
        "unknown": result["unknown"],
        "every_step_found": steps == result["last_step"],
    }


def peer_once(path: Path) -> dict[str, Any]:
    """Child: the loop it is measured against."""
    started, computed = time.monotonic(), time.process_time()
    total, lines, steps = 0.0, 0, 0
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            lines += 1
            if found := _PEER.search(line):
                steps, total = int(found[1]), total + float(found[2])
    return measured(path, time.monotonic() - started, computed, lines) | {
        "steps": steps,
        "mean_loss": round(total / steps, 6),
    }


CHILDREN: dict[str, Callable[[Path], dict[str, Any]]] = {"import": import_once, "peer": peer_once}


def measured(path: Path, seconds: float, computed: float, lines: int) -> dict[str, Any]:
    """Figures of a child; `computed` is its CPU time at the beginning."""
    mebibytes = path.stat().st_size / 2**20
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(time.process_time() - computed, 3),
        "mib_per_second": round(mebibytes / seconds, 1),
        "lines": lines,
        "lines_per_second": round(lines / seconds),
        "peak_mib": peak_mebibytes(),
    }


def peak_mebibytes() -> float:
    """The most memory this process ever had, as the kernel counts it (`VmHWM`)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
