"""What stands in the YAML files: sources, dates, no stray keys, and errors that say where."""

from pathlib import Path

import pytest

from internlm_lib.errors import ConfigError, InputError
from internlm_lib.published import loss_claims, throughput_row, throughput_rows
from internlm_lib.published.tables import UNKNOWN, read_throughput

TABLE = """
- table: t
  source: a page
  date: "2024-01-01"
  headers: {tokens_per_second_per_device: TGS}
  common: {system: s, device: null, devices: 8, model: internlm-7b, seq_length: 2048,
           global_batch_size: null, micro_batch_size: null, precision: bf16, recompute: none}
  rows:
    - {name: a, printed: {tokens_per_second_per_device: "4078"}}
"""


def test_every_row_has_a_source_and_a_date_or_says_unknown() -> None:
    for row in throughput_rows():
        assert len(row.source) > 20, row.name
        assert row.date == UNKNOWN or row.date[:2] == "20", row.name
    (claim,) = loss_claims()
    assert claim.date == "2023-10-13"
    assert (claim.mean_relative_error, claim.max_relative_error) == (0.007, 0.09)
    assert (claim.max_absolute_error, claim.mean_relative_error_allowed) == (0.4859, 0.02)


def test_cells_are_kept_as_printed_with_their_headers() -> None:
    row = throughput_row("7b-npu-2023-11")
    assert row.printed["samples_per_second_per_device"] == "13.000"
    assert row.headers["samples_per_second_per_device"] == "throughput rate (samples/s/p)"
    assert (row.devices, row.global_batch_size, row.micro_batch_size) == (8, 256, 2)


def test_a_row_overrides_what_its_table_shares(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(TABLE.replace("{name: a,", "{name: a, devices: 16,"))
    assert read_throughput(path)[0].devices == 16


@pytest.mark.parametrize(
    ("found", "wrong", "message"),
    [
        ("name: a,", "name: a, colour: red,", "a.colour: Extra inputs are not permitted"),
        ('"4078"', "4078", "a.printed.tokens_per_second_per_device: Input should be a valid str"),
        ('"4078"', '"about 4078"', "String should match pattern"),
        ("devices: 8", "devices: 0", "a.devices: Input should be greater than 0"),
        ("  source: a page\n", "", "a.source: Field required"),
        ("recompute: none", "recompute: no", "a.recompute: Input should be"),
        ("tokens_per_second_per_device: TGS", "mfu_percent: MFU", "no header for tokens_per"),
        ("name: a,", "name: a, reference: b,", "a.reference: no row is called b"),
        ("  rows:\n", '  rows:\n    - {name: a, printed: {tokens_per_second_per_device: "1"}}\n',
         "a: used twice"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused(tmp_path: Path, found: str, wrong: str, message: str) -> None:
    assert found in TABLE
    path = tmp_path / "t.yaml"
    path.write_text(TABLE.replace(found, wrong))
    with pytest.raises(ConfigError, match=message):
        read_throughput(path)


def test_an_unknown_row_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(InputError, match="'8b': there is none; known are 7b-npu-2023-10"):
        throughput_row("8b")
