"""The compare stage on journals written by hand; its tail is switched off."""

import math
from pathlib import Path

import pytest

from internlm_lib.errors import InputError, MissingStageError, NotComparableError, VerdictError
from internlm_lib.experiment.load import load_experiment
from internlm_lib.files import write_json
from internlm_lib.journal import events
from internlm_lib.run_folder import RunFolder
from internlm_lib.stages import compare
from internlm_lib.stages.stage import begin_stage
from internlm_lib.tracking.tail import OWNER_VARIABLE

TINY = Path(__file__).resolve().parents[3] / "params" / "tiny.yaml"


@pytest.fixture
def begin(folder, monkeypatch):
    def begin_(**overrides):
        monkeypatch.setenv(OWNER_VARIABLE, folder.name)
        _, experiment = load_experiment(TINY, overrides)
        return begin_stage("04_compare", folder, experiment)

    return begin_


def test_a_good_candidate_passes_and_leaves_its_evidence(begin, folder, write_training):
    write_training(folder, "reference", [2.0] * 60, speed=100.0)
    write_training(folder, "candidate", [2.01] * 60, speed=150.0)
    result = compare.run(begin())
    assert result["mean_relative_error"] == pytest.approx(0.005)
    assert result["verdict"] == "pass" and result["steps"] == 60
    assert result["performance"]["ratio"] == pytest.approx(1.5)
    assert result["performance"]["candidate"]["tokens_per_second_per_device"] == 150.0
    assert compare.check_verdict(result).startswith("verdict: pass; mean relative error 0.005")
    artifacts = [event["path"] for event in events(folder.journal, "artifact")]
    figures = ("loss", "signed_error", "error_histogram", "grad_norm", "throughput", "step_seconds")
    for name in figures:
        for path in (f"figures/{name}.png", f"figures/{name}.svg", f"tables/{name}.csv"):
            assert f"reports/r/{path}" in artifacts
    assert all((folder.root / path).stat().st_size for path in artifacts)
    table = (folder.tables / "loss.csv").read_text().splitlines()
    assert table[0] == "step,reference,candidate,relative_error"
    assert len(table) == 61
    metrics = {}
    for event in events(folder.journal, "metrics"):
        metrics |= event["values"]
    assert metrics["compare/max_relative_error"] == pytest.approx(0.005)
    assert metrics["compare/tokens_per_second_per_device_ratio"] == pytest.approx(1.5)
    curve = events(folder.journal, "series")[0]
    assert curve["name"] == "compare/signed_relative_error" and len(curve["steps"]) == 60
    tags = {k: v for event in events(folder.journal, "tags") for k, v in event["values"].items()}
    assert tags["compare/verdict"] == "pass"


def test_the_report_is_one_file_with_the_verdict_first(begin, folder, write_training):
    write_training(folder, "reference", [2.0] * 60, device="cuda")
    write_training(folder, "candidate", [2.01] * 60, device="npu")
    result = compare.run(begin())
    page = (folder.root / result["report"]).read_text(encoding="utf-8")
    assert page.index("pass") < page.index("data:image/svg+xml;base64,")
    for words in (result["reasons"][0], "cuda", "npu", "Reproduce it", "--only 04_compare"):
        assert words in page
    assert page.count("<img") == 6
    for attribute in ("src=", "href="):
        for part in page.split(attribute)[1:]:
            assert part.startswith('"data:'), "the page needs another file"


def test_a_bad_candidate_is_recorded_before_it_is_an_error(begin, folder, write_training):
    write_training(folder, "reference", [2.0] * 4)
    write_training(folder, "candidate", [2.0, 2.0, 2.5, 2.5])
    stage = begin()
    result = compare.run(stage)
    stage.finish(result)
    assert stage.result_of("04_compare")["verdict"] == "fail"
    with pytest.raises(VerdictError, match="mean relative error 0.125 is above the tolerance 0.02"):
        compare.check_verdict(result)


def test_a_nan_fails_with_its_step(begin, folder, write_training):
    write_training(folder, "reference", [2.0] * 5)
    write_training(folder, "candidate", [2.0, math.nan, 2.0, 2.0, 2.0])
    result = compare.run(begin())
    assert result["steps"] == 4
    with pytest.raises(VerdictError, match="candidate's loss is nan at step 2"):
        compare.check_verdict(result)


def test_without_a_reference_there_is_no_verdict(begin, folder, write_training):
    write_training(folder, "candidate", [2.0, 1.0])
    result = compare.run(begin(**{"parallel.reference": None}))
    assert result["verdict"] == "not compared" and result["mean_relative_error"] is None
    assert "parallel.reference_run" in compare.check_verdict(result)
    assert compare.statistics_rows(None) == [{"statistic": "verdict", "loss": "not compared"}]
    assert (folder.tables / "loss.csv").read_text() == "step,candidate\n1,2.0\n2,1.0\n"
    assert "not compared" in (folder.report / "compare.html").read_text(encoding="utf-8")


def test_the_reference_may_be_another_run(begin, folder, write_training):
    write_training(folder, "candidate", [2.0, 1.0])
    other = {"parallel.reference": None, "parallel.reference_run": "gpu"}
    with pytest.raises(InputError, match="'gpu' is no run, no MLflow run id and no file"):
        compare.run(begin(**other))
    there = RunFolder.of("gpu", folder.root)
    write_training(there, "candidate", [2.0, 1.25], device="cuda")
    there.experiment.write_text("tracking: {}", encoding="utf-8")
    trainings = compare.load_trainings(begin(**other))
    assert trainings.reference.name == "reference: megatron TP1 PP1 DP2, cuda"
    assert trainings.rows[0]["last_loss"] == 1.25
    assert [row["read from"] for row in trainings.rows] == ["run gpu", "run r/candidate"]


def test_a_reference_that_was_asked_for_must_be_there(begin, folder, write_training):
    write_training(folder, "candidate", [2.0, 1.0])
    with pytest.raises(MissingStageError, match="03_train"):
        compare.run(begin())


def test_two_experiments_get_no_verdict_on_their_losses(begin, folder, write_training):
    write_training(folder, "reference", [2.0] * 5)
    write_training(folder, "candidate", [2.0] * 5, tags={"data_sha256": "other"})
    result = compare.run(begin())
    assert result["verdict"] == "not-comparable"
    with pytest.raises(NotComparableError, match="data_sha256 is d1 in the reference, other in"):
        compare.check_verdict(result)


def test_the_parity_of_layouts_is_shown_once_it_was_measured(begin, folder):
    assert compare.layout_parity(begin()).rows[0]["to measure"] == "python benchmarks/parity.py"
    write_json(
        folder.parity,
        {
            "reference": "one rank",
            "limits": {"loss": 1e-6, "grad_norm": 1e-5},
            "recipe": {"training.train_iters": 50, "training.precision": "fp32"},
            "first_loss": 6.25,
            "last_loss": 4.5,
            "layouts": [
                {
                    "layout": name,
                    "ranks": 2,
                    "max_relative_loss_difference": loss,
                    "max_relative_grad_norm_difference": 2e-7,
                    "within": {"loss": loss <= 1e-6, "grad_norm": True},
                }
                for name, loss in (("PP2", 1e-7), ("TP2", 1e-5))
            ],
            "made_with": {
                **dict.fromkeys(("torch", "megatron-core", "deepspeed"), "1.0"),
                "git_commit": "a" * 40, "git_dirty": True, "cpu_model": "a CPU",
            },
        },
    )  # fmt: skip
    parity = compare.layout_parity(begin())
    assert [(row["layout"], row["within_limits"]) for row in parity.rows] == [
        ("PP2", "yes"),
        ("TP2", "no"),
    ]
    assert parity.rows[1]["loss"] == 1e-5
    for words in ("from one rank over 50 steps in fp32", "6.250 → 4.500",
                  "commit aaaaaaaaaaaa with changes", "on a CPU"):  # fmt: skip
        assert words in parity.origin
    assert len((folder.tables / "parity.csv").read_text().splitlines()) == 3
