"""What tests of datasets need."""

import pytest


@pytest.fixture(scope="session")
def megatron_on_cpu() -> None:
    """megatron-core adapted to this machine, before anything of it is imported."""
    from internlm_lib.devices import select_device

    select_device("cpu").adapt_megatron()
