"""What a rank checks before it trains."""

from types import SimpleNamespace

import pytest

from internlm_lib.errors import InputError
from internlm_lib.training import agreement
from internlm_lib.training.worker import _order_sha256


def test_a_rank_that_reads_other_data_than_the_first_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = SimpleNamespace(order_sha256="a" * 64)
    monkeypatch.setattr(agreement, "from_rank_zero", lambda work: work())
    assert _order_sha256(data) == "a" * 64
    monkeypatch.setattr(agreement, "from_rank_zero", lambda work: "b" * 64)
    with pytest.raises(InputError, match="other data than the first one.*one shared file system"):
        _order_sha256(data)
