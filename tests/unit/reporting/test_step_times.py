import numpy as np
import pytest

from internlm_lib.reporting.step_times import StepTimes, step_time_figure, step_time_rows


def times(role, seconds, left_out=()):
    out = np.isin(np.arange(len(seconds)), left_out)
    steps = np.arange(1, len(seconds) + 1)
    return StepTimes(f"{role}: TP1", role, steps, np.asarray(seconds, dtype=float), out)


def labels(axes):
    return axes.get_legend_handles_labels()[1]


def test_steps_left_out_are_grey_and_in_no_median():
    figure = step_time_figure([times("candidate", [9.0, 1.0, 3.0, 2.0, np.nan, 8.0], (0, 5))])
    (axes,) = figure.axes
    assert labels(axes) == ["step", "left out of the median: 2 steps", "median 2 s"]
    step, out = axes.lines[:2]
    assert step.get_ydata() == pytest.approx([np.nan, 1, 3, 2, np.nan, np.nan], nan_ok=True)
    assert out.get_ydata() == pytest.approx([9, *[np.nan] * 4, 8], nan_ok=True)
    assert step.get_color() != out.get_color()


def test_trainings_share_their_axes_and_a_slow_step_of_many_is_kept():
    slow = np.full(100_000, 0.5)
    slow[50_000] = 30.0
    first, second = step_time_figure([times("reference", slow), times("candidate", [0.4])]).axes
    assert max(first.lines[0].get_ydata()) == 30.0
    assert len(first.lines[0].get_ydata()) < 3_000
    assert first.get_ylim() == second.get_ylim()
    assert first.get_yscale() == "log"  # 30 s is far from the median
    assert [axes.get_title("left") for axes in (first, second)] == [
        "reference: TP1",
        "candidate: TP1",
    ]


def test_no_seconds_at_all_say_so():
    (axes,) = step_time_figure([times("candidate", [np.nan, np.nan])]).axes
    assert axes.texts[0].get_text() == "no step recorded its seconds"


def test_rows_name_the_training():
    rows = step_time_rows([times("reference", [1.0, 2.0], (0,)), times("candidate", [3.0])])
    assert rows.to_dict("list") == {
        "training": ["reference: TP1"] * 2 + ["candidate: TP1"],
        "role": ["reference", "reference", "candidate"],
        "step": [1, 2, 1],
        "seconds": [1.0, 2.0, 3.0],
        "left_out": [True, False, False],
    }
