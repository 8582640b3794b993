"""What notebooks show: tables, settings, figures, the live line."""

import sys
from pathlib import Path

import pandas
import pytest

from internlm_lib.experiment.load import load_experiment
from internlm_lib.notebook import LiveLine, figure, show_settings, table
from internlm_lib.run_folder import RunFolder
from internlm_lib.stages.stage import begin_stage

ROWS = [{"engine": "megatron", "loss_first": 6.23456}, {"engine": "a<b", "note": 12345}]


def test_table_as_text_aligns_numbers_right_and_leaves_missing_cells_empty() -> None:
    assert repr(table(ROWS, caption="losses")).splitlines() == [
        "losses",
        "engine    loss first    note",
        "megatron       6.235",
        "a<b                   12,345",
    ]


def test_table_as_html_escapes_text_and_aligns_numbers_right() -> None:
    html = table(ROWS, caption="R & C")._repr_html_()
    assert "<caption>R &amp; C</caption>" in html
    assert "a&lt;b</td>" in html and "a<b" not in html
    cells = {line.rsplit(">", 1)[-1]: line for line in html.split("</td>")}
    assert "text-align:right" in cells["6.235"] and "text-align:left" in cells["megatron"]


def test_a_data_frame_is_shown_like_rows() -> None:
    frame = pandas.DataFrame({"step": [1, 2], "loss": [6.5, 0.25]})
    assert repr(table(frame)) == repr(table([{"step": 1, "loss": 6.5}, {"step": 2, "loss": 0.25}]))


def test_settings_are_the_resolved_values_unrounded(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERNLM_TAIL", "tiny")
    _, experiment = load_experiment(home / "params/tiny.yaml", {"training.lr": "1.23456789e-4"})
    stage = begin_stage("03_train", RunFolder.of("tiny"), experiment)
    rows = dict(show_settings(stage, ["training", "parallel"]).rows)
    assert rows["training.lr"] == "0.000123456789"
    assert rows["training.recompute_granularity"] == "none"
    assert rows["parallel.candidate.tensor_model_parallel_size"] == "2"
    assert not any(name.startswith("model.") for name in rows)


def test_figure_embeds_the_picture_and_names_it(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    Figure().savefig(tmp_path / "loss_comparison.png")
    data, metadata = figure(tmp_path / "loss_comparison.png")._repr_mimebundle_()
    assert "image/png" in data
    assert metadata["image/png"]["alt"] == "loss comparison"


def test_live_line_in_a_log_writes_rarely(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveLine() as line:
        for step in range(50):
            line(f"step {step}")
    assert capsys.readouterr().err == "step 0\n"


def test_live_line_on_a_terminal_rewrites_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with LiveLine() as line:
        line("step 1")
        line("step 1")
        line("step 2")
    assert capsys.readouterr().err == "\r\x1b[2Kstep 1\r\x1b[2Kstep 2\n"


def test_live_line_in_a_kernel_keeps_one_output(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, str]] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            shown.append(("update", data["text/plain"]))

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        shown.append(("display", data["text/plain"]))
        return Handle()

    monkeypatch.setattr("internlm_lib.notebook._in_kernel", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    with LiveLine() as line:
        for step in (1, 2, 3):
            line(f"step {step}")
    assert shown == [("display", "step 1"), ("update", "step 2"), ("update", "step 3")]
