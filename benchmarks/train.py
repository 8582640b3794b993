"""How fast a training step is beside a plain PyTorch loop, and what memory and records cost.

    python benchmarks/train.py [--json] [--directory FOLDER] [--pairs 6] [--steps 3]

The kit: one rank of `training.worker` as a stage starts it (MegatronEngine, BatchStream, the loop
with its journal). The plain loop: transformers' LlamaForCausalLM (sdpa), torch's fused AdamW, clip
by norm, batches already in memory. Both train one model, in fp32 on 2 threads, from the same
weights on the same samples with the same rates; that their losses agree is checked.

Each contender has a process of its own, so that its peak memory is its own. The two take turns of
`--steps` steps, in the order A B, B A, A B …, so that a neighbour's load meets both; a turn's rate
is its tokens by its wall time, records included, and the ratio is the median over pairs of turns.
CPU seconds, which a neighbour changes less, are compared too. The first pair warms up and is left
out. Afterwards the kit's training goes on with the MLflow replica beside it.

With --json one JSON object is printed; what is being done goes to stderr. A limit that is missed
is reported, and is no failure.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from internlm_lib import __version__
from internlm_lib.experiment.load import load_experiment, save_experiment
from internlm_lib.experiment.schema import Experiment
from internlm_lib.model.arithmetic import (
    MODEL_FLOPS_CONVENTION,
    model_flops_per_token,
    parameter_count,
)
from internlm_lib.provenance import record
from internlm_lib.run_folder import RunFolder
from internlm_lib.tracking.tail import INTERVAL_SECONDS, Tail

THREADS = 2
RUN = "benchmark"
ROLE = "candidate"
KIT, PLAIN = "kit", "plain"
LOSS_TOLERANCE = 1e-5
"""Relative; sums in another order differ by some 1e-7 at first."""
LIMITS = {"tokens_per_second": 1.0, "peak_memory": 1.1, "record_share": 0.01}
AIM = {"tokens_per_second": 1.2}
REPLICA_STEPS = 9
MATMUL_SIZE = 3072
PARAMS = Path(__file__).resolve().parents[1] / "params" / "tiny.yaml"
SETTINGS: dict[str, Any] = {
    "model.num_layers": 8,
    "model.hidden_size": 512,
    "model.ffn_hidden_size": 1376,
    "model.num_attention_heads": 8,
    "model.vocab_size": 8192,
    "model.direct_start": True,
    "parallel.device": "cpu",
    "parallel.reference": None,
    "parallel.candidate": {"engine": "megatron"},
    "training.precision": "fp32",
    "training.seq_length": 512,
    "training.micro_batch_size": 4,
    "training.global_batch_size": 4,
    "training.lr": 1e-4,
    "training.min_lr": 1e-5,
    "training.auto_recompute_device_memory_mib": None,
    "optimizer.clip_grad": 1.0,
}


@dataclass
class Turn:
    """Some steps of one contender without a pause."""

    seconds: float
    cpu_seconds: float
    losses: list[float]
    record_seconds: list[float]
    """Per step, spent writing the journal."""
    peak_memory_bytes: int
    """Highest resident memory of the process so far."""


@dataclass
class Contender:
    """A training that takes steps when told to."""

    name: str
    process: "subprocess.Popen[str]"
    turns: list[Turn] = field(default_factory=list)

    def take_turn(self, steps: int) -> Turn:
        print(steps, file=self.process.stdin, flush=True)
        turn = Turn(**self.read())
        self.turns.append(turn)
        tell(f"{self.name}: {turn.seconds / steps:.3f} s per step, loss {turn.losses[-1]:.4f}")
        return turn

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended; what it said stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in CHILDREN:
        CHILDREN[sys.argv[1]](Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--directory", type=Path, default=Path("."))
    parser.add_argument("--pairs", type=int, default=6, help="pairs of turns that are compared")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    arguments = parser.parse_args()
    # As after Ctrl-C, the processes are ended and the temporary folder is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix=".train-", dir=arguments.directory) as folder:
        result = measure(Path(folder).resolve(), arguments.pairs, arguments.steps)
    print(json.dumps(result, indent=2) if arguments.json else summary(result))


def measure(root: Path, pairs: int, steps: int) -> dict[str, Any]:
    """Run everything below an empty folder; returns what is printed."""
    load = os.getloadavg()[0]
    experiment = prepare(root, (pairs + 1) * steps + REPLICA_STEPS)
    with child(PLAIN, root) as plain, child(KIT, root) as kit:
        started = {contender.name: contender.read() for contender in (plain, kit)}
        peak = [matmul_flops()]
        for pair in range(pairs + 1):
            order = (kit, plain) if pair % 2 else (plain, kit)
            for contender in order:
                contender.take_turn(steps)
            peak.append(matmul_flops())
        turns = {contender.name: list(contender.turns) for contender in (plain, kit)}
        replica = replica_cost(kit, root)
    tokens = experiment.training.micro_batch_size * experiment.training.seq_length
    rows = {name: contender_row(found[1:], tokens, steps) for name, found in turns.items()}
    for name, row in rows.items():
        row["import_memory_mib"] = round(started[name]["memory_bytes"] / 2**20, 1)
    return {
        "kit_version": __version__,
        **record(),
        "device": "cpu",
        "threads": THREADS,
        "load_average_before": round(load, 2),
        "model": experiment.model.model_dump(mode="json", exclude={"weights"}),
        "parameters": parameter_count(experiment.model),
        "seq_length": experiment.training.seq_length,
        "micro_batch_size": experiment.training.micro_batch_size,
        "precision": experiment.training.precision,
        "pairs": pairs,
        "steps_per_turn": steps,
        **rows,
        **comparison(turns, rows, replica),
        "matmul": matmul_row(experiment, rows, max(peak)),
        "records": replica,
    }


def prepare(root: Path, train_iters: int) -> Experiment:
    """Write the run: experiment, weights, corpus, and the batches for the plain loop."""
    folder = RunFolder.of(RUN, root)
    overrides = {**SETTINGS, "training.train_iters": train_iters}
    _, experiment = load_experiment(PARAMS, overrides)
    save_experiment(folder.experiment, folder.name, experiment)
    tell(f"drawing {parameter_count(experiment.model):,} parameters and a corpus")
    subprocess.run([sys.executable, __file__, "draw", str(root)], check=True, env=environment())
    return experiment


def contender_row(turns: list[Turn], tokens: int, steps: int) -> dict[str, Any]:
    rates = [tokens * steps / turn.seconds for turn in turns]
    return {
        "tokens_per_second": round(median(rates), 1),
        "tokens_per_second_range": [round(min(rates), 1), round(max(rates), 1)],
        "step_seconds": round(median(turn.seconds for turn in turns) / steps, 4),
        "step_cpu_seconds": round(median(turn.cpu_seconds for turn in turns) / steps, 4),
        "peak_memory_mib": round(turns[-1].peak_memory_bytes / 2**20, 1),
    }


def comparison(
    turns: dict[str, list[Turn]], rows: dict[str, dict[str, Any]], replica: dict[str, Any]
) -> dict[str, Any]:
    """The kit's figures by the plain loop's, pair by pair, and which limits they keep."""
    pairs = list(zip(turns[PLAIN][1:], turns[KIT][1:], strict=True))
    speed = [plain.seconds / kit.seconds for plain, kit in pairs]
    cpu = [plain.cpu_seconds / kit.cpu_seconds for plain, kit in pairs]
    losses = [
        abs(ours / theirs - 1)
        for plain, kit in zip(turns[PLAIN], turns[KIT], strict=True)
        for theirs, ours in zip(plain.losses, kit.losses, strict=True)
    ]
    found = {
        "tokens_per_second": median(speed),
        "peak_memory": rows[KIT]["peak_memory_mib"] / rows[PLAIN]["peak_memory_mib"],
        "record_share": replica["share_of_step"],
    }
    return {
        "ratio_of_tokens_per_second": round(found["tokens_per_second"], 3),
        "ratio_of_tokens_per_second_per_pair": [round(value, 3) for value in speed],
        "ratio_of_cpu_seconds": round(median(cpu), 3),
        "ratio_of_cpu_seconds_per_pair": [round(value, 3) for value in cpu],
        "ratio_of_peak_memory": round(found["peak_memory"], 3),
        "max_relative_loss_difference": max(losses),
        "losses_agree": max(losses) <= LOSS_TOLERANCE,
        "limits": LIMITS,
        "aim": AIM,
        "within": {
            "tokens_per_second": found["tokens_per_second"] >= LIMITS["tokens_per_second"],
            "peak_memory": found["peak_memory"] <= LIMITS["peak_memory"],
            "record_share": found["record_share"] <= LIMITS["record_share"],
        },
    }


def matmul_row(experiment: Experiment, rows: dict[str, Any], peak: float) -> dict[str, Any]:
    flops = model_flops_per_token(experiment.model, experiment.training.seq_length)
    return {
        "peak_gflops": round(peak / 1e9, 1),
        "peak_is": f"best fp32 product of two {MATMUL_SIZE} x {MATMUL_SIZE} matrices on "
        f"{THREADS} threads, measured between the turns",
        "flops_per_token": flops,
        "convention": MODEL_FLOPS_CONVENTION,
        "formula": "3 (2 (L (4 h^2 + 3 h f) + V h) + 2 L h s): forward and twice that backward; "
        "L layers, h hidden size, f ffn size, V vocabulary, s sequence",
        "fraction_of_peak": {
            name: round(rows[name]["tokens_per_second"] * flops / peak, 3) for name in (KIT, PLAIN)
        },
    }


def replica_cost(kit: Contender, root: Path) -> dict[str, Any]:
    """What journal and MLflow replica take, as a share of a step.

    The journal: wall seconds inside `Journal.write`. The replica is a process of its own: the CPU
    seconds it takes while the steps are taken, as if each held the training up for as long. Its
    start (imports, a new store) is waited for; it comes once per stage, and is told apart.
    """
    tail = Tail.start(RunFolder.of(RUN, root))
    assert tail.process is not None
    try:
        mirror = psutil.Process(tail.process.pid)
        begin = settled_cpu_seconds(mirror)
        turn = kit.take_turn(REPLICA_STEPS)
        taken = cpu_seconds(mirror) - begin
    finally:
        tail.stop()
    journal, step = median(turn.record_seconds), turn.seconds / REPLICA_STEPS
    share = journal / step + taken / REPLICA_STEPS / step
    return {
        "journal_milliseconds_per_step": round(1000 * journal, 3),
        "replica_cpu_milliseconds_per_step": round(1000 * taken / REPLICA_STEPS, 3),
        "replica_cpu_seconds_to_start": round(begin, 2),
        "step_seconds": round(step, 4),
        "share_of_step": round(share, 5),
    }


def settled_cpu_seconds(process: psutil.Process) -> float:
    """CPU seconds of the replica once it has caught up: it hardly works for two intervals."""
    before = cpu_seconds(process)
    for _ in range(8):
        time.sleep(2 * INTERVAL_SECONDS)
        now = cpu_seconds(process)
        if before > 1 and now - before < 0.2:
            return now
        before = now
    sys.exit("the MLflow replica did not settle within 150 s")


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def matmul_flops() -> float:
    """FLOPs per second of one large matrix product, in a process that is gone afterwards."""
    command = [sys.executable, __file__, "matmul", "."]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment())
    return float(done.stdout)


@contextmanager
def child(name: str, root: Path) -> Iterator[Contender]:
    """A contender that is loaded and waits for its first turn; it is gone after the block."""
    command = [sys.executable, __file__, name, str(root)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, env=environment()
    ) as process:
        try:
            yield Contender(name, process)
        finally:
            process.kill()


def environment() -> dict[str, str]:
    """For one process: a job of a single rank, as torchrun would start it."""
    here = str(Path(__file__).resolve().parents[1])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")])),
        "OMP_NUM_THREADS": str(THREADS),
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip


def draw(root: Path) -> None:
    """Child: random weights, a corpus whose ids differ in frequency, and all steps' batches."""
    import numpy

    from internlm_lib.data.indexed import indexed_writer
    from internlm_lib.devices import select_device
    from internlm_lib.weights.initial import write_random

    folder, experiment = load(root)
    training, vocabulary = experiment.training, experiment.model.vocab_size
    write_random(folder.huggingface, experiment.model, training.seed, training.precision)
    random = numpy.random.default_rng(training.seed)
    documents = training.train_iters * training.global_batch_size + 1
    with indexed_writer(folder.corpus_prefix, vocabulary) as writer:
        for _ in range(documents):
            skewed = 3 + (vocabulary - 3) * random.random(training.seq_length) ** 3
            writer.add_document(skewed.astype(int).tolist())
    select_device("cpu").adapt_megatron()
    import torch

    from internlm_lib.data.batches import BatchStream, build_datasets

    dataset = build_datasets(folder.corpus_prefix, experiment.data, training, vocabulary).train
    stream = BatchStream(
        dataset, global_batch_size=training.global_batch_size, data_parallel_size=1,
        micro_batch_size=training.micro_batch_size, data_parallel_rank=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    steps = [next(stream.step(index)) for index in range(training.train_iters)]
    for name in ("tokens", "labels"):
        numpy.save(root / f"{name}.npy", numpy.stack([getattr(step, name) for step in steps]))


def train_plain(root: Path) -> None:
    """Child: the loop that a tutorial would show, taking steps when told to."""
    import numpy
    import torch
    from transformers import LlamaForCausalLM

    from internlm_lib.training.schedule import learning_rate

    folder, experiment = load(root)
    training, settings = experiment.training, experiment.optimizer
    torch.set_num_threads(THREADS)
    model = LlamaForCausalLM.from_pretrained(
        folder.huggingface, attn_implementation="sdpa", dtype=torch.float32
    )
    model.train()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_eps, fused=True,
    )  # fmt: skip
    tokens = torch.from_numpy(numpy.load(root / "tokens.npy"))
    labels = torch.from_numpy(numpy.load(root / "labels.npy"))
    turns = Turns()
    for step in range(training.train_iters):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step + 1)
        # shift_labels: these labels are the next tokens already, transformers must not shift them.
        loss = model(
            tokens[step], labels=labels[step], shift_labels=labels[step], use_cache=False
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        turns.took_step(loss.item(), 0.0)


def train_kit(root: Path) -> None:
    """Child: the rank's own work, held up after the steps of a turn where it writes its journal."""
    from internlm_lib.journal import Journal
    from internlm_lib.training.worker import train_role

    write, turns = Journal.write, []

    def write_and_wait(journal: Journal, event: str, **fields: Any) -> None:
        begin = time.perf_counter()
        write(journal, event, **fields)
        if event == "start":
            turns.append(Turns())
        elif event == "step":
            turns[0].took_step(fields["loss"], time.perf_counter() - begin)

    Journal.write = write_and_wait  # type: ignore[method-assign,assignment]
    train_role(RunFolder.of(RUN, root), ROLE)


class Turns:
    """The child's side of `Contender`: waits for a turn, and tells what came of it."""

    def __init__(self) -> None:
        self._say({"memory_bytes": peak_memory_bytes()})
        self._begin()

    def took_step(self, loss: float, record_seconds: float) -> None:
        """Called after every step; returns when the next may be taken."""
        self._losses.append(loss)
        self._records.append(record_seconds)
        if len(self._losses) < self._steps:
            return
        turn = Turn(
            time.perf_counter() - self._wall, time.process_time() - self._cpu,
            self._losses, self._records, peak_memory_bytes(),
        )  # fmt: skip
        self._say(vars(turn))
        self._begin()

    def _begin(self) -> None:
        self._steps = int(sys.stdin.readline() or os._exit(0))
        self._losses: list[float] = []
        self._records: list[float] = []
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def _say(self, value: dict[str, Any]) -> None:
        print(json.dumps(value), file=ANSWERS, flush=True)


def multiply(root: Path) -> None:
    """Child: FLOPs per second of the best of some products of two large matrices."""
    import torch

    torch.set_num_threads(THREADS)
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - begin)
    print(2 * MATMUL_SIZE**3 / min(seconds), file=ANSWERS)


CHILDREN: dict[str, Callable[[Path], None]] = {
    "draw": draw,
    PLAIN: train_plain,
    KIT: train_kit,
    "matmul": multiply,
}


def load(root: Path) -> tuple[RunFolder, Experiment]:
    folder = RunFolder.of(RUN, root)
    return folder, load_experiment(folder.experiment)[1]


def peak_memory_bytes() -> int:
    """Highest resident memory of this process. Not ru_maxrss: a child inherits its parent's."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def summary(result: dict[str, Any]) -> str:
    """The figures that have limits, in words."""
    pairs = result["ratio_of_tokens_per_second_per_pair"]
    fraction = result["matmul"]["fraction_of_peak"]
    return "\n".join(
        [
            f"tokens/s        {result[KIT]['tokens_per_second']:,.0f} against "
            f"{result[PLAIN]['tokens_per_second']:,.0f}: {result['ratio_of_tokens_per_second']} x "
            f"({min(pairs)} to {max(pairs)}; CPU seconds {result['ratio_of_cpu_seconds']} x)",
            f"peak memory     {result[KIT]['peak_memory_mib']:,.0f} MiB against "
            f"{result[PLAIN]['peak_memory_mib']:,.0f}: {result['ratio_of_peak_memory']} x",
            f"records         {100 * result['records']['share_of_step']:.2f} % of a step",
            f"of matmul peak  {100 * fraction[KIT]:.0f} % against {100 * fraction[PLAIN]:.0f} % of "
            f"{result['matmul']['peak_gflops']} GFLOP/s",
            f"losses          differ by {result['max_relative_loss_difference']:.1e} at most",
            f"within limits   {result['within']}",
        ]
    )


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


ANSWERS = sys.stdout
"""Where a child answers: whatever else it prints goes to stderr."""

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in CHILDREN:
        sys.stdout = sys.stderr
    main()
