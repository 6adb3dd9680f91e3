"""Which module of a package imports which, read from the source without running any of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceModule:
    """One module and the full names it imports; packages that an import passes through are included."""

    name: str
    path: Path
    at_import: frozenset[str]
    """Imported as soon as the module is: at its top level, in a class body, under an ``if`` or a ``try``."""
    anywhere: frozenset[str]
    """The above, the imports inside functions, and those for the type checker only."""


def read_package(root: Path) -> dict[str, SourceModule]:
    """Read every module under the package folder ``root``, by full name."""
    paths = {_module_name(path, root): path for path in sorted(root.rglob("*.py"))}
    return {name: _read_module(name, path, frozenset(paths)) for name, path in paths.items()}


def reached_at_import(modules: dict[str, SourceModule], start: str) -> frozenset[str]:
    """Return every name, ours or not, that importing ``start`` imports, directly or through our modules."""
    seen: set[str] = set()
    waiting = [start, *_packages_of(start)]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            if name in modules:
                waiting.extend(modules[name].at_import)
    return frozenset(seen - {start})


def within(name: str, package: str) -> bool:
    """Return whether ``name`` is ``package`` or lies in it."""
    return name == package or name.startswith(package + ".")


def _module_name(path: Path, root: Path) -> str:
    parts = (root.name, *path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _read_module(name: str, path: Path, ours: frozenset[str]) -> SourceModule:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return SourceModule(
        name=name,
        path=path,
        at_import=_names(_statements_run_at_import(tree), package, ours),
        anywhere=_names(ast.walk(tree), package, ours),
    )


def _statements_run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and _asks_for_type_checking(child.test):
            for other in child.orelse:
                yield other
                yield from _statements_run_at_import(other)
            continue
        yield child
        yield from _statements_run_at_import(child)


def _asks_for_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _names(nodes: Iterator[ast.AST], package: str, ours: frozenset[str]) -> frozenset[str]:
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            found.add(base)
            found.update(full for alias in node.names if (full := f"{base}.{alias.name}") in ours)
    return frozenset(found).union(*(_packages_of(name) for name in found))


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    base = parts[: len(parts) - (node.level - 1)]
    return ".".join([*base, node.module] if node.module else base)


def _packages_of(name: str) -> frozenset[str]:
    """Importing ``a.b.c`` runs ``a`` and ``a.b`` first."""
    parts = name.split(".")
    return frozenset(".".join(parts[:end]) for end in range(1, len(parts)))
