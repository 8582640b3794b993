import numpy as np
import pytest

from internlm_lib.reporting import figures
from internlm_lib.reporting.training import LoggedTraining


def training(role, losses):
    steps, columns = np.arange(1, len(losses) + 1), {"loss": np.array(losses)}
    return LoggedTraining(f"{role}: TP1, cpu", {}, steps, columns, np.zeros(len(steps), bool))


def drawn():
    ours = training("reference", [3.0, 2.0, 1.0])
    return figures.loss_figure(training("candidate", [3.0, 2.1, 1.0]), ours)


def test_drawn_twice_gives_the_same_bytes_without_a_date(tmp_path):
    png, svg = figures.save_figure(drawn(), tmp_path / "v1.0")
    assert (png.name, svg.name) == ("v1.0.png", "v1.0.svg")
    before = [png.read_bytes(), svg.read_bytes()]
    figures.save_figure(drawn(), tmp_path / "v1.0")
    assert [png.read_bytes(), svg.read_bytes()] == before
    assert b"<dc:date>" not in before[1]


def test_roles_keep_their_line_in_every_figure():
    (axes,) = drawn().axes
    reference, candidate = axes.lines
    assert (reference.get_color(), reference.get_linestyle()) == (figures.REFERENCE.color, "-")
    assert (candidate.get_color(), candidate.get_linestyle()) == (figures.CANDIDATE.color, "--")
    assert candidate.get_xdata().tolist() == [1, 2, 3]
    assert candidate.get_ydata().tolist() == [3.0, 2.1, 1.0]


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0.0, "0 %"), (0.003, "0.3 %"), (-0.12345, "-12.3 %"), (12.345, "1,234 %"), (1, "100 %"),
     (2e-6, "0.0002 %"), (3.4e-7, "3.4e-07"), (-3.4e-7, "-3.4e-07")],
)  # fmt: skip
def test_percents_have_three_digits_and_tiny_ones_are_fractions(fraction, text):
    assert figures.percent(fraction) == text


def test_parts_of_a_step_lie_end_to_end_and_what_was_not_measured_is_left_out():
    times = {"forward_backward_seconds": 0.5, "communication_seconds": None, "data_seconds": 0.1,
             "optimizer_seconds": 0.25, "other_seconds": 0.05}  # fmt: skip
    row = {"role": "candidate", "layout": "TP1", "step_seconds": 0.9, **times}
    figure = figures.step_times_figure([row])
    bars = figure.axes[0].patches
    assert [bar.get_x() for bar in bars] == pytest.approx([0, 0.5, 0.75, 0.85])
    assert [bar.get_width() for bar in bars] == pytest.approx([0.5, 0.25, 0.1, 0.05])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["forward and backward", "optimizer", "data", "other"]


def test_accuracy_bars_leave_out_what_was_not_measured():
    rows = [{"subject": "two_words", "before": None, "after": 0.5}]
    (axes,) = figures.accuracy_figure(rows, chance=0.25).axes
    assert [bar.get_width() for bar in axes.patches] == [0.5]
    assert axes.get_yticklabels()[0].get_text() == "two words"
    assert axes.lines[0].get_xdata() == [0.25, 0.25]


def test_histogram_counts_every_document():
    (few,) = figures.length_histogram({3: 2, 5: 1}, seq_length=100).axes
    assert {round(b.get_x() + 0.45): b.get_height() for b in few.patches} == {3: 2, 5: 1}
    assert not few.lines
    (many,) = figures.length_histogram(dict.fromkeys(range(200), 1), seq_length=100).axes
    assert sum(bar.get_height() for bar in many.patches) == 200
    assert many.lines[0].get_xdata() == [100, 100]


def test_style_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    with figures.style():
        assert matplotlib.rcParams["axes.grid"] is True
    assert dict(matplotlib.rcParams) == before


def test_table_has_a_column_for_every_key(tmp_path):
    path = figures.save_table([{"a": 1}, {"a": 0.1, "b": "x,y"}], tmp_path / "t.csv")
    assert path.read_text() == 'a,b\n1.0,\n0.1,"x,y"\n'
