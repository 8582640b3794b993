"""Which points of megatron-core reach CUDA, read from its source.

A point is an expression that means a CUDA device, NCCL or a package made for CUDA. It is named as
the source has it: `torch.cuda.Stream`, `.cuda`, `torch.zeros(device="cuda")`,
`== "torch.cuda.FloatTensor"`, `import triton`. Annotations, docstrings and messages are no points.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_CUDA_NAME = re.compile(r"cuda|cudnn|nccl|nvtx", re.IGNORECASE)
_TENSOR_TYPE = re.compile(r"torch\.cuda\.\w+Tensor")
_ENVIRONMENT = re.compile(r"(CUDA|CUDNN|NCCL|TORCH_NCCL)_[A-Z0-9_]+")
_ON_EVERY_DEVICE = {
    "boto3", "botocore", "einops", "megatron", "multistorageclient", "numpy", "packaging", "psutil",
    "torch", "tqdm", "wandb", "yaml", *sys.stdlib_module_names,
}  # fmt: skip
"""Packages whose import is no point. Any other may be made for CUDA, and wants an answer."""

AT_IMPORT = "<import>"
"""Stands for a function's name where none is needed: what a module or class does at once."""

Points = dict[str, Counter[str]]
"""What is reached: how often in which function, named `module:qualified name`."""


def scan(sources: dict[str, Path]) -> Points:
    """The points of modules, given by their names and files."""
    points: Points = {}
    for module, path in sources.items():
        reader = _Reader(module)
        reader.visit(ast.parse(path.read_text(encoding="utf-8")))
        for what, place in reader.found:
            points.setdefault(what, Counter())[place] += 1
    return points


@dataclass
class _Reader(ast.NodeVisitor):
    module: str
    found: list[tuple[str, str]] = field(default_factory=list)
    scopes: list[str] = field(default_factory=list)
    in_function: bool = False
    aliases: dict[str, str] = field(default_factory=dict)
    """What names of the module mean that it imported from torch, or as another name."""

    def note(self, what: str) -> None:
        place = ".".join(self.scopes) if self.in_function else AT_IMPORT
        self.found.append((what, f"{self.module}:{place}"))

    # Scopes. Decorators, bases and defaults are computed outside of what they belong to.

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_all([*node.decorator_list, *node.bases, *node.keywords])
        self._body(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._visit_all([*node.decorator_list, node.args])
        outer, self.in_function = self.in_function, True
        self._body(node)
        self.in_function = outer

    visit_AsyncFunctionDef = visit_FunctionDef

    def _body(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.scopes.append(node.name)
        self._visit_all(node.body)
        self.scopes.pop()

    def _visit_all(self, nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)

    # Annotations are looked up at most: no points.

    def visit_arg(self, node: ast.arg) -> None: ...

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    # Imports

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._import(alias.name, f"import {alias.name}")
            if alias.asname:
                self.aliases[alias.asname] = alias.name

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or not node.module:
            return
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            self._import(name, f"from {node.module} import {alias.name}")
            if node.module.partition(".")[0] == "torch":
                self.aliases[alias.asname or alias.name] = name

    def _import(self, name: str, written: str) -> None:
        package = name.partition(".")[0]
        if package == "torch" and _CUDA_NAME.search(name):
            self.note(written)
        elif package not in _ON_EVERY_DEVICE:
            self.note(f"import {package}")

    # Names

    def visit_Name(self, node: ast.Name) -> None:
        self._torch_name(self.aliases.get(node.id, node.id))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self._torch_name(self._chain(node)):
            return
        if node.attr in ("cuda", "is_cuda"):
            self.note(f".{node.attr}")
        self.visit(node.value)

    def _torch_name(self, chain: str | None) -> bool:
        found = bool(chain and chain.startswith("torch.") and _CUDA_NAME.search(chain))
        if chain and found:
            self.note(chain)
        return found

    def _chain(self, node: ast.expr) -> str | None:
        """`a.b.c` of names alone, with what `a` was imported as."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, node.id)
        if isinstance(node, ast.Attribute) and (before := self._chain(node.value)):
            return f"{before}.{node.attr}"
        return None

    # Strings, with what they are given to or compared with

    def visit_Call(self, node: ast.Call) -> None:
        self.visit(node.func)
        callee = self._callee(node.func)
        for argument in node.args:
            self._value(argument, f"{callee}(", ")")
        for keyword in node.keywords:
            self._value(keyword.value, f"{callee}({keyword.arg}=", ")")

    def _callee(self, node: ast.expr) -> str:
        """Of a method its name alone: what it is a method of is called anything."""
        chain = self._chain(node)
        if chain and (chain.startswith("torch.") or "." not in chain):
            return chain
        return f".{node.attr}" if isinstance(node, ast.Attribute) else "…"

    def visit_Compare(self, node: ast.Compare) -> None:
        for side in (node.left, *node.comparators):
            several = isinstance(side, (ast.Tuple, ast.List, ast.Set))
            for value in side.elts if several else [side]:
                self._value(value, "== ")

    def visit_arguments(self, node: ast.arguments) -> None:
        positional = [*node.posonlyargs, *node.args]
        first = len(positional) - len(node.defaults)
        arguments = [*positional[first:], *node.kwonlyargs]
        for name, default in zip(arguments, [*node.defaults, *node.kw_defaults], strict=True):
            if default:
                self._value(default, f"def ({name.arg}=", ")")

    def visit_Constant(self, node: ast.Constant | ast.JoinedStr) -> None:
        self._value(node, "")

    visit_JoinedStr = visit_Constant

    def _value(self, node: ast.expr, before: str, after: str = "") -> None:
        if isinstance(node, ast.IfExp):
            self.visit(node.test)
            self._value(node.body, before, after)
            self._value(node.orelse, before, after)
        elif (text := _text(node)) is None:
            self.visit(node)
        elif _means_cuda(text):
            self.note(f'{before}"{text}"{after}')
        elif isinstance(node, ast.JoinedStr):
            self._visit_all(
                part.value for part in node.values if isinstance(part, ast.FormattedValue)
            )


def _text(node: ast.expr) -> str | None:
    """A string; of a formatted one with `{}` where values come."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            _text(part) or "" if isinstance(part, ast.Constant) else "{}" for part in node.values
        )
    return None


def _means_cuda(text: str) -> bool:
    """Whether it is a device, a backend or a tensor type; not whether it tells of one."""
    if _TENSOR_TYPE.fullmatch(text) or _ENVIRONMENT.fullmatch(text):
        return True
    return " " not in text and not {"cuda", "nccl"}.isdisjoint(re.split("[:,]", text))
