"""Every place where the kit names something of torch_npu, found in its source."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "internlm_lib"


@dataclass(frozen=True)
class Call:
    """`torch_npu.NAME(…)`."""

    where: str
    name: str
    positional: int
    keywords: tuple[str, ...]


def operator_calls() -> list[Call]:
    """Calls of what the wheel registers as operators, `torch_npu.npu_…`."""
    return [
        Call(where, node.func.attr, len(node.args), tuple(k.arg or "**" for k in node.keywords))
        for where, node in _nodes()
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch_npu"
        and node.func.attr.startswith("npu_")
    ]


def dotted_names() -> dict[str, str]:
    """All of `torch_npu.…` and `torch.npu.…` that the source spells out → where."""
    names = {}
    for where, node in _nodes():
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.startswith(("torch_npu.", "torch.npu.")) and "(" not in name:
                names[name] = where
    return names


def _nodes() -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}", node
