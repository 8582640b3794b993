"""What a stage reads, as hashes: a stage is skipped while none of them has changed.

Hashed are the keys of the experiment that the stage reads, the files they name, the kit's own
source, the notebook, and the status files of the stages whose output it reads. A status file
carries the time it was written, so a stage done again makes the stages after it run again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm_lib import provenance
from internlm_lib.data.corpora import sources_of
from internlm_lib.data.files import source_files
from internlm_lib.errors import InputError
from internlm_lib.experiment.schema import DataSection, Experiment
from internlm_lib.files import read_json, sha256_of, sha256_of_json, write_json
from internlm_lib.reporting.sources import source_path
from internlm_lib.run_folder import RunFolder
from internlm_lib.stages.stage import inputs_path, status_path


@dataclass(frozen=True)
class Reads:
    keys: tuple[str, ...]
    """Sections or dotted keys. What an earlier stage of `stages` reads need not be repeated."""
    stages: tuple[str, ...] = ()
    """Earlier stages whose output is read."""
    parity: bool = False
    """Whether the measured parity of layouts is read."""


READS: dict[str, Reads] = {
    "01_prepare": Reads(("model", "data", "training.seq_length", "evaluation.questions_path")),
    "02_convert": Reads(
        ("model", "parallel.device", "parallel.candidate", "training.seed", "training.precision"),
    ),
    # Not parallel.reference_run: naming another run to compare with must not train this one again.
    "03_train": Reads(
        ("parallel.device", "parallel.candidate", "parallel.reference", "training", "optimizer"),
        ("01_prepare", "02_convert"),
    ),
    "04_compare": Reads(
        ("parallel.reference_run", "parallel.candidate_run", "evaluation.loss_tolerance"),
        ("03_train",),
        parity=True,
    ),
    "05_infer": Reads(("generation",), ("03_train",)),
    "06_evaluate": Reads(
        (
            "evaluation.questions_path",
            "evaluation.num_fewshot",
            "evaluation.protocols",
            "evaluation.limit",
            "evaluation.batch_size",
        ),
        ("03_train",),
    ),
}

_PATH_KEYS = ("model.weights", "data.tokenizer_model", "evaluation.questions_path")
_HASHED_WHOLE_BYTES = 64 << 20
_MISSING = "missing"


def inputs_of(stage: str, folder: RunFolder, experiment: Experiment) -> dict[str, str]:
    """Name of what is read → SHA-256 (or "missing"), as things are now."""
    reads = READS[stage]
    values = experiment.model_dump(mode="json")
    chosen = {key: _at(values, key) for key in reads.keys}
    files = [_fingerprint(path) for path in _files(reads, values, folder)]
    return {
        "params": sha256_of_json(chosen),
        "files": sha256_of_json(files),
        "notebook": _sha256_if_there(folder.root / "notebooks" / f"{stage}.ipynb"),
        "source": _source_sha256(),
        **{name: _sha256_if_there(status_path(folder, name)) for name in reads.stages},
    }


def what_changed(stage: str, folder: RunFolder, inputs: dict[str, str]) -> list[str]:
    """Names of the inputs that differ from those the stage was last done with; [] if none.

    A stage that has not been done, or was done outside the pipeline, gives ["not done yet"].
    """
    status, recorded = status_path(folder, stage), inputs_path(folder, stage)
    if not (status.exists() and recorded.exists()) or read_json(status)["status"] != "done":
        return ["not done yet"]
    before = read_json(recorded)["inputs"]
    return [name for name, value in inputs.items() if before.get(name) != value]


def record_inputs(stage: str, folder: RunFolder, inputs: dict[str, str]) -> None:
    """Write down what a stage that is now done has read."""
    record = {"inputs_sha256": sha256_of_json(inputs), "inputs": inputs}
    write_json(inputs_path(folder, stage), record)


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _files(reads: Reads, values: dict[str, Any], folder: RunFolder) -> Iterator[Path]:
    """Files outside the run that a stage reads."""
    for key in _PATH_KEYS:
        named = _at(values, key)
        if named and any(f"{key}.".startswith(f"{read}.") for read in reads.keys):
            yield folder.root / named
    if "data" in reads.keys:
        yield from _records(values["data"], folder)
    for key in ("parallel.reference_run", "parallel.candidate_run"):
        if key in reads.keys and (source := _at(values, key)):
            yield source_path(source, folder.root)
    if reads.parity:
        yield folder.parity


def _records(data: dict[str, Any], folder: RunFolder) -> Iterator[Path]:
    """Files of records; what is not there, as it is named."""
    section = DataSection.model_validate(data)
    for source in sources_of(section, folder) if section.train_path or section.blend else ():
        try:
            yield from source_files([source.path])
        except InputError:  # the stage's to report
            yield source.path


def _fingerprint(path: Path) -> list[list[Any]]:
    """Name and content of every file at `path`; of a large file, size and time of change."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [[str(file.relative_to(path)), _content(file)] for file in files]


def _content(file: Path) -> Any:
    if file.exists() and file.stat().st_size > _HASHED_WHOLE_BYTES:
        return [file.stat().st_size, file.stat().st_mtime_ns]
    return _sha256_if_there(file)


def _source_sha256() -> str:
    """The kit's own files and the versions of the packages that compute."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    hashes = {str(p.relative_to(package)): sha256_of(p) for p in files}
    return sha256_of_json([hashes, provenance.package_versions()])


def _sha256_if_there(path: Path) -> str:
    return sha256_of(path) if path.exists() else _MISSING
