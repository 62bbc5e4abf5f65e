"""Code outside `_compat/` touches no name that another library keeps to itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastattn

ROOT = Path(fastattn.__file__).parent
ROOM = ROOT / "_compat"

#: Names with an underscore that their libraries document, or whose absence is provided for where they are used.
ALLOWED = {
    **dict.fromkeys(("_replace", "_fields", "_asdict"), "documented for named tuples"),
    "_getframe": "documented by sys",
    "_exit": "documented by os",
    "_to_copy": "an ATen operator",
    "_data": "of os.environ, asked with getattr and done without where it is not there",
}
GLUON = "triton.experimental.gluon"  #: a language for kernels, as triton.language is
#: Libraries of whose modules only these are imported elsewhere; of transformers only what it exports at the top.
PUBLIC = {
    "transformers": ("transformers",),
    "triton": (
        "triton",
        "triton.language",
        "triton.experimental",
        GLUON,
        f"{GLUON}.language",
        f"{GLUON}.language.nvidia.hopper",
    ),
    "cudnn": ("cudnn",),
    "liger_kernel": (),
}


def sources() -> dict[Path, ast.Module]:
    return {p: ast.parse(p.read_text(encoding="utf-8")) for p in ROOT.rglob("*.py") if ROOM not in p.parents}


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def own_names(tree: ast.Module) -> Iterator[str]:
    """Names that a module defines, as anything."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr


def touched(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names with an underscore that are read or set on something, or imported from elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            name = node.args[1]
            if node.func.id in ("getattr", "hasattr", "setattr", "delattr") and isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, alias.name) for alias in node.names)


def modules(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Modules of other libraries that are imported: also by name, or within another module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith("import_module"):
            found = node.args[0]
            if isinstance(found, ast.JoinedStr) and found.values:
                found = found.values[0]
            if isinstance(found, ast.Constant) and not str(found.value).startswith("."):
                yield node.lineno, str(found.value)


def faults(trees: dict[Path, ast.Module]) -> list[str]:
    own = {name for tree in trees.values() for name in own_names(tree)} | ALLOWED.keys()
    found = []
    for path, tree in trees.items():
        for line, name in touched(tree):
            if is_private(name) and name not in own:
                found.append(f"{path.name}:{line}: {name}")
        for line, name in modules(tree):
            library, *rest = name.split(".")
            hidden = library != "fastattn" and any(is_private(part) for part in rest)
            if hidden or (library in PUBLIC and name not in PUBLIC[library]):
                found.append(f"{path.name}:{line}: {name}")
    return found


def test_nothing_private_elsewhere() -> None:
    assert faults(sources()) == []


@pytest.mark.parametrize(
    "text, name",
    [
        ("import torch\ntorch._C._cuda_getDevice()", "_cuda_getDevice"),
        ("import torch\nuse(torch._dynamo)", "_dynamo"),
        ("model._supports_sdpa", "_supports_sdpa"),
        ("config._attn_implementation = None", "_attn_implementation"),
        ("getattr(model, '_tp_size', None)", "_tp_size"),
        ("from torch._dynamo import config", "torch._dynamo"),
        ("import torch._inductor.config", "torch._inductor.config"),
        ("from torch import _utils", "_utils"),
        ("from transformers.masking_utils import sdpa_mask", "transformers.masking_utils"),
        ("import_module(f'transformers.models.{x}')", "transformers.models."),
        ("importlib.import_module('liger_kernel.ops')", "liger_kernel.ops"),
        ("from triton.runtime.jit import JITFunction", "triton.runtime.jit"),
    ],
)
def test_it_would_be_noticed(text: str, name: str) -> None:
    assert any(fault.endswith(f": {name}") for fault in faults({Path("x.py"): ast.parse(text)}))
