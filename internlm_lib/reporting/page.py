"""The page people open: `reports/<run>/index.html`, one file that links to what lies beside it."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm_lib import provenance
from internlm_lib.files import write_text
from internlm_lib.journal import events
from internlm_lib.reporting import compare_page
from internlm_lib.reporting.html import TEMPLATES, environment
from internlm_lib.run_folder import RunFolder

CAPTIONS = {
    **{name: caption for name, (_, caption) in compare_page.CAPTIONS.items()},
    "accuracy_cloze": "Share of questions answered correctly, each option's text being scored as "
    "the answer; before training a model guesses (dotted line).",
    "accuracy_letter": "The same questions with the options listed, their letters being scored.",
    "training_loss": "Loss of every training of this run, as 03_train left it.",
    "devices": "What the devices did while each training ran, sampled from outside of it.",
    "schedule": "Learning rate that every training follows.",
    "token_lengths": "Documents of the training data by their length.",
}
"""Figure's file name → what to look for; in the order of the page, before all others."""

_TABLE_ROWS = 30
_TAGS = ("role", "engine", "layout", "device", "device_name", "precision", "world_size")


@dataclass(frozen=True)
class Picture:
    name: str
    caption: str
    svg: str
    png: str


@dataclass(frozen=True)
class Table:
    name: str
    path: str
    header: list[str]
    rows: list[list[str | int | float]]
    total: int
    """Rows in the file; the page shows the first ones."""


def write_index(
    folder: RunFolder, summary: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]
) -> Path:
    """Write the run's page from what is in its folders now; returns its path.

    Args:
        summary: headline numbers, label → value, shown first and in this order; values that are
            not numbers or text are left out.
        stages: status records, as `Stage.finish` returns them: `stage`, `status`, `seconds`,
            `result`.
    """
    template = environment().get_template("index.html.j2")
    page = template.render(
        run=folder.name,
        headline=[*_flat(summary).items()] or headline(stages),
        verdict=_result(stages, "04_compare").get("verdict"),
        stages=[_stage_row(folder, status) for status in stages],
        pictures=_pictures(folder),
        tables=_tables(folder),
        trainings=_trainings(folder),
        comparison=(folder.report / "compare.html").exists(),
        provenance=provenance.record(),
        experiment=_text(folder.experiment),
    )
    return write_text(folder.report / "index.html", page)


def headline(stages: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """The numbers a reader asks for first, taken from the stages' results."""
    train, compare = _result(stages, "03_train"), _result(stages, "04_compare")
    candidate, accuracy = train.get("candidate") or {}, _result(stages, "06_evaluate")
    scores = accuracy.get("accuracy") or {}
    numbers = {
        "verdict": compare.get("verdict"),
        "mean relative error": compare.get("mean_relative_error"),
        "max relative error": compare.get("max_relative_error"),
        "max absolute error": compare.get("max_absolute_error"),
        "first loss": candidate.get("loss_first"),
        "last loss": candidate.get("loss_last"),
        "tokens/s": candidate.get("tokens_per_second"),
        "accuracy before": scores.get("before"),
        "accuracy after": scores.get("after"),
    }
    return [(label, value) for label, value in numbers.items() if value is not None]


def notebook_to_html(notebook: Path) -> Path:
    """Write an executed notebook as one HTML file beside it; returns that path.

    Pictures are embedded, and nothing is fetched from the network when it is opened; formulas
    stay in TeX, as MathJax is fetched.
    """
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(embed_images=True)
    exporter.raw_template = (TEMPLATES / "notebook.html.j2").read_text(encoding="utf-8")
    body, _ = exporter.from_filename(str(notebook))
    return write_text(notebook.with_suffix(".html"), body)


def _result(stages: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    return next((s.get("result") or {} for s in stages if s["stage"] == name), {})


def _stage_row(folder: RunFolder, status: Mapping[str, Any]) -> dict[str, Any]:
    links = {}
    for kind in ("html", "ipynb"):
        path = folder.report / "notebooks" / f"{status['stage']}.{kind}"
        if path.exists():
            links[kind] = _link(folder, path)
    numbers = _flat(status.get("result") or {})
    return {**status, "links": links, "numbers": list(numbers.items())}


def _pictures(folder: RunFolder) -> list[Picture]:
    found = {path.stem: path for path in sorted(folder.figures.glob("*.svg"))}
    names = [name for name in CAPTIONS if name in found] + [n for n in found if n not in CAPTIONS]
    return [
        Picture(
            name=_title(name),
            caption=CAPTIONS.get(name, ""),
            svg=_link(folder, found[name]),
            png=_link(folder, found[name].with_suffix(".png")),
        )
        for name in names
    ]


def _tables(folder: RunFolder) -> list[Table]:
    tables = []
    for path in sorted(folder.tables.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        shown = [[_cell(text) for text in row] for row in rows[:_TABLE_ROWS]]
        titles = [_title(name) for name in header]
        tables.append(Table(_title(path.stem), _link(folder, path), titles, shown, len(rows)))
    return tables


def _cell(text: str) -> str | int | float:
    """CSV has no types: a cell is a number if it reads as one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _link(folder: RunFolder, path: Path) -> str:
    return path.relative_to(folder.report).as_posix()


def _trainings(folder: RunFolder) -> list[dict[str, Any]]:
    starts = [events(folder.training(role).journal, "start") for role in ("reference", "candidate")]
    rows = []
    for start in (found[-1] for found in starts if found):
        rows.append({**{tag: start.get(tag) for tag in _TAGS}, **start.get("tags", {})})
    return rows


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Numbers and short texts of nested results, with readable labels."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        label = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{label} ")
        elif isinstance(value, (int, float)) or (isinstance(value, str) and len(value) < 100):
            flat[label] = value
    return flat


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
