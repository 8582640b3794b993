"""Published rows computed again: by hand here, by the library there; every known contradiction."""

import json

import pytest
from typer.testing import CliRunner

from internlm_lib.cli import app
from internlm_lib.errors import InputError
from internlm_lib.experiment.presets import PRESETS
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.model.arithmetic import internevo_flops_per_token, tflops_per_device
from internlm_lib.published import PublishedRow, throughput_row, throughput_rows
from internlm_lib.published.tables import COLUMNS, UNKNOWN
from internlm_lib.reporting.published import FORMULAS, MODEL_FORMULAS, published_table, rederive
from internlm_lib.reporting.readings import Contradiction, half_digit, units_of

MODELS = {name: ModelSection(**shape, preset=name) for name, shape in PRESETS.items()}


def contradiction(row: str, column: str) -> Contradiction:
    (found,) = [c for c in rederive(throughput_row(row)).contradictions if c.column == column]
    return found


def test_the_columns_of_the_7b_row_by_hand() -> None:
    derived = rederive(throughput_row("7b-npu-2023-11")).derived
    assert derived["tokens_per_second_per_device"] == 13 * 2048 / 8 == 3328
    assert derived["seconds_per_step"] == pytest.approx(256 / 13) == pytest.approx(19.692, abs=1e-3)
    assert derived["samples_per_second"] == 13 and derived["samples_per_second_per_device"] == 1.625
    assert derived["tokens_per_second"] == 8 * 3328


@pytest.mark.parametrize(
    ("model", "batch", "devices", "seconds", "tflops"),
    [("internlm-7b", 256, 8, 19.6846, 145.75), ("internlm-65b", 128, 32, 24.0, 138.7)],
)
def test_the_predecessors_formula_by_hand(
    model: str, batch: int, devices: int, seconds: float, tflops: float
) -> None:
    """24·c·B·s·L·h²·(1 + s/6h + V/16Lh) / (t · devices), with c = 3 and V = 103168."""
    shape = MODELS[model]
    h, layers = shape.hidden_size, shape.num_layers
    terms = 1 + 2048 / (6 * h) + 103168 / (16 * layers * h)
    by_hand = 24 * 3 * batch * 2048 * layers * h**2 * terms / (seconds * devices * 1e12)
    speed = batch * 2048 / devices / seconds
    assert by_hand == pytest.approx(tflops, abs=0.05)
    computed = tflops_per_device(speed, FORMULAS["AscendSpeed"](shape, 2048))
    assert computed == pytest.approx(by_hand)


def test_internevos_counter() -> None:
    assert internevo_flops_per_token(MODELS["internlm-7b"], 2048) == 44_411_387_904
    assert internevo_flops_per_token(MODELS["internlm-65b"], 2048) == 407_724_097_536
    assert FORMULAS["AscendSpeed, full recompute"](MODELS["internlm-7b"], 2048) == pytest.approx(
        58_370_031_616
    )


def test_ratios_to_the_reference() -> None:
    assert rederive(throughput_row("7b-npu-2023-11")).ratio_to_reference == pytest.approx(
        0.816, abs=5e-4
    )
    assert rederive(throughput_row("65b-npu-2023-12")).ratio_to_reference == pytest.approx(
        0.826, abs=5e-4
    )
    assert rederive(throughput_row("7b-reference-2023-11")).ratio_to_reference is None


def test_mfu_needs_a_device_that_is_known() -> None:
    (a100,) = rederive(throughput_row("internevo-no-recompute-8")).mfu
    assert a100["mfu"]["InternEvo"] == pytest.approx(0.584, abs=5e-4)
    assert a100["mfu"].keys() == set(MODEL_FORMULAS)
    npus = rederive(throughput_row("7b-npu-2023-11")).mfu
    assert [entry["peak"]["tflops"] for entry in npus] == [280, 313, 376, 414]
    printed = [entry["mfu"]["AscendSpeed"] for entry in npus]
    assert printed == pytest.approx([0.52, 0.47, 0.39, 0.35], abs=5e-3)
    assert rederive(throughput_row("7b-reference-2023-10")).mfu == []


@pytest.mark.parametrize(
    ("row", "convention", "error"),
    [
        ("7b-npu-2023-11", "AscendSpeed", 0.0001),
        ("7b-npu-2023-10", "AscendSpeed, full recompute", 0.006),
        ("65b-npu-2023-12", "6N + causal attention", 0.004),
        ("internevo-full-recompute-8", "AscendSpeed, full recompute", 0.003),
        ("internevo-no-recompute-512", "InternEvo", 0.002),
        ("llama2-7b-npu-2024-04", "6N + full attention", 0.001),
    ],
)
def test_the_convention_that_fits_best(row: str, convention: str, error: float) -> None:
    best = rederive(throughput_row(row)).best_convention
    assert best is not None and best.convention == convention
    assert abs(best.error) < error


@pytest.mark.parametrize(
    ("row", "column", "kind", "fits", "why"),
    [
        ("7b-npu-2023-11", "samples_per_second_per_device", "unit", 1.625, "of the cluster"),
        ("7b-npu-2023-11", "seconds_per_step", "unit", 19.692, "milliseconds"),
        ("7b-npu-2023-12", "tokens_per_second_per_device", "value", 3328, "3328"),
        ("7b-npu-2023-12", "samples_per_second_per_device", "unit", 1.625, "of the cluster"),
        ("7b-npu-2023-12", "seconds_per_step", "unit", 19.692, "milliseconds"),
        ("7b-npu-2023-10", "samples_per_second_per_device", "digits", 1.35596, "-0.07%"),
        ("7b-reference-2023-10", "tflops_per_device", "value", 160.69, "at 2717.1"),
        ("65b-npu-2023-12", "samples_per_second_per_device", "unit", 0.16699, "of the cluster"),
        ("65b-npu-2024-02", "seconds_per_step", "unit", 48.762, "for 128 sequences"),
        ("llama2-7b-npu-2024-04", "tokens_per_second_per_device", "value", 2657.3, "2657.3"),
        ("internevo-summary-8", "tflops_per_device", "value", 181.11, "InternEvo"),
        ("internevo-full-recompute-32", "tflops_per_device", "value", 193.96, "at 3220.8"),
    ],
)
def test_each_contradiction_is_found_with_what_fits(
    row: str, column: str, kind: str, fits: float, why: str
) -> None:
    found = contradiction(row, column)
    assert found.kind == kind and why in found.why
    assert found.fits == pytest.approx(fits, rel=1e-4)


@pytest.mark.parametrize(
    "row", ["7b-npu-2024-03", "7b-reference-2023-11", "mpt-7b-a100", "internevo-no-recompute-8"]
)
def test_rows_that_hold_have_no_contradiction(row: str) -> None:
    assert rederive(throughput_row(row)).contradictions == []


def test_the_number_of_contradictions_by_table() -> None:
    """A change of a tolerance or a row shows here."""
    counts: dict[str, int] = {}
    for row in throughput_rows():
        counts[row.table] = counts.get(row.table, 0) + len(rederive(row).contradictions)
    assert {table: count for table, count in counts.items() if count} == {
        "ascendspeed-2023-10": 2, "ascendspeed-2023-11": 2, "mindspeed-llm-2023-12": 3,
        "ascendspeed-65b-2023-12": 1, "mindspeed-llm-7b-2024": 2, "mindspeed-llm-65b-2024": 3,
        "internevo-summary": 8, "internevo-full-recompute": 3, "internevo-no-recompute": 3,
        "llm-foundry": 1, "mindspeed-llm-llama2": 3,
    }  # fmt: skip


def test_the_publishers_conventions_and_models_are_known() -> None:
    for row in throughput_rows():
        assert row.flops_convention == UNKNOWN or row.flops_convention in FORMULAS
        assert not row.model.startswith("internlm") or row.model in PRESETS


def a_row(printed: dict[str, str], devices: int, batch: int) -> PublishedRow:
    template = throughput_row("7b-npu-2023-11")
    return PublishedRow(
        **template.model_dump() | {
            "devices": devices, "global_batch_size": batch, "printed": printed,
            "headers": {column: "header" for column in printed},
        }
    )  # fmt: skip


@pytest.mark.parametrize("devices", [2, 8, 64, 1024])
@pytest.mark.parametrize("batch", [64, 256, 1000])
@pytest.mark.parametrize("speed", [51.7, 342, 2776.95, 3328, 4999.99])
def test_a_consistent_row_of_any_speed_has_no_contradiction(
    speed: float, devices: int, batch: int
) -> None:
    blank = a_row({"tokens_per_second": "1"}, devices, batch)
    columns = [column for column in COLUMNS if units_of(column, blank)]
    cells = {c: f"{units_of(c, blank)[0].value(speed):.9f}" for c in columns}
    found = rederive(a_row(cells, devices, batch))
    assert len(cells) == 5 and found.contradictions == []
    assert found.derived["tokens_per_second_per_device"] == pytest.approx(speed, rel=1e-4)


def test_a_row_faster_than_its_device_is_refused() -> None:
    row = a_row({"tokens_per_second_per_device": "26624"}, 8, 256)
    on_a100 = row.model_copy(update={"device": "NVIDIA A100-SXM4-80GB"})
    with pytest.raises(InputError, match="MFU of 353.*cannot be above 100 %"):
        rederive(on_a100)


def test_half_of_the_last_digit() -> None:
    assert half_digit("13.000") == pytest.approx(0.0005)
    assert half_digit("3328") == 0.5 and half_digit("1.46e6") == 5000


def test_the_table_is_json_with_one_object_a_row() -> None:
    rows = json.loads(json.dumps(published_table()))
    assert len(rows) == len(throughput_rows())
    keys = {"name", "source", "date", "printed", "derived", "tflops", "contradictions", "mfu"}
    assert all(keys <= row.keys() for row in rows)


def test_the_command_as_json_and_as_a_table() -> None:
    result = CliRunner().invoke(app, ["published", "--json"])
    whole = json.loads(result.stdout)
    assert result.exit_code == 0 and whole.keys() == {"rows", "loss", "peaks"}
    assert {"device": "A100", "confirmed": True}.items() <= whole["peaks"][0].items()
    text = CliRunner().invoke(app, ["published"], env={"COLUMNS": "200"}).stdout
    assert "7b-npu-2023-12: 2943 tokens/s/device (value): the rest of its row gives 3328" in text
    assert "34.6%–51.1%?" in text and "mean relative error 0.007" in text
