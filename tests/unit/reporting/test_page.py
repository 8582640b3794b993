import re

import nbformat
import pytest

from internlm_lib.reporting.figures import save_table
from internlm_lib.reporting.html import format_number
from internlm_lib.reporting.page import headline, notebook_to_html, write_index

STAGES = [
    {"stage": "03_train", "status": "done", "seconds": 61.25,
     "result": {"reference": None, "candidate": {"loss_first": 6.5, "loss_last": 1.25}}},
    {"stage": "04_compare", "status": "done", "seconds": 1.0,
     "result": {"verdict": "fail", "mean_relative_error": 0.03, "max_relative_error": None}},
    {"stage": "06_evaluate", "status": "failed", "seconds": 2.0, "result": {"error": "<b>no</b>"}},
]  # fmt: skip


@pytest.fixture
def page(folder, write_training):
    write_training(folder, "candidate", [2.0, 1.0])
    for name in ("loss.svg", "loss.png", "accuracy_cloze.svg", "accuracy_cloze.png"):
        folder.figures.mkdir(parents=True, exist_ok=True)
        (folder.figures / name).write_text("")
    save_table([{"step": n, "loss": 1 / n} for n in range(1, 50)], folder.tables / "loss.csv")
    notebook = folder.report / "notebooks" / "04_compare.html"
    notebook.parent.mkdir()
    notebook.write_text("")
    return write_index(folder, {}, STAGES)


def test_every_link_leads_to_a_file_beside_the_page(page):
    links = re.findall(r'(?:src|href)="([^"]*)"', page.read_text())
    assert "notebooks/04_compare.html" in links and "tables/loss.csv" in links
    assert all((page.parent / link).is_file() for link in links)


def test_numbers_hashes_and_figures_are_shown(page):
    text = page.read_text()
    assert re.search(r'<dt>verdict</dt><dd class="bad">fail', text)
    assert "<dt>last loss</dt><dd>1.25" in text
    assert "max relative error" not in text
    assert '<td class="number">61.25</td>' in text
    assert '<td class="hash">d1</td>' in text
    assert "The first 30 of 49 rows" in text
    assert text.index("figures/loss.svg") < text.index("figures/accuracy_cloze.svg")


def test_text_of_a_run_cannot_become_markup(page):
    assert "&lt;b&gt;no&lt;/b&gt;" in page.read_text()
    assert "<b>no" not in page.read_text()


def test_a_given_summary_is_the_headline(folder):
    text = write_index(folder, {"runs": 3, "nested": {"a_b": 0.5}, "list": [1]}, []).read_text()
    assert "<dt>runs</dt><dd>3" in text and "<dt>nested a b</dt><dd>0.5" in text
    assert "<dt>list" not in text


def test_headline_skips_what_no_stage_gave():
    assert headline([]) == []
    assert dict(headline(STAGES))["mean relative error"] == 0.03


def test_a_notebook_page_needs_no_network(tmp_path):
    cells = [nbformat.v4.new_markdown_cell("# Heading"), nbformat.v4.new_code_cell("1 + 1")]
    path = tmp_path / "04_compare.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    html = notebook_to_html(path).read_text()
    assert "Heading" in html
    assert "<script" not in html
    assert not re.search(r'<(?:link|img)[^>]*(?:src|href)="https?:', html)


@pytest.mark.parametrize(
    "value, text",
    [(1234567, "1,234,567"), (5174.541, "5,175"), (1.5748906e-6, "1.575e-06"), (True, "True"),
     (float("nan"), "nan"), (float("inf"), "inf"), ("x", "x")],
)  # fmt: skip
def test_numbers_are_written_for_people(value, text):
    assert format_number(value) == text
