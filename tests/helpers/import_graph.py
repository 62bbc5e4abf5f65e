"""Which file of a package imports which: read from the source, nothing is imported.

An import counts wherever it stands: at the top of a file, in a function, or by name through `import_module`. Three
rules need a word:

- `from package import name` is an import of the module that defines `name`, if the package looks it up lazily.
  `fastattn/__init__.py` does so with a table; what stands in that table is no import of the package itself.
- A computed name (`import_module(f".sweep_{name}", __package__)`) stands for each module that it can name: those that
  the file spells out in a string, or all that match if it spells out none.
- An import below `if TYPE_CHECKING:` counts as well. It is not executed, but a file that annotates an argument with
  a class of a higher layer relies on that class's methods as much as one that calls its constructor.

Importing `a.b.c` also runs `a/__init__.py` and `a/b/__init__.py`. That is not counted: each package whose `__init__`
re-exports something would be in a circle with its own modules.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_ANYTHING = r"([\w.]+)"  #: what a placeholder of an f-string may stand for


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    line: int


@dataclass(frozen=True)
class _File:
    name: str  #: dotted name of the module
    package: str  #: the package that `.` stands for in it
    tree: ast.Module


def read(root: Path) -> dict[str, list[Import]]:
    """Every module below the package directory `root`, by dotted name, with its imports of modules below `root`."""
    files = [_file(root, path) for path in sorted(root.rglob("*.py"))]
    names = {file.name for file in files}
    homes = {file.name: _lazy_names(file, names) for file in files}
    found = {}
    for file in files:
        edges = {
            Import(file.name, target, line)
            for line, asked in _imports(file, names)
            for target in _resolved(asked, names, homes)
            if target != file.name
        }
        found[file.name] = sorted(edges, key=lambda edge: (edge.line, edge.imported))
    return found


def lazy_names(root: Path) -> dict[str, str]:
    """The names that the package `root` looks up lazily, each with the module that defines it."""
    names = {_file(root, path).name for path in root.rglob("*.py")}
    return _lazy_names(_file(root, root / "__init__.py"), names)


def circles(graph: dict[str, list[Import]]) -> list[tuple[str, ...]]:
    """The groups of modules that each lead back to themselves (strongly connected components), sorted."""
    order: list[str] = []
    seen: set[str] = set()
    forward = {name: {edge.imported for edge in edges} for name, edges in graph.items()}
    backward: dict[str, set[str]] = {name: set() for name in graph}
    for name, targets in forward.items():
        for target in targets:
            backward[target].add(name)
    for name in forward:
        _visit(name, forward, seen, order)
    groups = []
    seen.clear()
    for name in reversed(order):  # Kosaraju: the second walk, against the arrows, stays within one component
        if name not in seen:
            group: list[str] = []
            _visit(name, backward, seen, group)
            if len(group) > 1:
                groups.append(tuple(sorted(group)))
    return sorted(groups)


def layer_of(module: str, layers: dict[str, int]) -> int | None:
    """The layer of the longest listed name that is `module` or a package around it."""
    while module:
        if module in layers:
            return layers[module]
        module = module.rpartition(".")[0]
    return None


def upward(graph: dict[str, list[Import]], layers: dict[str, int]) -> list[Import]:
    """The imports from a lower layer to a higher one. Modules without a layer are left out."""
    found = []
    for edges in graph.values():
        for edge in edges:
            low, high = layer_of(edge.importer, layers), layer_of(edge.imported, layers)
            if low is not None and high is not None and low < high:
                found.append(edge)
    return found


def _file(root: Path, path: Path) -> _File:
    parts = list(path.relative_to(root.parent).with_suffix("").parts)
    package = parts[:-1]
    if parts[-1] == "__init__":
        parts.pop()
    return _File(".".join(parts), ".".join(package), ast.parse(path.read_text(encoding="utf-8"), str(path)))


def _visit(start: str, edges: dict[str, set[str]], seen: set[str], finished: list[str]) -> None:
    """Depth first from `start`, without recursion; modules are appended when all they lead to are finished."""
    if start in seen:
        return
    seen.add(start)
    stack = [(start, iter(sorted(edges[start])))]
    while stack:
        name, rest = stack[-1]
        for target in rest:
            if target not in seen:
                seen.add(target)
                stack.append((target, iter(sorted(edges[target]))))
                break
        else:
            finished.append(name)
            stack.pop()


def _imports(file: _File, names: set[str]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that the file imports; the name may be that of something in a module."""
    lazy = _lazy_names(file, names)
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute("." * node.level + (node.module or ""), file.package)
            for alias in node.names:
                if alias.name not in lazy:  # the table's own annotations
                    yield node.lineno, base if alias.name == "*" else f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and not lazy:
            yield from ((node.lineno, name) for name in _by_name(node, file, names))


def _by_name(call: ast.Call, file: _File, names: set[str]) -> list[str]:
    """What a call of `import_module` or `__import__` may import."""
    if not call.args or ast.unparse(call.func).rpartition(".")[2] not in ("import_module", "__import__"):
        return []
    anchor = call.args[1] if len(call.args) > 1 else None
    package = anchor.value if isinstance(anchor, ast.Constant) and isinstance(anchor.value, str) else file.package
    pattern = _pattern(call.args[0], package)
    if pattern is None:
        return []
    matching = {name: match.groups() for name in names if (match := re.fullmatch(pattern, name))}
    strings = {node.value for node in ast.walk(file.tree) if isinstance(node, ast.Constant)}
    spelled = [name for name, parts in matching.items() if parts and all(part in strings for part in parts)]
    return spelled or list(matching)


def _pattern(name: ast.expr, package: str) -> str | None:
    """A regular expression for the modules that the expression may name; None if it is not a string in the source."""
    if isinstance(name, ast.Constant) and isinstance(name.value, str):
        parts: list[ast.expr] = [name]
    elif isinstance(name, ast.JoinedStr):
        parts = name.values
    else:
        return None
    text = ""
    for part in parts:
        if isinstance(part, ast.Constant):
            text += str(part.value)
        else:
            text += package if ast.unparse(part).strip("f'\"{}") == "__package__" else "\0"
    return _ANYTHING.join(re.escape(piece) for piece in _absolute(text, package).split("\0"))


def _absolute(name: str, package: str) -> str:
    rest = name.lstrip(".")
    if rest == name:
        return name
    parts = package.split(".")
    parts = parts[: len(parts) - (len(name) - len(rest) - 1)]
    return ".".join([*parts, rest] if rest else parts)


def _resolved(asked: str, names: set[str], homes: dict[str, dict[str, str]]) -> Iterable[str]:
    """The module that defines what is asked for, or nothing if it is another library's."""
    if asked in names:
        return homes[asked].values() if homes[asked] else [asked]
    module, _, name = asked.rpartition(".")
    if module not in names:
        return []
    return [homes[module].get(name, module)]


def _lazy_names(file: _File, names: set[str]) -> dict[str, str]:
    """For a package with a module-level `__getattr__`: its lazy names, each with the module that defines it.

    They are read from the imports below `if TYPE_CHECKING:`, which type checkers need beside the table.
    """
    if not any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in file.tree.body):
        return {}
    found = {}
    for block in file.tree.body:
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING"):
            for node in block.body:
                if isinstance(node, ast.ImportFrom):
                    base = _absolute("." * node.level + (node.module or ""), file.package)
                    for alias in node.names:
                        whole = f"{base}.{alias.name}"
                        found[alias.asname or alias.name] = whole if whole in names else base
    return found
