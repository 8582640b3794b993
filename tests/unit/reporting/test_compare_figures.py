import time

import numpy as np
import pytest

from internlm_lib.reporting import compare_figures, error_figures
from internlm_lib.reporting.figures import CANDIDATE, REFERENCE, percent
from internlm_lib.reporting.interval import Estimate
from internlm_lib.reporting.loss import compare_losses
from internlm_lib.reporting.training import LoggedTraining

FIGURES = {
    "losses": compare_figures.losses_figure,
    "signed": error_figures.signed_error_figure,
    "histogram": error_figures.error_histogram,
    "grad norm": compare_figures.grad_norm_figure,
}
MANY = 500_000


def training(role, losses, grad_norm=None, *, tokens_per_step=64, **tags):
    losses = np.asarray(losses, dtype=float)
    columns = {"loss": losses}
    if grad_norm is not None:
        columns["grad_norm"] = np.asarray(grad_norm, dtype=float)
    start = {"tokens_per_step": tokens_per_step, "tags": tags}
    steps = np.arange(1, len(losses) + 1)
    return LoggedTraining(f"{role}: TP1, cpu", start, steps, columns, np.zeros(len(steps), bool))


def compare(reference, candidate, *, norms=(None, None), repeats=(), **tags):
    ours = training("reference", reference, norms[0], data_sha256="d1")
    theirs = training("candidate", candidate, norms[1], **{"data_sha256": "d1", **tags})
    return compare_losses(ours, theirs, 0.02, repeats=repeats)


def noisy(n, error=0.002, seed=0):
    """A falling loss, and the same with independent noise of a relative size."""
    random = np.random.default_rng(seed)
    reference = 2 + 8 * np.exp(-10 * np.arange(n) / n)
    return reference, reference * (1 + error * random.normal(size=n))


def labels(axes):
    return [text for text in axes.get_legend_handles_labels()[1] if not text.startswith("_")]


def title(figure):
    return figure.get_suptitle().replace("\u00a0", " ")


@pytest.fixture(scope="module")
def half_a_million():
    reference, candidate = noisy(MANY)
    candidate[MANY // 2] *= 1.5
    candidate[MANY // 3 : MANY // 3 + 5_000] = np.nan
    norms = candidate / 3
    norms[MANY // 5] = 1e4
    comparison = compare(reference, candidate, norms=(reference / 3, norms))
    # Computed, it takes seconds, and is but a line in the figures.
    comparison.loss.__dict__["bias"] = Estimate(1e-4, 1e-5, 50)
    return comparison


def test_roles_keep_their_line_and_errors_their_size():
    left, right = compare_figures.losses_figure(compare([3.0, 2.0], [3.0, 2.1])).axes
    reference, candidate = left.lines
    assert (reference.get_color(), reference.get_linestyle()) == (REFERENCE.color, "-")
    assert (candidate.get_color(), candidate.get_linestyle()) == (CANDIDATE.color, "--")
    assert candidate.get_ydata().tolist() == [3.0, 2.1]
    assert right.get_yscale() == "log"
    assert right.lines[0].get_ydata() == pytest.approx([np.nan, 0.05], nan_ok=True)
    assert labels(right) == [
        "error (0 at 1 of 2 steps)", "mean 2.5 %", "largest 5 % at step 2", "tolerance 2 %",
    ]  # fmt: skip


def test_many_steps_are_drawn_pale_with_their_mean_on_top():
    reference, candidate = noisy(700)
    left, _ = compare_figures.losses_figure(compare(reference, candidate)).axes
    assert [line.get_alpha() for line in left.lines] == [0.6, None, 0.6, None]
    pale, thick = left.lines[2:]
    assert pale.get_ydata().tolist() == candidate.tolist()
    assert thick.get_ydata()[350] == pytest.approx(candidate[347:354].mean())
    assert left.get_title("left") == "Training loss (thick: mean of 7 steps)"


def test_losses_may_be_drawn_on_a_logarithmic_axis():
    left, _ = compare_figures.losses_figure(compare(*noisy(300)), scale="log").axes
    assert left.get_yscale() == "log"


@pytest.mark.parametrize(
    ("comparison", "begin"),
    [
        (compare(*noisy(300)), "\u2713 pass: mean relative error 0.1"),
        (
            compare(*(noisy(300)[0] * np.array([[1], [1.03]]))),
            "\u2717 fail: mean relative error 3 %",
        ),
        (compare([3.0], [3.0003]), "? inconclusive: mean relative error 0.01 %, bias +0.01 %, tol"),
        (compare(*noisy(300), data_sha256="d2"), "\u2260 not-comparable: mean relative error 0.1"),
        (compare([np.nan], [1.0]), "\u2717 fail: no step to compare, tolerance 2 %"),
    ],
)
@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_the_title_tells_the_verdict_by_symbol_word_and_frame(draw, comparison, begin):
    figure = draw(comparison)
    assert title(figure).startswith(begin)
    if comparison.verdict != "pass":
        first_words = " ".join(comparison.reasons[0].split()[:4])
        assert first_words in title(figure).replace("\n", " ")


def test_frames_differ_in_line_as_well_as_colour():
    frames = set()
    for comparison in (
        compare(*noisy(300)), compare([3.0], [3.0]), compare([1.0], [np.nan]),
        compare([3.0], [3.0], data_sha256="d2"),
    ):  # fmt: skip
        patch = compare_figures.losses_figure(comparison)._suptitle.get_bbox_patch()
        frames.add((patch.get_linestyle(), patch.get_edgecolor()))
    assert len({line for line, _ in frames}) == len({color for _, color in frames}) == 4


@pytest.mark.parametrize("n", [1, 300])
@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_equal_and_missing_losses_say_so(draw, n):
    losses = noisy(n)[0]
    nothing = np.full(n, np.nan)
    for candidate, note in ((losses, "no difference at any step"), (nothing, "no step to compare")):
        figure = draw(compare(losses, candidate, norms=(losses, candidate)))
        assert note in [text.get_text() for axes in figure.axes for text in axes.texts]
    figure.draw_without_rendering()


def test_gradient_norms_that_nobody_logged_are_missed():
    left, right = compare_figures.grad_norm_figure(compare(*noisy(5))).axes
    assert left.texts[0].get_text() == "neither training logged gradient norms"
    assert right.texts[0].get_text() == "no step to compare"
    assert not left.lines


def test_steps_without_a_loss_are_gaps_and_ticks():
    comparison = compare([3.0, np.nan, 2.0, 2.0], [3.0, 2.5, np.inf, 2.0])
    left, _ = compare_figures.losses_figure(comparison).axes
    assert labels(left)[1::2] == [
        "reference: no finite loss (1 step)", "candidate: no finite loss (1 step)",
    ]  # fmt: skip
    lost = [line for line in left.lines if line.get_marker() == "|"]
    assert [line.get_xdata().tolist() for line in lost] == [[2.0], [3.0]]
    assert np.isnan(left.lines[0].get_ydata()[1])


def test_tokens_are_the_axis_where_steps_are_not_the_same_number_of_them():
    ours = training("reference", noisy(100)[0], tokens_per_step=4_000_000)
    theirs = training("candidate", noisy(200)[0], tokens_per_step=2_000_000)
    comparison = compare_losses(ours, theirs, 0.02)
    left, _ = compare_figures.losses_figure(comparison).axes
    assert left.get_xlabel() == "consumed tokens (millions)"
    assert left.lines[0].get_xdata()[0] == 4.0
    rows = compare_figures.losses_rows(comparison)
    assert rows["consumed_tokens"].tolist() == (rows["step"] * 2_000_000).tolist()


def test_a_spike_and_a_gap_stay_in_half_a_million_steps(half_a_million):
    left, right = compare_figures.losses_figure(half_a_million).axes
    spike = half_a_million.pairing.values("loss")[1][MANY // 2]
    pale = left.lines[2]
    place = pale.get_xdata().tolist().index(MANY // 2 + 1)
    assert pale.get_ydata()[place] == spike
    assert np.nanmax(right.lines[0].get_ydata()) == half_a_million.loss.relative.max()
    largest = percent(half_a_million.loss.relative.max())
    assert f"largest {largest} at step {MANY // 2 + 1:,}" in labels(right)
    gap = (pale.get_xdata() > MANY // 3 + 1) & (pale.get_xdata() < MANY // 3 + 5_000)
    assert gap.any() and np.isnan(pale.get_ydata()[gap]).all()
    norms = compare_figures.grad_norm_figure(half_a_million).axes[0]
    assert max(np.nanmax(line.get_ydata()) for line in norms.lines) == 1e4


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_half_a_million_steps_make_a_small_file_soon(draw, half_a_million, tmp_path):
    assert half_a_million.verdict == "fail"
    start = time.process_time()
    figure = draw(half_a_million)
    assert time.process_time() - start < 5
    figure.savefig(tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size < 400_000


def test_signed_error_shows_bias_trend_and_the_steps_that_leave_the_view():
    reference, candidate = noisy(1_000)
    candidate[500] = 2 * reference[500]
    (axes,) = error_figures.signed_error_figure(compare(reference, candidate)).axes
    assert [label.split(":")[0] for label in labels(axes)] == [
        "error", "mean of 11 steps", "tolerance \u00b12 %", "mean +0.0901 % (95 %",
        "trend of the last 200 steps", "out of view",
    ]  # fmt: skip
    assert labels(axes)[-1] == "out of view: 1 step, up to +100 %"
    triangle = axes.lines[-1]
    assert triangle.get_xdata().tolist() == [501]
    assert triangle.get_ydata()[0] == axes.get_ylim()[1] < 0.05
    assert axes.lines[1].get_ydata().max() > 0.99


def test_a_tolerance_far_away_does_not_flatten_the_errors():
    comparison = compare(*noisy(300, error=1e-6))
    (axes,) = error_figures.signed_error_figure(comparison).axes
    assert axes.get_ylim()[1] < 1e-5
    assert "tolerance \u00b12 % (out of view)" in labels(axes)
    (axes,) = error_figures.error_histogram(comparison).axes
    assert axes.get_xlim()[1] < 1e-5
    assert "tolerance \u00b12 % (out of view)" in labels(axes)


def test_histogram_and_its_rows_count_every_step():
    reference, candidate = noisy(1_000)
    candidate[500] = 2 * reference[500]
    comparison = compare(reference, candidate)
    (axes,) = error_figures.error_histogram(comparison).axes
    assert sum(bar.get_height() for bar in axes.patches) == 999
    assert "1,000 steps, 1 (0.1 %) beyond the tolerance" in labels(axes)
    assert "out of view: 1 step, up to +100 %" in labels(axes)
    rows = error_figures.error_histogram_rows(comparison)
    assert sum(row["steps"] for row in rows) == 1_000
    assert rows[-1]["steps"] == 1
    assert rows[-1]["upper"] == comparison.loss.signed.max()
    assert all(one["upper"] == two["lower"] for one, two in zip(rows, rows[1:], strict=False))


def test_one_error_everywhere_is_one_bar():
    (axes,) = error_figures.error_histogram(compare([2.0] * 4, [2.5] * 4)).axes
    assert [bar.get_height() for bar in axes.patches if bar.get_height()] == [4]


def test_rows_hold_what_is_drawn():
    comparison = compare([4.0, 2.0, 1.0], [4.4, np.nan, 0.9], norms=([1, 1, 2], [1, 1, 1]))
    losses = compare_figures.losses_rows(comparison)
    assert losses.columns.tolist() == ["step", "reference", "candidate", "relative_error"]
    assert losses["relative_error"].tolist() == pytest.approx([0.1, np.nan, 0.1], nan_ok=True)
    norms = compare_figures.grad_norm_rows(comparison)
    assert norms["relative_error"].tolist() == [0, 0, 0.5]
    signed = error_figures.signed_error_rows(comparison)
    assert signed["step"].tolist() == [1, 3]
    assert signed["signed_error"].tolist() == pytest.approx([0.1, -0.1])
    assert error_figures.error_histogram_rows(compare([np.nan], [1.0])) == []


def test_noise_between_repeats_is_drawn_beside_the_tolerance():
    reference, candidate = noisy(300)
    repeats = [training("repeat", noisy(300, 0.001, seed)[1]) for seed in (1, 2)]
    comparison = compare(reference, candidate, repeats=repeats)
    _, right = compare_figures.losses_figure(comparison).axes
    (label,) = (text for text in labels(right) if text.startswith("repeats on one device"))
    line = next(line for line in right.lines if line.get_label() == label)
    assert line.get_ydata()[0] == comparison.noise_floor
