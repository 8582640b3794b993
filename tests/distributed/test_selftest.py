"""`internlm selftest` as a person runs it, on two ranks of this CPU, into MLflow."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from internlm_lib.cli import app
from internlm_lib.run_folder import RunFolder


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    root = tmp_path_factory.mktemp("selftest")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERNLM_HOME", str(root))
        result = CliRunner().invoke(app, ["selftest", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.stderr
    assert "checks passed on 2 × " in result.stderr
    return {"root": root, **json.loads(result.stdout)}


def test_every_check_has_its_figure_and_tolerance(printed: dict[str, object]) -> None:
    checks = printed["checks"]
    assert isinstance(checks, list) and printed["passed"] is True and printed["ranks"] == 2
    assert all(0 <= row["figure"] <= row["tolerance"] and row["passed"] for row in checks)
    groups = {row["group"] for row in checks}
    assert groups == {"kernels", "collectives", "memory", "rates", "parity"}
    assert all(row["unit"] and not row["error"] for row in checks)


def test_rates_and_losses_were_measured(printed: dict[str, object]) -> None:
    measured = {row["name"]: row["measured"] for row in printed["checks"]}  # type: ignore[attr-defined]
    assert measured["matrix product, fp32"]["TFLOPs"] > 0
    assert measured["copy of device memory"]["GB/s"] > 0
    assert measured["all-reduce, bf16"]["bus GB/s"] > 0
    (losses,) = (row for name, row in measured.items() if ", loss, fp32" in name)
    assert losses["first"] > losses["last"] + 1


def test_the_table_lies_in_the_report_and_in_mlflow(printed: dict[str, object]) -> None:
    from mlflow import MlflowClient

    from internlm_lib.tracking.mlflow_store import store_uri

    root = printed["root"]
    assert isinstance(root, Path)
    folder = RunFolder.of("selftest-cpu", root)
    table = folder.tables / "selftest.csv"
    assert len(table.read_text().splitlines()) == 1 + len(printed["checks"])  # type: ignore[arg-type]
    client = MlflowClient(tracking_uri=store_uri(root, None))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, "tags.stage = 'selftest'")
    assert run.data.tags["passed"] == "True" and run.info.status == "FINISHED"
    assert "selftest/rates/matrix_product_fp32_TFLOPs" in run.data.metrics
