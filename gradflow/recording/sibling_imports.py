"""A model file's neighbours can be imported while it loads, as when Python runs the file as a script.

Unlike a script's folder on ``sys.path``, a neighbour never shadows the standard library or an installed
package: a folder of model files may well hold a "transformers.py" or a "types.py".
"""

from __future__ import annotations

import contextlib
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_INSTALLED = tuple({str(Path(path).resolve()) for key, path in sysconfig.get_paths().items() if "lib" in key})
_NEVER_SHADOWED = sys.stdlib_module_names | {"gradflow"}


class _SiblingFinder:
    """Finds top-level modules in one folder, behind whatever is installed."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is not None or name in _NEVER_SHADOWED:
            return None
        sibling = PathFinder.find_spec(name, [self._folder])
        if sibling is None or sibling.loader is None or _is_installed(PathFinder.find_spec(name)):
            return None
        return sibling


def _is_installed(spec: ModuleSpec | None) -> bool:
    # A namespace package has no origin: a mere folder, which a neighbour may stand before.
    if spec is None or spec.origin is None:
        return False
    return str(Path(spec.origin).resolve()).startswith(_INSTALLED)


@contextlib.contextmanager
def siblings_of(folder: Path) -> Iterator[None]:
    """Let the modules of ``folder`` be imported; modules of the same names from elsewhere step aside."""
    finder = _SiblingFinder(folder)
    aside = _set_aside(folder)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.modules.update(aside)


def _set_aside(folder: Path) -> dict[str, ModuleType]:
    """Take out loose modules (another model's "layers") whose names the folder has too."""
    names = {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/__init__.py")}
    clashing = {name for name in names & sys.modules.keys() if _is_loose(sys.modules[name], folder)}
    taken = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in clashing}
    for name in taken:
        del sys.modules[name]
    return taken


def _is_loose(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    if not file or module.__name__.partition(".")[0] in _NEVER_SHADOWED:
        return False
    path = Path(file).resolve()
    return not str(path).startswith(_INSTALLED) and not path.is_relative_to(folder)
