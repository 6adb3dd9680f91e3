"""A target string -> an imported Python module, with clear words for everything that can go wrong."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from gradflow.errors import ModelError, TargetError
from gradflow.recording.sibling_imports import siblings_of
from gradflow.recording.tracebacks import model_error, where

_NEAR_NAMES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec:
    """A target string taken apart."""

    text: str
    path: Path | None
    """Set for "path/to/model.py[:NAME]"."""
    module: str | None
    """Set for "package.module[:NAME]"."""
    name: str | None
    """What to take from it; None leaves the choice to the contract's order."""

    @property
    def source(self) -> str:
        """The target without its NAME: what a longer command line starts with."""
        return str(self.path) if self.path is not None else str(self.module)

    @property
    def folder(self) -> Path:
        """Where the target's own imports are looked for."""
        return self.path.resolve().parent if self.path is not None else Path.cwd()


def parse_spec(text: str) -> TargetSpec:
    """Take a target string apart.

    Raises:
        TargetError: There is no such file, it is a directory, or it is no Python file.
    """
    source, colon, name = text.rpartition(":")
    if not colon or not source or "/" in name or "\\" in name:
        source, name = text, ""
    path = Path(source)
    if path.is_file() or path.is_dir() or source.endswith(".py") or "/" in source or "\\" in source:
        return TargetSpec(text=text, path=_python_file(path), module=None, name=name or None)
    if not all(part.isidentifier() for part in source.split(".")):
        raise TargetError(f"{text!r} is no target: give model.py, model.py:NAME or package.module:NAME")
    return TargetSpec(text=text, path=None, module=source, name=name or None)


def _python_file(path: Path) -> Path:
    if path.is_dir():
        inside = ", ".join(sorted(p.name for p in path.glob("*.py"))[:8]) or "no Python file in it"
        raise TargetError(f"{path} is a directory ({inside}): name the file that holds the model")
    if not path.exists():
        raise TargetError(_no_such_file(path))
    if path.suffix != ".py":
        raise TargetError(
            f"{path} is not a Python file: gradflow imports the .py file that defines the model "
            "(weights go to --checkpoint)"
        )
    return path


def _no_such_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"no such file: {path} (there is no directory {folder})"
    near = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.py")], _NEAR_NAMES, 0.5)
    hint = f"; did you mean {' or '.join(str(folder / name) for name in near)}?" if near else ""
    return f"no such file: {path}{hint}"


@contextlib.contextmanager
def user_code(spec: TargetSpec) -> Iterator[None]:
    """Run the target's own code: its prints go to stderr, its siblings can be imported, argv is its own.

    Raises:
        ModelError: It asked Python to exit.
    """
    argv, no_bytecode = sys.argv, sys.dont_write_bytecode
    sys.argv, sys.dont_write_bytecode = [spec.source], True
    try:
        with contextlib.redirect_stdout(sys.stderr), siblings_of(spec.folder):
            yield
    except SystemExit as error:
        raise model_error(error, f"the code of {spec.source}") from error
    finally:
        sys.argv, sys.dont_write_bytecode = argv, no_bytecode


def import_target(spec: TargetSpec) -> ModuleType:
    """Import the target's module. Call it inside ``user_code``.

    Raises:
        TargetError: A syntax error, or an import that fails.
        ModelError: The module's own code raised, or asked Python to exit.
    """
    try:
        if spec.path is not None:
            return _import_file(spec.path.resolve())
        return _import_module(str(spec.module))
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        file = Path(error.filename).name if error.filename else spec.source
        raise TargetError(f"{file}{line}: {error.msg}; gradflow cannot import it") from error
    except ImportError as error:
        raise TargetError(_import_failure(spec, error)) from error
    except SystemExit as error:
        raise ModelError(
            f"{spec.source} asked Python to exit ({error.code}) while it was imported, at {where(error)}: "
            'put what runs behind `if __name__ == "__main__":`'
        ) from error
    except Exception as error:
        raise model_error(error, f"importing {spec.source}") from error


def _import_file(path: Path) -> ModuleType:
    """Import a file under a name of our own, so that it may be called anything ("torch.py")."""
    name = "gradflow_target_" + "".join(c if c.isalnum() else "_" for c in path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise TargetError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        # Compiled here, not by the loader: a stale bytecode file must not stand in for the source.
        code = compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except ValueError as error:
        raise TargetError(f"{path} is not Python source: {error}") from error
    sys.modules[name] = module
    try:
        exec(code, module.__dict__)
    except ImportError as error:
        sys.modules.pop(name, None)
        if "relative import" in str(error) and (path.parent / "__init__.py").exists():
            return _import_as_package(path)
        raise
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _import_as_package(path: Path) -> ModuleType:
    """Import a file that says ``from .blocks import …`` as a part of the package it lies in."""
    parts, folder = [path.stem], path.parent
    while (folder / "__init__.py").exists():
        parts.insert(0, folder.name)
        folder = folder.parent
    with _first_on_path(folder):
        return importlib.import_module(".".join(parts))


def _import_module(name: str) -> ModuleType:
    with _first_on_path(Path.cwd()):
        importlib.invalidate_caches()
        return importlib.import_module(name)


@contextlib.contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _import_failure(spec: TargetSpec, error: ImportError) -> str:
    at = where(error)
    at = f" (at {at})" if at else ""
    if spec.module is not None and not at:
        files = [p.stem for p in Path.cwd().glob("*.py")]
        near = difflib.get_close_matches(spec.module, files, _NEAR_NAMES, 0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else " and the current directory has none"
        return f"no module named {error.name or spec.module!r} to import{hint}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return (
            f"{spec.source} imports {error.name!r}{at}, which is not installed in this Python "
            f"and not beside the file: install {package} or run gradflow where it is"
        )
    return f"{spec.source} cannot be imported{at}: {error}"
