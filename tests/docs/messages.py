"""The messages that the library can show, read from its source: `…` stands for what is filled in."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "fastattn"
HOLE = "…"


def messages() -> Iterator[tuple[str, str]]:
    """(where, message) of each raised error and each warning: `dispatch.py:123`, `mask: expected …`."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(SOURCE).as_posix()
        for scope in _scopes(tree):
            names = _assigned(scope)
            for node in _own(scope):
                call = _message_call(node)
                if call is not None and call.args:
                    cause = f": {HOLE}" if _name(call.func) == "blame" else ""  # it adds what went wrong
                    for text in _texts(call.args[0], names):
                        yield f"{name}:{node.lineno}", text + cause


def _scopes(tree: ast.AST) -> Iterator[ast.AST]:
    yield tree
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _own(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions inside it."""
    queue = list(ast.iter_child_nodes(scope))
    while queue:
        node = queue.pop(0)
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            queue += ast.iter_child_nodes(node)


def _assigned(scope: ast.AST) -> dict[str, ast.expr]:
    """What names stand for: the last plain assignment of each."""
    return {
        node.targets[0].id: node.value
        for node in _own(scope)
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
    }


def _message_call(node: ast.AST) -> ast.Call | None:
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return node.exc
    if isinstance(node, ast.Call):
        name = _name(node.func)
        if name in ("warn_once", "warn", "complain", "blame") or name.endswith("Error"):  # made here, raised elsewhere
            return node
    return None


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _texts(node: ast.expr, names: dict[str, ast.expr], depth: int = 0) -> list[str]:
    """Every text that an expression can give, as far as the source says; `…` where it does not."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        found = [""]
        for part in node.values:
            texts = (
                _texts(part.value, names, depth + 1) if isinstance(part, ast.FormattedValue) else _texts(part, names)
            )
            texts = texts if len(texts) * len(found) <= 16 else [HOLE]
            found = [before + after for before in found for after in texts]
        return [_squeezed(text) for text in found]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [_squeezed(a + b) for a in _texts(node.left, names, depth) for b in _texts(node.right, names, depth)]
    if isinstance(node, ast.IfExp):
        return _texts(node.body, names, depth) + _texts(node.orelse, names, depth)
    if isinstance(node, ast.Name) and node.id in names and depth < 3:
        return _texts(names[node.id], {k: v for k, v in names.items() if k != node.id}, depth + 1)
    return [HOLE]


def _squeezed(text: str) -> str:
    while HOLE * 2 in text:
        text = text.replace(HOLE * 2, HOLE)
    return text
