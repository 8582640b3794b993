"""The collectives' checks where nothing is exchanged: every one must notice."""

import pytest

from internlm_lib.devices.cpu import CpuDevice
from internlm_lib.devices.meta import pretend_to_be
from internlm_lib.selftest.checks import Row, carry_out
from internlm_lib.selftest.collectives import COLLECTIVES, collective_checks
from tests.unit.selftest.small import SIZES


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Of rank 0 of two, in a job whose collectives return at once and do nothing."""
    with pretend_to_be(rank=0, world_size=2):
        return [carry_out(check, 0) for check in collective_checks(CpuDevice(), SIZES)]


def test_there_is_one_of_each_kind_and_dtype(rows: list[Row]) -> None:
    assert len({row.name for row in rows}) == len(rows) == 2 * len(COLLECTIVES)


def test_what_does_not_arrive_is_noticed(rows: list[Row]) -> None:
    assert [row.name for row in rows if row.passed] == []
    assert all(row.figure for row in rows if not row.error)
