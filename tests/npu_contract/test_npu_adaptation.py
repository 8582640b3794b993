"""megatron-core and DeepSpeed adapted to the NPU, in a process with the real torch_npu."""

from collections.abc import Callable
from typing import Any

import pytest

from internlm_lib.devices import npu_megatron


def test_what_is_adapted_is_in_place(part: Callable[[str], dict[str, Any]]) -> None:
    checks = part("adaptation")
    assert len(checks) >= 12
    assert "".join(checks.values()) == "", "\n\n".join(filter(None, checks.values()))


def test_megatron_must_not_be_imported_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core  # noqa: F401

    monkeypatch.setenv("DS_ACCELERATOR", "npu")
    with pytest.raises(RuntimeError, match="was imported before .*transfer_to_npu"):
        npu_megatron.adapt()
