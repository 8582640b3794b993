"""The command line: one JSON object on stdout, errors that help, exit codes."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner, Result

from internlm_lib import doctor
from internlm_lib.cli import app
from internlm_lib.errors import NotComparableError, VerdictError, WorkerError
from internlm_lib.experiment.load import load_experiment
from internlm_lib.files import read_json
from internlm_lib.run_folder import RunFolder
from internlm_lib.stages.stage import begin_stage, status_path


@pytest.fixture(autouse=True)
def no_mirroring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNLM_TAIL", "tiny")


def internlm(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_an_unknown_key_is_bad_input_with_the_nearest_name(home: Path) -> None:
    result = internlm("run", "params/tiny.yaml", "--set", "training.train_itres=3")
    assert result.exit_code == 2
    assert "training.train_itres: unknown key; did you mean train_iters?" in result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert not (home / "runs").exists()


def test_all_problems_are_told_at_once_and_as_json(home: Path) -> None:
    settings = ["training.lr=fast", "training.global_batch_size=17", "model.head=1"]
    arguments = [word for setting in settings for word in ("--set", setting)]
    result = internlm("train", "params/tiny.yaml", *arguments, "--json")
    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["exit_code"], error["kind"]) == (2, 2, "ConfigError")
    assert all(key.partition("=")[0] in error["message"] for key in settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "params/big.yaml"), "in params/ there are: "),
        (("run", "params/tiny.yaml", "--set", "training.lr"), "expected KEY=VALUE"),
        (("run", "params/tiny.yaml", "--run-name", "a/b"), "run_name = 'a/b'"),
        (("run", "params/tiny.yaml", "--from", "3_train"), "did you mean 03_train?"),
        (("run", "params/tiny.yaml", "--set", "data.train_path=a.json"), "leave the stage out"),
        (("sync", "nothing"), "no such run"),
        (("frobnicate",), "No such command"),
    ],
)
def test_bad_input_ends_with_code_2(home: Path, arguments: tuple[str, ...], message: str) -> None:
    result = internlm(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, work) -> None:
    """Put a module in the place of `internlm_lib.stages.<name>`."""
    module = ModuleType(name)
    module.run = work  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"internlm_lib.stages.{name}", module)


def test_a_stage_without_a_notebook(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(stage) -> dict:
        print("chatter of a library")
        assert stage.experiment.training.lr == 1e-5
        return {"documents": 7}

    stand_in(monkeypatch, "prepare", work)
    result = internlm("prepare", "params/tiny.yaml", "--set", "training.lr=1e-5",
                      "--set", "training.min_lr=0", "--json")  # fmt: skip
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert (record["run"], record["status"], record["result"]) == ("tiny", "done", {"documents": 7})
    assert "chatter" in result.stderr
    assert read_json(status_path(RunFolder.of("tiny"), "01_prepare"))["status"] == "done"


@pytest.mark.parametrize(
    ("error", "code"),
    [(WorkerError("rank 1"), 1), (VerdictError("fail"), 3), (NotComparableError("no"), 4)],
)
def test_errors_have_their_exit_codes(
    home: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def work(stage, show) -> dict:
        raise error

    stand_in(monkeypatch, "train", work)
    result = internlm("train", "params/tiny.yaml", "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout)["error"]["message"] == str(error)
    assert read_json(status_path(RunFolder.of("tiny"), "03_train"))["status"] == "failed"


def test_a_failed_verdict_keeps_its_numbers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = {
        "verdict": "fail", "mean_relative_error": 0.5, "reasons": ["0.5 is above"], "report": "x",
    }  # fmt: skip
    monkeypatch.setattr("internlm_lib.stages.compare.run", lambda stage: verdict)
    result = internlm("compare-stage", "params/tiny.yaml")
    assert result.exit_code == 3 and "0.5" in result.stderr
    record = read_json(status_path(RunFolder.of("tiny"), "04_compare"))
    assert record["status"] == "failed"
    assert record["result"]["mean_relative_error"] == 0.5


def test_run_prints_the_summary_alone_on_stdout(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(folder, stage, executed, parameters) -> None:
        print("papermill speaks")
        name, experiment = load_experiment(home / "params/tiny.yaml")
        begin_stage(stage, folder, experiment).finish({"accuracy": {"before": 0.2, "after": 0.7}})

    monkeypatch.setattr("internlm_lib.pipeline._papermill", execute)
    result = internlm("run", "params/tiny.yaml", "--only", "01_prepare,06_evaluate", "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert list(summary) == [
        "run", "stages", "reference", "candidate", "compare", "accuracy", "report",
    ]  # fmt: skip
    assert list(summary["stages"]) == ["01_prepare", "06_evaluate"]
    assert summary["accuracy"] == {"before": 0.2, "after": 0.7}
    assert set(summary["compare"]) == {
        "mean_relative_error", "max_relative_error", "max_absolute_error", "verdict",
    }  # fmt: skip
    assert (home / summary["report"]).exists()


def test_doctor_reports_findings_and_fails_if_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [doctor.Finding("python", "ok", "3.11"), doctor.Finding("npu", "warn", "x", "y")]
    asked: list[str | None] = []
    monkeypatch.setattr(doctor, "examine", lambda device: asked.append(device) or findings)
    result = internlm("doctor", "--json", "--device", "npu")
    assert result.exit_code == 0 and asked == ["npu"]
    assert json.loads(result.stdout)["findings"][1] == {
        "name": "npu", "status": "warn", "found": "x", "fix": "y",
    }  # fmt: skip
    findings.append(doctor.Finding("kernel", "fail", "none", "make env"))
    result = internlm("doctor")
    assert result.exit_code == 1 and "make env" in result.stdout and asked == ["npu", None]


def test_doctor_knows_no_other_device() -> None:
    result = internlm("doctor", "--device", "tpu")
    assert result.exit_code == 2 and "--device tpu: give one of npu, cuda, cpu" in result.stderr


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A Hugging Face folder of the tiny model."""
    from internlm_lib.experiment.presets import PRESETS
    from internlm_lib.experiment.schema import ModelSection
    from internlm_lib.weights.initial import write_random

    model = ModelSection(**PRESETS["internlm-tiny"], preset="internlm-tiny")
    return write_random(tmp_path / "source", model, 1, "bf16")


def test_convert_prints_one_object_and_verify_agrees(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "classic"
    layout = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    done = internlm("convert", str(checkpoint), str(target), "--to", "classic", *layout, "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result) == [
        "from", "to", "tensors", "bytes", "seconds", "peak_rss_mib", "tensor_hash",
    ]  # fmt: skip
    assert (result["from"], result["to"], result["tensors"]) == ("huggingface", "classic", 29)
    reports = [
        json.loads(internlm("verify", str(p), "--json").stdout) for p in (target, checkpoint)
    ]
    assert [report["tensor_hash"] for report in reports] == [result["tensor_hash"]] * 2
    assert [report["manifest"] for report in reports] == [True, False]


def test_verify_ends_with_1_and_names_what_is_damaged(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    internlm("convert", str(checkpoint), str(target), "--to", "huggingface")
    file = target / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    result = internlm("verify", str(tmp_path), "--json")
    assert result.exit_code == 1
    reports = json.loads(result.stdout)["checkpoints"]
    assert reports[str(target)]["damaged_tensors"] == ["lm_head.weight"]
    assert reports[str(checkpoint)]["ok"]


def test_a_dry_run_plans_and_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "planned"
    words = ("--to", "deepspeed", "--num-layer-list", "1,1", "--dry-run", "--json")
    result = internlm("convert", str(checkpoint), str(target), *words)
    planned = json.loads(result.stdout)
    assert [file["file"] for file in planned["files"]] == [
        f"release/mp_rank_{rank:02}_model_states.pt" for rank in (0, 1)
    ]
    assert planned["bytes"] == sum(file["bytes"] for file in planned["files"])
    assert not target.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "tar"), "choose one of huggingface, megatron, classic, deepspeed"),
        (("--to", "classic", "--dtype", "int8"), "--dtype 'int8': choose one of"),
        (("--to", "classic", "--num-layer-list", "1;1"), "give numbers like 20,22,22,16"),
        (("--to", "classic", "--model", "internlm-8b"), "give one of internlm-7b"),
        (("--to", "classic", "--model", "internlm-7b"), "num_hidden_layers = 2, but"),
        (
            ("--to", "classic", "--tensor-model-parallel-size", "3"),
            "does not divide num_attention_heads",
        ),
    ],
)
def test_a_conversion_that_cannot_be_is_refused(
    words: tuple[str, ...], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    result = internlm("convert", str(checkpoint), str(tmp_path / "target"), *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
