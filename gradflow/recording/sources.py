"""Where the classes of a model are defined, for the formats that put a finding beside a line."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import FunctionType

from torch import nn

from gradflow.recording.tracebacks import is_user_file

_PACKAGES = {"site-packages", "dist-packages"}


def class_sources(names: Mapping[nn.Module, str]) -> tuple[tuple[str, str], ...]:
    """The line that defines the class of each module, where it stands in a file of the user's own.

    A module of a class from torch or another installed package is left out: it belongs to the nearest module
    around it that is there.

    Args:
        names: Fully qualified names by module.

    Returns:
        Name and place, "models/net.py:31", in the order of ``names``; paths below the working folder are
        relative to it, others absolute, all with forward slashes.
    """
    places = {kind: _place(kind) for kind in {type(module) for module in names}}
    return tuple((name, place) for module, name in names.items() if (place := places[type(module)]))


def _place(kind: type) -> str:
    """ "path:line" of a class; "" where there is no source, or it is not the user's."""
    file, first_line = _file_of(kind)
    if not file or not is_user_file(file) or _PACKAGES & set(Path(file).parts):
        return ""
    definitions = [node for node in _classes(file) if node.name == kind.__name__]
    around = [node for node in definitions if node.lineno <= first_line <= (node.end_lineno or node.lineno)]
    # Without a method to go by, the last definition is the one that the file's readers get.
    found = (around or definitions)[-1:]
    return f"{shown_path(Path(file))}:{found[0].lineno}" if found else ""


def _file_of(kind: type) -> tuple[str, int]:
    """File and a line inside the class; the line is 0 for a class without methods of its own.

    Its own functions know their file even where ``sys.modules`` has come to hold another of the same name.
    """
    functions = [member for member in vars(kind).values() if isinstance(member, FunctionType)]
    written = [f.__code__ for f in functions if f.__qualname__ == f"{kind.__qualname__}.{f.__name__}"]
    if written:
        return written[0].co_filename, written[0].co_firstlineno
    try:
        return inspect.getsourcefile(kind) or "", 0
    except (TypeError, OSError):  # made by a C extension, by exec, or at a prompt
        return "", 0


def _classes(file: str) -> Iterable[ast.ClassDef]:
    path = Path(file)
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return ()
    return _parsed(path, changed)


@cache
def _parsed(path: Path, changed: int) -> tuple[ast.ClassDef, ...]:
    """Every class of a file, nested ones after those around them; nothing where it is no Python source."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ()
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return tuple(sorted(found, key=lambda node: node.lineno))


def shown_path(path: Path) -> str:
    """A path with forward slashes, relative to the working folder where it lies below it."""
    place, here = path.resolve(), Path.cwd()
    return (place.relative_to(here) if place.is_relative_to(here) else place).as_posix()
