"""What a run trains on: records of one source or several, and the token files made of them.

01_prepare writes `runs/<run>/data/corpora.json`; whatever trains reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from internlm_lib.data.indexed import Kind, corpus_files
from internlm_lib.experiment.schema import DataSection
from internlm_lib.files import read_json, write_json
from internlm_lib.run_folder import RunFolder


@dataclass(frozen=True)
class Source:
    """Records, and how much of the training they make up."""

    path: Path
    """File, folder or glob: see `data.files`."""
    weight: float = 1.0
    """Relative to the other sources'."""


def sources_of(data: DataSection, folder: RunFolder) -> list[Source]:
    """The sources of an experiment's records; without any, the pocket world's file."""
    if data.blend:
        return [Source(folder.root / part.path, part.weight) for part in data.blend]
    if data.train_path:
        return [Source(folder.root / data.train_path)]
    return [Source(folder.pocket_records)]


@dataclass(frozen=True)
class Corpora:
    """Token files to train on."""

    kind: Kind
    prefixes: tuple[Path, ...]
    weights: tuple[float, ...]

    @property
    def blend(self) -> Path | list[tuple[float, Path]]:
        """As `batches.build_datasets` takes it."""
        if len(self.prefixes) == 1:
            return self.prefixes[0]
        return list(zip(self.weights, self.prefixes, strict=True))

    def files(self) -> list[Path]:
        """All that must be there."""
        return [file for prefix in self.prefixes for file in corpus_files(prefix, self.kind)]


def plan_corpora(folder: RunFolder, kind: Kind, sources: Sequence[Source]) -> Corpora:
    """Where the token files of each source go."""
    if len(sources) > 1:
        prefixes = [folder.data / f"blend-{number}" for number in range(1, len(sources) + 1)]
    else:
        prefixes = [folder.corpus_prefix if kind == "pretrain" else folder.data / "train"]
    return Corpora(kind, tuple(prefixes), tuple(source.weight for source in sources))


def record_corpora(folder: RunFolder, corpora: Corpora) -> None:
    """Write down what there is to train on, once all of it is there."""
    names = [prefix.relative_to(folder.data).as_posix() for prefix in corpora.prefixes]
    values = {"kind": corpora.kind, "prefixes": names, "weights": corpora.weights}
    write_json(_path(folder), values)


def recorded_corpora(folder: RunFolder) -> Corpora:
    """What there is to train on; where nothing was written down, text at `corpus_prefix`."""
    path = _path(folder)
    if not path.exists():
        return Corpora("pretrain", (folder.corpus_prefix,), (1.0,))
    values = read_json(path)
    prefixes = tuple(folder.data / name for name in values["prefixes"])
    return Corpora(values["kind"], prefixes, tuple(values["weights"]))


def _path(folder: RunFolder) -> Path:
    return folder.data / "corpora.json"
