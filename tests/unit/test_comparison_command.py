"""`internlm compare` on runs, on logs and on what is neither: its object, exit codes and record."""

import json
import math
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from internlm_lib.cli import app
from internlm_lib.errors import InputError
from internlm_lib.experiment.load import load_experiment, save_experiment
from internlm_lib.journal import Journal, events
from internlm_lib.run_folder import RunFolder

STEPS = 80
TINY = Path(__file__).resolve().parents[2] / "params" / "tiny.yaml"
TRACKING = {"tracking": {"uri": None, "experiment": "internlm"}}
RESULT = {
    "steps", "mean_relative_error", "max_relative_error", "max_relative_error_step",
    "max_absolute_error", "signed_mean", "signed_mean_ci95", "late_slope", "noise_ratio", "verdict",
    "reasons", "performance", "report",
}  # fmt: skip
LINE = (
    " iteration {step:8d}/{total:8d} | consumed samples: {samples:12d} | consumed tokens: "
    "{tokens:12d} | elapsed time per iteration (ms): {ms:.1f} | learning rate: 1.000E-04 | "
    "global batch size:   256 | lm loss: {loss:.6E} | loss scale: 1.0 | grad norm: 1.000 | actual "
    "seqlen:  2048 | number of skipped iterations:   0 | number of nan iterations:   0 | samples "
    "per second: {rate:.3f} | TFLOPs: 145.75 |"
)
"""The shape of AscendSpeed's training log."""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNLM_HOME", str(tmp_path))
    return tmp_path


def losses(bias: float = 0.0) -> list[float]:
    return [(2 + 8 * math.exp(-n / 20)) * (1 + bias + 1e-4 * math.sin(7 * n)) for n in range(STEPS)]


def write_run(home, name: str, values: list[float], **start) -> None:
    folder = RunFolder.of(name, home)
    folder.path.mkdir(parents=True)
    folder.experiment.write_text(yaml.safe_dump(TRACKING), encoding="utf-8")
    journal = Journal(folder.training("candidate").journal)
    facts = {"layout": "TP1", "device": "cpu", "world_size": 2, "tokens_per_step": 64}
    journal.write("start", first_step=1, **facts, **start)
    for step, loss in enumerate(values, start=1):
        journal.write("step", step=step, loss=loss, step_seconds=0.1, grad_norm=1.0)


def write_log(path, values: list[float], milliseconds: float) -> str:
    rows = [
        LINE.format(
            step=n, total=len(values), samples=256 * n, tokens=256 * 2048 * n, ms=milliseconds,
            loss=loss, rate=256e3 / milliseconds,
        )
        for n, loss in enumerate(values, start=1)
    ]  # fmt: skip
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def compare(*arguments: str):
    done = CliRunner().invoke(app, ["compare", *arguments, "--json"])
    assert done.stdout, done.exception
    return done.exit_code, json.loads(done.stdout), done.stderr


def test_two_runs_that_agree_pass(home):
    write_run(home, "gpu", losses())
    write_run(home, "npu", losses(bias=1e-3))
    code, result, said = compare("--reference", "gpu", "--candidate", "npu")
    assert (code, result["verdict"]) == (0, "pass"), said
    assert result.keys() >= RESULT
    assert result["signed_mean"] == pytest.approx(1e-3, rel=0.01)
    assert {"reference", "candidate", "ratio", "ratio_ci95"} <= result["performance"].keys()
    assert result["report"] == "reports/npu-vs-gpu/compare.html"
    page = (home / result["report"]).read_text(encoding="utf-8")
    assert "internlm compare --reference gpu --candidate npu --tolerance 0.02" in page


def test_a_comparison_is_a_run_of_its_own_in_journal_and_mlflow(home):
    write_run(home, "gpu", losses())
    write_run(home, "npu", losses(bias=1e-3))
    compare("--reference", "gpu", "--candidate", "npu", "--run-name", "both")
    folder = RunFolder.of("both", home)
    assert [e["status"] for e in events(folder.journal, "stage")] == ["running", "done"]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("internlm")
    run = next(
        run
        for run in client.search_runs([experiment.experiment_id])
        if run.info.run_name == "04_compare"
    )
    assert run.data.tags["compare/verdict"] == "pass"
    curve = client.get_metric_history(run.info.run_id, "compare/signed_relative_error")
    assert len(curve) == STEPS and curve[0].value == pytest.approx(1e-3, abs=2e-4)
    folders = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"figures", "tables"} <= folders


def test_two_logs_are_compared_without_importing_them(home, tmp_path):
    ours = write_log(tmp_path / "gpu.log", losses(), 16000.0)
    theirs = write_log(tmp_path / "npu.log", losses(bias=0.002), 20000.0)
    code, result, said = compare("--reference", ours, "--candidate", theirs)
    assert (code, result["verdict"]) == (0, "pass"), said
    assert result["performance"]["ratio"] == pytest.approx(0.8)
    assert result["performance"]["candidate"]["samples_per_second"] == pytest.approx(12.8)
    assert any("on trust" in reason for reason in result["reasons"])


def test_a_fail_has_exit_code_3_and_still_its_object(home):
    write_run(home, "gpu", losses())
    write_run(home, "npu", losses(bias=0.05))
    code, result, said = compare("--reference", "gpu", "--candidate", "npu")
    assert (code, result["verdict"]) == (3, "fail")
    assert "above the tolerance 0.02" in said
    assert compare("--reference", "gpu", "--candidate", "npu", "--tolerance", "0.1")[0] == 0


def test_other_weights_have_exit_code_4_unless_forced(home):
    write_run(home, "gpu", losses(), tags={"weights_sha256": "a"})
    write_run(home, "npu", losses(), tags={"weights_sha256": "b"})
    code, result, _ = compare("--reference", "gpu", "--candidate", "npu")
    assert (code, result["verdict"]) == (4, "not-comparable")
    assert compare("--reference", "gpu", "--candidate", "npu", "--force", "--log-scale")[0] == 0
    page = (home / "reports/npu-vs-gpu/compare.html").read_text(encoding="utf-8")
    assert "--tolerance 0.02 --force --log-scale" in page


def test_repeats_give_a_noise_ratio(home):
    write_run(home, "gpu", losses())
    write_run(home, "npu", losses(bias=0.004))
    write_run(home, "npu2", losses(bias=0.002))
    floor = ("--noise-floor", "npu", "--noise-floor", "npu2")
    _, result, _ = compare("--reference", "gpu", "--candidate", "npu", *floor)
    assert result["noise_ratio"] == pytest.approx(2.0, rel=0.05)
    assert result["noise_floor"] == pytest.approx(0.002, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--reference", "gpu", "--candidate", "npu1"), "did you mean 'npu'"),
        (("--reference", "gpu", "--candidate", "npu", "--flops", "8N"), "allowed are 6N"),
        (("--reference", "gpu", "--candidate", "npu", "--tolerance", "0"), "a share above 0"),
        (("--reference", "gpu", "--candidate", "npu", "--noise-floor", "npu"), "two or more"),
        (("--reference", "gpu", "--candidate", "npu", "--run-name", "npu"), "is no comparison"),
    ],
)
def test_bad_input_has_exit_code_2_and_writes_nothing(home, arguments, words):
    write_run(home, "gpu", losses())
    write_run(home, "npu", losses())
    code, result, _ = compare(*arguments)
    assert (code, result["error"]["exit_code"]) == (2, 2)
    assert words in result["error"]["message"]
    assert not (home / "reports").exists()


def test_a_run_of_another_tracking_server_is_compared_by_its_id(home):
    write_run(home, "gpu", losses(), tags={"data_sha256": "d"}, device_name="A100")
    write_run(home, "npu", losses(bias=1e-3), tags={"data_sha256": "d"})
    from internlm_lib.tracking.mlflow_replica import sync

    sync(RunFolder.of("gpu", home))
    from mlflow import MlflowClient

    uri = f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment = client.search_experiments(filter_string="name != 'Default'")[0]
    kit_run = next(
        run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == "gpu"
    )
    code, result, said = compare(
        "--reference", kit_run.info.run_id, "--candidate", "npu", "--tracking-uri", uri
    )
    assert (code, result["verdict"]) == (0, "pass"), said
    assert result["performance"]["reference"]["device"] == "A100"
    assert not any("on trust" in r and "data_sha256" in r for r in result["reasons"])


def test_a_comparison_is_neither_trained_nor_overwritten_by_a_training(home):
    write_run(home, "gpu", losses())
    write_run(home, "npu", losses())
    compare("--reference", "gpu", "--candidate", "npu", "--run-name", "both")
    path = RunFolder.of("both", home).experiment
    with pytest.raises(InputError, match="this run is a comparison; it cannot be trained"):
        load_experiment(path)
    _, experiment = load_experiment(TINY)
    with pytest.raises(InputError, match="is a comparison; give another --run-name"):
        save_experiment(path, "both", experiment)
