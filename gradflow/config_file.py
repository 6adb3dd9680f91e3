"""``[tool.gradflow]`` of the nearest pyproject.toml, read and checked: what is misspelt is said with its line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradflow.checking.module_ignores import ModuleIgnore
from gradflow.config_keys import KEYS, Key, Value, near_miss
from gradflow.errors import UsageError

TABLE = ("tool", "gradflow")
TARGETS, MODULE_IGNORES = "targets", "per-module-ignores"

_ASSIGNMENT = re.compile(r"""\s*(?P<key>[\w-]+|"[^"]*"|'[^']*')\s*[.=]""")

TomlPath = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTarget:
    """One ``[tool.gradflow.targets.NAME]``."""

    name: str
    values: Mapping[str, Value]
    ignores: tuple[ModuleIgnore, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectConfig:
    """What a pyproject.toml says to gradflow; empty without one."""

    path: Path | None = None
    """The file; None where there is none with a ``[tool.gradflow]``."""
    values: Mapping[str, Value]
    targets: tuple[FileTarget, ...] = ()
    ignores: tuple[ModuleIgnore, ...] = ()
    """Of ``[tool.gradflow.per-module-ignores]``: for every target."""

    @property
    def folder(self) -> Path:
        """What the paths in the file are relative to."""
        return self.path.parent if self.path is not None else Path.cwd()


def read_project(start: Path | None = None) -> ProjectConfig:
    """Read the nearest pyproject.toml with a ``[tool.gradflow]``, from ``start`` (or here) upwards.

    Raises:
        UsageError: It is not TOML, or a key, a value or a rule in it does not exist.
    """
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        path = folder / "pyproject.toml"
        if path.is_file():
            source = _Source.read(path)
            if source.table is not None:
                return _checked(source)
    return ProjectConfig(values={})


@dataclass(frozen=True, slots=True)
class _Source:
    """A file with its text, for the lines of what is wrong in it."""

    path: Path
    text: str
    table: Any

    @classmethod
    def read(cls, path: Path) -> _Source:
        try:
            text = path.read_text(encoding="utf-8")
            table = tomllib.loads(text)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"cannot read {path}: {error}; mend it first") from error
        tools = table.get("tool", {})
        return cls(path, text, tools.get("gradflow") if isinstance(tools, dict) else None)

    def wrong(self, at: TomlPath, problem: str) -> UsageError:
        return UsageError(f"{_shown(self.path)}:{line_of(self.text, at)}: {problem}")


def line_of(text: str, wanted: TomlPath) -> int:
    """The line, from 1, that sets ``wanted`` or the innermost table around it that can be found."""
    best, line, header = 0, 1, TomlPath()
    for number, written in enumerate(text.splitlines(), start=1):
        path = _header(written)
        if path is not None:
            header = path
        elif (assigned := _ASSIGNMENT.match(written)) is not None:
            path = (*header, assigned["key"].strip("\"'"))
        shared = path[: len(wanted)] if path else ()
        if len(shared) > best and wanted[: len(shared)] == shared:
            best, line = len(shared), number
    return line


def _header(line: str) -> TomlPath | None:
    """("tool", "gradflow") of "[tool.gradflow]"; None for a line that opens no table."""
    if not line.lstrip().startswith("["):
        return None
    try:
        table: Any = tomllib.loads(line)
    except tomllib.TOMLDecodeError:  # a list that goes over several lines
        return None
    path: list[str] = []
    while isinstance(table, dict) and table:
        ((name, table),) = table.items()
        path.append(name)
    return tuple(path)


def _checked(source: _Source) -> ProjectConfig:
    table = _as_table(source, TABLE, source.table)
    named = _as_table(source, (*TABLE, TARGETS), table.get(TARGETS, {}))
    return ProjectConfig(
        path=source.path,
        values=_values(source, TABLE, table, lambda key: key.project, (TARGETS, MODULE_IGNORES)),
        targets=tuple(_file_target(source, name, table) for name, table in named.items()),
        ignores=_ignores(source, TABLE, table, scope=""),
    )


def _file_target(source: _Source, name: str, given: object) -> FileTarget:
    at = (*TABLE, TARGETS, name)
    table = _as_table(source, at, given)
    values = _values(source, at, table, lambda key: key.target, (MODULE_IGNORES,))
    if "target" not in values:
        raise source.wrong(at, f'target {name!r} does not say what to check: add target = "model.py:NAME"')
    return FileTarget(name=name, values=values, ignores=_ignores(source, at, table, scope=name))


def _values(
    source: _Source,
    at: TomlPath,
    table: Mapping[str, object],
    belongs: Callable[[Key], bool],
    tables: tuple[str, ...],
) -> dict[str, Value]:
    keys = {key.name: key for key in KEYS if belongs(key)}
    values = {}
    for name, given in table.items():
        if name in tables:
            continue
        if name not in keys:
            near = near_miss(name, [*keys, *tables])
            elsewhere = "" if isinstance(given, dict) else _elsewhere(name)
            raise source.wrong((*at, name), f"[{_dotted(at)}] takes no {name!r}{elsewhere or near}")
        values[name] = _value(source, (*at, name), keys[name], given)
    return values


def _elsewhere(name: str) -> str:
    """Where a key that exists belongs."""
    key = next((key for key in KEYS if key.name == name), None)
    if key is None:
        return ""
    place = (
        f"[{_dotted(TABLE)}]" if key.project else f"the table of a target, [{_dotted(TABLE)}.{TARGETS}.NAME]"
    )
    return f": it belongs in {place}"


def _value(source: _Source, at: TomlPath, key: Key, given: object) -> Value:
    try:
        value = key.read(given)
    except ValueError as error:
        raise source.wrong(at, f"{key.name} takes {key.takes}, not {given!r}") from error
    if key.name in ("select", "ignore"):
        for code in value:
            _known_rule(source, at, code)
    if key.name == "thresholds":
        return tuple((_known_threshold(source, at, name), limit) for name, limit in value)
    return value


def _known_threshold(source: _Source, at: TomlPath, name: str) -> str:
    from gradflow.rules import find_threshold

    try:
        return find_threshold(name)
    except UsageError as error:
        place = (*at, name) if line_of(source.text, (*at, name)) != line_of(source.text, at) else at
        raise source.wrong(place, str(error)) from error


def _ignores(
    source: _Source, at: TomlPath, table: Mapping[str, object], *, scope: str
) -> tuple[ModuleIgnore, ...]:
    here = (*at, MODULE_IGNORES)
    found = []
    for pattern, reasons in _as_table(source, here, table.get(MODULE_IGNORES, {})).items():
        for code, reason in _as_table(source, (*here, pattern), reasons).items():
            place = (*here, pattern, code)
            _known_rule(source, place, code)
            if not isinstance(reason, str) or not reason.strip():
                raise source.wrong(place, f'{code} in {pattern!r} is ignored for no reason: {code} = "why"')
            found.append(ModuleIgnore(pattern=pattern, code=code, reason=reason, scope=scope))
    return tuple(found)


def _known_rule(source: _Source, at: TomlPath, code: str) -> None:
    from gradflow.rules import select_rules

    try:
        select_rules((code,), ())
    except UsageError as error:
        raise source.wrong(at, str(error)) from error


def _as_table(source: _Source, at: TomlPath, given: object) -> Mapping[str, object]:
    if not isinstance(given, dict):
        what = f"[{_dotted(at)}] is a table, not {given!r}"
        hint = ': { GF103 = "why" }' if MODULE_IGNORES in at else ""
        raise source.wrong(at, what + hint)
    return given


def _dotted(path: TomlPath) -> str:
    return ".".join(part if re.fullmatch(r"[\w-]+", part) else f'"{part}"' for part in path)


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
