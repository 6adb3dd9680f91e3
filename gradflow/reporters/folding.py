"""Repeated blocks as one: ``blocks.0–11`` where numbered siblings have the same inner structure.

Nothing is drawn here: rows of any table go in, groups of rows that look alike come out.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from gradflow.findings import Severity

FEWEST = 3
"""Fewer siblings (or calls) than this are shown one by one."""

Marks: TypeAlias = dict[int, Severity]
"""Severity by ``order`` of the rows that a finding is about."""
_PART = "\0part"


@dataclass(frozen=True, slots=True, kw_only=True)
class Foldable:
    """What folding needs to know of a row."""

    name: str
    """Fully qualified name of its module."""
    part: str
    """Which of the module's rows it is ("logits", "1"); "" for the only one."""
    call: int
    alike: Hashable
    """Equal for rows that may stand in one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Rows that are shown as one."""

    label: str
    """"blocks.0–11.attn", "lstm[0]", "cell ×100"."""
    members: tuple[int, ...]
    """Positions among the rows that went in, never empty."""


@dataclass(slots=True)
class _Node:
    """A part of a name, while the tree is built and labelled."""

    own: list[int] = field(default_factory=list)
    children: dict[str, _Node] = field(default_factory=dict)
    signature: int = 0
    """Equal for nodes with the same inner structure."""


def fold(rows: Sequence[Foldable]) -> list[Fold]:
    """Group rows, in the order of each group's first row.

    Siblings fold when they are numbered without a gap and hold rows that are alike; so do the calls of one
    module.
    """
    root = _Node()
    for at, row in enumerate(rows):
        _leaf(root, _path(row)).own.append(at)
    _sign(root, rows, {})
    labels: dict[int, str] = {}
    _label(root, (), labels)
    return _grouped(rows, labels)


def unfold(rows: Sequence[Foldable]) -> list[Fold]:
    """A group for each row."""
    calls = _calls_by_name(rows)
    labels = (_spelled(_path(row)) + (f" #{row.call}" if calls[row.name] > 1 else "") for row in rows)
    return [Fold(label=label, members=(at,)) for at, label in enumerate(labels)]


def _calls_by_name(rows: Sequence[Foldable]) -> dict[str, int]:
    calls: dict[str, int] = {}
    for row in rows:
        calls[row.name] = max(calls.get(row.name, 0), row.call + 1)
    return calls


def _path(row: Foldable) -> tuple[str, ...]:
    name = tuple(row.name.split(".")) if row.name else ()
    return (*name, _PART, *row.part.split(".")) if row.part else name


def _spelled(path: tuple[str, ...]) -> str:
    at = path.index(_PART) if _PART in path else len(path)
    name, part = ".".join(path[:at]) or "(model)", ".".join(path[at + 1 :])
    return f"{name}[{part}]" if part else name


def _leaf(root: _Node, path: tuple[str, ...]) -> _Node:
    node = root
    for part in path:
        node = node.children.setdefault(part, _Node())
    return node


def _sign(node: _Node, rows: Sequence[Foldable], known: dict[object, int]) -> None:
    """Give equal structures equal numbers, leaves first."""
    for child in node.children.values():
        _sign(child, rows, known)
    own = tuple((rows[at].call, rows[at].alike) for at in node.own)
    inner = tuple((name, child.signature) for name, child in node.children.items())
    node.signature = known.setdefault((own, inner), len(known))


def _label(node: _Node, path: tuple[str, ...], labels: dict[int, str]) -> None:
    """Write each row's label, with runs of like siblings named by their range."""
    for at in node.own:
        labels[at] = _spelled(path)
    for run in _runs(list(node.children)):
        for names in _alike(run, node):
            part = f"{names[0]}–{names[-1]}" if len(names) >= FEWEST else ""
            for name in names:
                _label(node.children[name], (*path, part or name), labels)


def _runs(names: list[str]) -> list[list[str]]:
    """Names split into runs of consecutive numbers; any other name is a run of its own."""
    runs: list[list[str]] = []
    for name in names:
        previous = runs[-1][-1] if runs else ""
        if name.isdecimal() and previous.isdecimal() and int(name) == int(previous) + 1:
            runs[-1].append(name)
        else:
            runs.append([name])
    return runs


def _alike(run: list[str], node: _Node) -> list[list[str]]:
    groups: list[list[str]] = []
    for name in run:
        signature = node.children[name].signature
        if groups and node.children[groups[-1][-1]].signature == signature:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _grouped(rows: Sequence[Foldable], labels: dict[int, str]) -> list[Fold]:
    calls = _calls_by_name(rows)
    members: dict[tuple[object, ...], list[int]] = {}
    for at, row in enumerate(rows):
        key = (labels[at], row.alike, None if calls[row.name] >= FEWEST else row.call)
        members.setdefault(key, []).append(at)
    return [_fold(rows, labels, group, calls) for group in members.values()]


def _fold(
    rows: Sequence[Foldable], labels: dict[int, str], members: list[int], calls: dict[str, int]
) -> Fold:
    first = members[0]
    label, seen = labels[first], len({rows[at].call for at in members})
    if seen > 1:
        label += f" ×{seen}"
    elif calls[rows[first].name] > 1:
        label += f" #{rows[first].call}"
    return Fold(label=label, members=tuple(members))
