"""Where a run keeps its files: `runs/<run>/` for work, `reports/<run>/` for what people read."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from internlm_lib.errors import InputError

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def is_run_name(name: str) -> bool:
    """Whether a run may have this name: it is a folder's."""
    return _RUN_NAME.fullmatch(name) is not None


def project_root() -> Path:
    """The folder that holds `params/`, `runs/` and `reports/`.

    `INTERNLM_HOME` if set; else the nearest folder at or above the current one that has both
    `notebooks/` and `params/`; else the checkout this package lies in; else the current folder.
    """
    if home := os.environ.get("INTERNLM_HOME"):
        return Path(home).resolve()
    here = Path.cwd().resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if (folder / "notebooks").is_dir() and (folder / "params").is_dir():
            return folder
    return here


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Nothing is created until something is written."""

    name: str
    root: Path

    @classmethod
    def of(cls, name: str, root: Path | None = None) -> "RunFolder":
        """Raises InputError if `name` cannot be a folder name."""
        if not isinstance(name, str) or not is_run_name(name):
            raise InputError(
                f"run_name = {name!r}: letters, digits, '.', '_' and '-' are allowed, "
                "at most 100, starting with a letter or digit; a bare number needs quotes"
            )
        return cls(name, root or project_root())

    @classmethod
    def at(cls, path: Path) -> "RunFolder":
        """The run whose `path` this is."""
        path = path.resolve()
        return cls.of(path.name, path.parents[1])

    @property
    def path(self) -> Path:
        return self.root / "runs" / self.name

    @property
    def report(self) -> Path:
        return self.root / "reports" / self.name

    @property
    def parity(self) -> Path:
        """What `benchmarks/parity.py` measured last, of layouts and of no run."""
        return self.root / "reports" / "parity.json"

    @property
    def experiment(self) -> Path:
        return self.path / "experiment.yaml"

    @property
    def journal(self) -> Path:
        """The run's own journal: stages, comparisons, evaluations."""
        return self.path / "journal.jsonl"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def pocket_records(self) -> Path:
        """The records of the pocket world, where the experiment brings none of its own."""
        return self.data / "records.parquet"

    @property
    def tokenizer(self) -> Path:
        return self.data / "tokenizer" / "tokenizer.model"

    @property
    def corpus_prefix(self) -> Path:
        """Prefix of the token files: `<prefix>.bin` and `<prefix>.idx`."""
        return self.data / "train_text_document"

    @property
    def questions(self) -> Path:
        """Multiple-choice questions in the original MMLU layout: `dev/`, `test/`."""
        return self.data / "questions"

    @property
    def huggingface(self) -> Path:
        return self.path / "weights" / "huggingface"

    @property
    def megatron(self) -> Path:
        return self.path / "weights" / "megatron"

    @property
    def conversion_record(self) -> Path:
        """JSON: what 02_convert checked, and the hash of the weights it read."""
        return self.path / "weights" / "conversion.json"

    def training(self, role: str) -> "TrainingFolder":
        """`role` is "reference" or "candidate"."""
        return TrainingFolder(self.path / "training" / role)

    @property
    def figures(self) -> Path:
        return self.report / "figures"

    @property
    def tables(self) -> Path:
        return self.report / "tables"


@dataclass(frozen=True)
class TrainingFolder:
    """Files of one training of a run."""

    path: Path

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    def devices(self, node_rank: int = 0) -> Path:
        """Journal of one node's device samples (`tracking.device_sampler`)."""
        return self.path / (f"devices-node{node_rank}.jsonl" if node_rank else "devices.jsonl")

    def device_journals(self) -> list[Path]:
        """Those of all nodes that wrote one."""
        return sorted(self.path.glob("devices*.jsonl"))

    @property
    def logs(self) -> Path:
        """`launcher.log`, `rank0.log` …; `rank1.error` holds the traceback of a failed rank."""
        return self.path / "logs"

    @property
    def recompute(self) -> Path:
        """JSON: what is recomputed, and the measurements that decided it
        (`training.auto_recompute_device_memory_mib`)."""
        return self.path / "recompute.json"

    @property
    def profile(self) -> Path:
        """With `--profile`, of every rank `rank<N>.trace.json` and `rank<N>.operators.json`."""
        return self.path / "profile"

    @property
    def checkpoint(self) -> Path:
        """The weights after the last step, as a Megatron distributed checkpoint."""
        return self.path / "checkpoint"

    @property
    def checkpoints(self) -> Path:
        """Folder of the states on the way, to resume from (`training.save_interval`)."""
        return self.path / "checkpoints"


def state_name(step: int) -> str:
    """Folder of the state after a step, below `TrainingFolder.checkpoints`."""
    return f"step-{step:07}"


def saved_states(folder: Path) -> list[Path]:
    """The states below `TrainingFolder.checkpoints`, newest first."""
    return sorted(
        (path for path in folder.glob("step-*") if (path / "manifest.json").is_file()), reverse=True
    )
