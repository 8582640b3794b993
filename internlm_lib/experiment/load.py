"""YAML, notebook parameters and dotted overrides → a checked `Experiment`.

Everything that is wrong is found before anything starts and reported at once.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from internlm_lib.errors import ConfigError, InputError
from internlm_lib.experiment.presets import PRESETS
from internlm_lib.experiment.rules import broken_rules
from internlm_lib.experiment.schema import SECTIONS, Experiment, Layout, Section
from internlm_lib.experiment.values import nearest
from internlm_lib.files import write_text
from internlm_lib.run_folder import RunFolder, project_root

NOTEBOOK_PARAMETERS: tuple[str, ...] = ("run_name", *SECTIONS, "overrides")
"""What a params file may hold at its top level, and what every notebook declares."""

DEFAULT_PARAMS = "tiny.yaml"


RECORDS = {
    "imported": "was imported from a log",
    "comparison": "is a comparison",
    "selftest": "is a selftest",
}
"""Section of `experiment.yaml` → what a run that has it is, instead of an experiment's."""


def load_params(path: Path) -> dict[str, Any]:
    """Read a params file as plain values, unchecked but for being a YAML mapping.

    Raises InputError if the file is missing or is not one.
    """
    if not path.is_file():
        known = sorted(p.name for p in (project_root() / "params").glob("*.yaml"))
        raise InputError(f"{path}: no such params file; in params/ there are: {', '.join(known)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of sections ({', '.join(SECTIONS)})")
    return values


def load_experiment(
    path: Path, overrides: Mapping[str, Any] | None = None
) -> tuple[str, Experiment]:
    """Read a params file; returns (run name, experiment). Raises InputError or ConfigError."""
    values = load_params(path)
    return resolve(values, overrides or {}, source=str(path), default_run_name=path.stem)


def from_notebook(parameters: Mapping[str, Any]) -> tuple[str, Experiment]:
    """Resolve what a notebook's parameters cell holds; returns (run name, experiment).

    `parameters` may be a notebook's `globals()`; other names are ignored. With all sections empty,
    as when a notebook is opened and run by hand, the sections are those of `params/tiny.yaml`.
    """
    values = {name: parameters[name] for name in NOTEBOOK_PARAMETERS if name in parameters}
    if not any(values.get(section) for section in SECTIONS):
        defaults = load_params(project_root() / "params" / DEFAULT_PARAMS)
        values = {**defaults, **{k: v for k, v in values.items() if v not in (None, {})}}
    return resolve(values, {}, source="notebook parameters", default_run_name="tiny")


def resolve(
    values: Mapping[str, Any],
    overrides: Mapping[str, Any],
    *,
    source: str,
    default_run_name: str,
) -> tuple[str, Experiment]:
    """Merge overrides, fill the preset, check everything; returns (run name, experiment).

    Args:
        values: top-level keys of `NOTEBOOK_PARAMETERS`; `values["overrides"]` is applied first.
        overrides: flat dict of dotted keys, applied last (the command line's `--set`).
        source: named at the head of an error, e.g. the file.
    Raises:
        ConfigError: lists every problem found.
        InputError: the values are those of one of `RECORDS`.
    """
    for kind, found in RECORDS.items():
        if kind in values:
            raise InputError(
                f"{source}: this run {found}; it cannot be trained, as that is not a whole "
                "experiment. Write a params file for it (see params/)"
            )
    problems: list[str] = []
    merged = _merge(values, overrides, problems)
    run_name = _read_run_name(merged.pop("run_name", None), default_run_name, problems)
    sections, unreadable = _read_sections(merged, problems)
    if sections is not None:
        problems += broken_rules(sections, unreadable)
    if problems or sections is None:
        raise ConfigError(source, problems)
    return run_name, sections


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`["training.lr=1e-5"]` → `{"training.lr": "1e-5"}`, values read as YAML scalars or lists."""
    overrides = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise InputError(f"--set {assignment}: expected KEY=VALUE, e.g. training.lr=1e-5")
        try:
            overrides[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"--set {assignment}: the value is not valid YAML: {error}") from error
    return overrides


def save_experiment(path: Path, run_name: str, experiment: Experiment) -> Path:
    """Write the resolved experiment as YAML that `load_experiment` reads back equal.

    Raises InputError if the run is one of `RECORDS`, which an experiment would falsify.
    """
    if (kind := record_kind(path)) is not None:
        raise InputError(f"{path}: this run {RECORDS[kind]}; give another --run-name")
    values = {"run_name": run_name, **experiment.model_dump(mode="json")}
    return write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def record_kind(path: Path) -> str | None:
    """Which of `RECORDS` a run's `experiment.yaml` is; None for an experiment, or no file."""
    values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    return next((kind for kind in RECORDS if kind in (values or {})), None)


def _merge(
    values: Mapping[str, Any], overrides: Mapping[str, Any], problems: list[str]
) -> dict[str, Any]:
    merged = {key: dict(v) if isinstance(v, Mapping) else v for key, v in values.items()}
    own = merged.pop("overrides", None) or {}
    if not isinstance(own, Mapping):
        problems.append(f"overrides = {own!r}: expected a mapping of dotted keys to values")
        own = {}
    for dotted, value in {**own, **overrides}.items():
        _assign(merged, str(dotted), value, problems)
    return merged


def _assign(values: dict[str, Any], dotted: str, value: Any, problems: list[str]) -> None:
    *path, last = dotted.split(".")
    target = values
    for i, key in enumerate(path):
        child = target.get(key)
        if child is not None and not isinstance(child, Mapping):
            problems.append(f"override {dotted}: {'.'.join(path[: i + 1])} is not a section")
            return
        target[key] = dict(child or {})
        target = target[key]
    target[last] = value


def _read_run_name(run_name: Any, default: str, problems: list[str]) -> str:
    if run_name is None:
        return default
    try:
        return RunFolder.of(run_name).name
    except InputError as error:
        problems.append(str(error))
        return default


def _read_sections(
    values: Mapping[str, Any], problems: list[str]
) -> tuple[Experiment | None, set[str]]:
    """Read all sections, leaving unreadable keys at their defaults so that rules can go on."""
    values = {name: section for name, section in values.items() if section is not None}
    unreadable: set[str] = set()
    model = values.get("model", {})
    if isinstance(model, Mapping):
        values["model"] = _fill_preset(model, problems)
        if "preset" in model and model["preset"] != values["model"]["preset"]:
            unreadable.add("model")
    raw = {**{section: {} for section in SECTIONS}, **values}
    try:
        return Experiment.model_validate(raw), unreadable
    except ValidationError as error:
        details = error.errors()
    problems += [_describe(detail, raw) for detail in details]
    for detail in details:
        raw = _without(raw, detail["loc"])
        unreadable.add(".".join(map(str, detail["loc"])))
    raw["model"] = _fill_preset(raw.get("model") or {}, [])
    raw = {**{section: {} for section in SECTIONS}, **raw}
    try:
        return Experiment.model_validate(raw), unreadable
    except ValidationError:
        return None, unreadable


def _fill_preset(model: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    preset = model.get("preset", "internlm-tiny")
    if not isinstance(preset, str) or preset not in PRESETS:
        near = nearest(str(preset), PRESETS)
        problems.append(f"model.preset = {preset!r}: allowed are {', '.join(PRESETS)}{near}")
        preset = "internlm-tiny"
    return {**PRESETS[preset], **model, "preset": preset}


def _describe(detail: ErrorDetails, raw: Mapping[str, Any]) -> str:
    location = [part for part in detail["loc"] if isinstance(part, (str, int))]
    key = ".".join(map(str, location))
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key{_where_it_belongs(location)}"
    if detail["type"] == "model_type":
        return f"{key} = {detail['input']!r}: expected a mapping of keys to values"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{key} = {detail['input']!r}: {message}"


def _where_it_belongs(location: list[Any]) -> str:
    name = str(location[-1])
    homes = [key for key in _all_keys(Experiment) if key.rsplit(".", 1)[-1] == name]
    if homes:
        return f"; it belongs at {' or '.join(homes)}"
    siblings = [k.rsplit(".", 1)[-1] for k in _all_keys(_section_at(location[:-1]), depth=1)]
    near = nearest(name, siblings)
    return near or f"; allowed are {', '.join(siblings)}"


def _section_at(location: list[Any]) -> type[BaseModel]:
    section: type[BaseModel] = Experiment
    for part in location:
        annotation = section.model_fields[str(part)].annotation
        section = _as_section(annotation) or section
    return section


def _as_section(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return Layout if Layout in getattr(annotation, "__args__", ()) else None


def _all_keys(section: type[BaseModel], prefix: str = "", depth: int = 9) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if depth > 1 and (child := _as_section(field.annotation)):
            yield from _all_keys(child, f"{prefix}{name}.", depth - 1)


def _without(values: dict[str, Any], location: tuple[Any, ...]) -> dict[str, Any]:
    """A copy without the key at `location`, or without the last mapping's key on the way there."""
    key, *rest = location
    if rest and isinstance(values.get(key), dict):
        return {**values, key: _without(values[key], tuple(rest))}
    return {name: value for name, value in values.items() if name != key}
