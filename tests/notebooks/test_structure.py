"""Every notebook follows the recipe, and every params file fits every notebook."""

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest

from internlm_lib.doctor import KERNEL
from internlm_lib.experiment.load import (
    NOTEBOOK_PARAMETERS,
    from_notebook,
    load_experiment,
    load_params,
)
from internlm_lib.experiment.schema import SECTIONS
from internlm_lib.stages.inputs import READS
from internlm_lib.stages.stage import STAGES

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOKS = [REPOSITORY / "notebooks" / f"{stage}.ipynb" for stage in STAGES]
PARAMS = sorted((REPOSITORY / "params").glob("*.yaml"))
MOST_LINES = 10

FORBIDDEN = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.Try, ast.With, ast.While,
    ast.Assert, ast.Global,
)  # fmt: skip
"""Logic belongs into the library: a notebook calls, shows and explains."""
LIBRARY = ("internlm_lib", "pathlib")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=STAGES)
each_params = pytest.mark.parametrize("params", PARAMS, ids=[p.stem for p in PARAMS])


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def is_parameters(cell: Any) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def test_there_is_one_notebook_per_stage() -> None:
    assert sorted((REPOSITORY / "notebooks").glob("*.ipynb")) == NOTEBOOKS


@each_notebook
def test_notebook_is_valid_cleared_and_names_the_kernel(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    kernel = {"name": KERNEL, "display_name": "InternLM kit", "language": "python"}
    assert notebook.metadata.kernelspec == kernel
    for cell in code_cells(path):
        assert cell.outputs == [] and cell.execution_count is None
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))


@each_notebook
def test_parameters_cell_is_the_first_code_and_the_same_everywhere(path: Path) -> None:
    first, *others = code_cells(path)
    assert is_parameters(first) and not any(map(is_parameters, others))
    assert first.source == code_cells(NOTEBOOKS[0])[0].source


@each_notebook
def test_papermill_reads_the_parameters_as_the_schema_names_them(path: Path) -> None:
    found = papermill.inspect_notebook(str(path))
    assert tuple(found) == NOTEBOOK_PARAMETERS
    for name in (*SECTIONS, "overrides"):
        assert (found[name]["inferred_type_name"], found[name]["default"]) == ("dict", "{}")
    assert found["run_name"]["default"] == '"tiny"'
    assert all(parameter["help"] for parameter in found.values())


@each_notebook
def test_code_cells_are_short_and_only_call(path: Path) -> None:
    for cell in code_cells(path):
        assert not re.search(r"^\s*[%!]", cell.source, re.MULTILINE), cell.source
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert 1 <= len(lines) <= MOST_LINES, cell.source
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, FORBIDDEN), cell.source
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in LIBRARY for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] in LIBRARY, cell.source


@each_notebook
def test_notebook_opens_and_finishes_its_own_stage(path: Path) -> None:
    source = "\n".join(cell.source for cell in code_cells(path))
    assert source.count(f'open_stage("{path.stem}", globals())') == 1
    assert source.count("stage.finish(") == 1


@each_notebook
def test_prose_stands_between_the_code_and_no_path_is_absolute(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    kinds = " ".join(cell.cell_type for cell in cells)
    assert "code code code" not in kinds
    for cell in cells:
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/", cell.source), cell.source


@each_params
def test_params_file_resolves_as_a_file_and_as_notebook_parameters(params: Path) -> None:
    name, experiment = load_experiment(params)
    assert name == params.stem
    assert from_notebook(load_params(params)) == (name, experiment)


@each_params
@each_notebook
def test_papermill_knows_every_key_of_every_params_file(params: Path, path: Path) -> None:
    assert load_params(params).keys() <= papermill.inspect_notebook(str(path)).keys()


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_reads_is_part_of_its_inputs(stage: str) -> None:
    """A stage that reads a section which is not hashed would be skipped when it must not be."""
    module = REPOSITORY / "internlm_lib" / "stages" / f"{stage.partition('_')[2]}.py"
    used = set(re.findall(r"experiment\.(\w+)\.", module.read_text(encoding="utf-8")))
    assert used & set(SECTIONS) <= hashed_sections(stage) | {"tracking"}


def hashed_sections(stage: str) -> set[str]:
    own = {key.partition(".")[0] for key in READS[stage].keys}
    return own.union(*(hashed_sections(earlier) for earlier in READS[stage].stages))
