"""Faults that a kernel for the NPU could have, as changes of its source text.

They stand in `mutations.yaml`. A change that no longer applies, because the source moved on, is an
error: the list stays true.
"""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import yaml

KERNELS = Path(__file__).resolve().parents[2] / "internlm_lib" / "kernels"


@dataclass(frozen=True)
class Mutation:
    what: str
    module: str
    """Of `internlm_lib.kernels`."""
    old: str
    new: str

    def source(self) -> str:
        """The module's text with the fault. Raises ValueError if the text to change is not there
        exactly once."""
        text = (KERNELS / f"{self.module}.py").read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.what}: {self.old!r} is {text.count(self.old)} times in {self.module}.py"
            )
        return text.replace(self.old, self.new)


def _read() -> tuple[Mutation, ...]:
    by_module = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return tuple(
        Mutation(module=module, **entry)
        for module, entries in by_module.items()
        for entry in entries
    )


MUTATIONS = _read()


@contextlib.contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """For the block, the NPU's kernels are those of the changed source."""
    from internlm_lib import kernels

    module = ModuleType(f"internlm_lib.kernels.{mutation.module}")
    exec(compile(mutation.source(), mutation.what, "exec"), vars(module))
    field = "rms_norm" if mutation.module == "rmsnorm" else mutation.module
    table = kernels._OF_DEVICE
    before = table["npu"]
    assert getattr(before, field) is importlib.import_module(module.__name__).on_npu
    table["npu"] = dataclasses.replace(before, **{field: module.on_npu})  # type: ignore[index]
    try:
        yield
    finally:
        table["npu"] = before  # type: ignore[index]
