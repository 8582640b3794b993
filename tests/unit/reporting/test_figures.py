import math

import pytest

from internlm_lib.reporting import figures
from internlm_lib.reporting.loss import compare_losses, read_training


@pytest.fixture
def drawn(folder, write_training):
    def draw(reference, candidate):
        ours = read_training(write_training(folder, "reference", reference).journal, "reference")
        other = read_training(write_training(folder, "candidate", candidate).journal, "candidate")
        comparison = compare_losses(ours, other, tolerance=0.02)
        return figures.loss_comparison_figure(ours, other, comparison)

    return draw


def test_drawn_twice_gives_the_same_bytes_without_a_date(drawn, tmp_path):
    losses = [3.0, 2.0, 1.0], [3.0, 2.1, 1.0]
    png, svg = figures.save_figure(drawn(*losses), tmp_path / "v1.0")
    assert (png.name, svg.name) == ("v1.0.png", "v1.0.svg")
    before = [png.read_bytes(), svg.read_bytes()]
    figures.save_figure(drawn(*losses), tmp_path / "v1.0")
    assert [png.read_bytes(), svg.read_bytes()] == before
    assert b"<dc:date>" not in before[1]


def test_roles_keep_their_line_in_every_figure(drawn):
    left, right = drawn([3.0, 2.0], [3.0, 2.1]).axes
    reference, candidate = left.lines
    assert (reference.get_color(), reference.get_linestyle()) == (figures.REFERENCE.color, "-")
    assert (candidate.get_color(), candidate.get_linestyle()) == (figures.CANDIDATE.color, "--")
    assert list(candidate.get_ydata()) == [3.0, 2.1]
    assert right.get_yscale() == "log"
    assert right.lines[0].get_ydata()[1] == pytest.approx(0.05)
    assert math.isnan(right.lines[0].get_ydata()[0])


def test_equal_and_broken_curves_say_so(drawn, folder):
    equal = drawn([3.0, 2.0], [3.0, 2.0])
    assert [t.get_text() for t in equal.axes[1].texts] == ["no difference at any step"]
    figures.save_figure(equal, folder.figures / "equal")
    broken = drawn([3.0, 2.0], [3.0, math.nan])
    assert "nan at step 2" in broken.axes[1].texts[0].get_text()
    figures.save_figure(broken, folder.figures / "broken")


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
    (few,) = figures.length_histogram([3, 3, 5], seq_length=100).axes
    assert {round(b.get_x() + 0.45): b.get_height() for b in few.patches} == {3: 2, 5: 1}
    assert not few.lines
    (many,) = figures.length_histogram(list(range(200)), seq_length=100).axes
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
