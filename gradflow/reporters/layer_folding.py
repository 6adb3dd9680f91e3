"""Repeated blocks as one: ``blocks.0–11`` where numbered siblings have the same inner structure.

Nothing is drawn here: records go in, groups of records that look alike come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from gradflow.findings import Severity
from gradflow.trace_model import LayerRecord

FEWEST = 3
"""Fewer siblings (or calls) than this are shown one by one."""

Marks: TypeAlias = dict[int, Severity]
"""Severity by ``order`` of the layer rows that a finding is about."""
_OUTPUT = "\0output"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layer records that are shown as one row."""

    label: str
    """"blocks.0–11.attn", "lstm[0]", "cell ×100"."""
    members: tuple[LayerRecord, ...]
    """In execution order, never empty."""
    mark: Severity | None
    """Of the finding that is about all of them."""


@dataclass(slots=True)
class _Node:
    """A part of a name, while the tree is built and labelled."""

    own: list[LayerRecord] = field(default_factory=list)
    children: dict[str, _Node] = field(default_factory=dict)
    signature: int = 0
    """Equal for nodes with the same inner structure."""


def fold_layers(layers: Sequence[LayerRecord], marks: Marks) -> list[LayerGroup]:
    """Group records, in the order of each group's first record.

    Siblings fold when they are numbered without a gap and hold the same types, shapes, coverage and marks;
    so do the calls of one module.
    """
    root = _Node()
    for layer in layers:
        _leaf(root, _path(layer)).own.append(layer)
    _sign(root, marks, {})
    labels: dict[int, str] = {}
    _label(root, (), labels)
    return _grouped(layers, labels, marks)


def unfolded(layers: Sequence[LayerRecord], marks: Marks) -> list[LayerGroup]:
    """A group for each record."""
    calls = _calls_by_name(layers)
    return [
        LayerGroup(
            label=_spelled(_path(layer)) + (f" #{layer.call}" if calls[layer.name] > 1 else ""),
            members=(layer,),
            mark=marks.get(layer.order),
        )
        for layer in layers
    ]


def _calls_by_name(layers: Sequence[LayerRecord]) -> dict[str, int]:
    calls: dict[str, int] = {}
    for layer in layers:
        calls[layer.name] = max(calls.get(layer.name, 0), layer.call + 1)
    return calls


def _path(layer: LayerRecord) -> tuple[str, ...]:
    name = tuple(layer.name.split(".")) if layer.name else ()
    return (*name, _OUTPUT, *layer.output.split(".")) if layer.output else name


def _spelled(path: tuple[str, ...]) -> str:
    at = path.index(_OUTPUT) if _OUTPUT in path else len(path)
    name, output = ".".join(path[:at]) or "(model)", ".".join(path[at + 1 :])
    return f"{name}[{output}]" if output else name


def _leaf(root: _Node, path: tuple[str, ...]) -> _Node:
    node = root
    for part in path:
        node = node.children.setdefault(part, _Node())
    return node


def _sign(node: _Node, marks: Marks, known: dict[object, int]) -> None:
    """Give equal structures equal numbers, leaves first."""
    for child in node.children.values():
        _sign(child, marks, known)
    own = tuple((row.call, row.type, row.shape, row.coverage, marks.get(row.order)) for row in node.own)
    inner = tuple((name, child.signature) for name, child in node.children.items())
    node.signature = known.setdefault((own, inner), len(known))


def _label(node: _Node, path: tuple[str, ...], labels: dict[int, str]) -> None:
    """Write each record's label, with runs of like siblings named by their range."""
    for row in node.own:
        labels[row.order] = _spelled(path)
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


def _grouped(layers: Sequence[LayerRecord], labels: dict[int, str], marks: Marks) -> list[LayerGroup]:
    calls = _calls_by_name(layers)
    members: dict[tuple[object, ...], list[LayerRecord]] = {}
    for layer in layers:
        alike = (labels[layer.order], layer.type, layer.shape, layer.coverage, marks.get(layer.order))
        key = (*alike, None if calls[layer.name] >= FEWEST else layer.call)
        members.setdefault(key, []).append(layer)
    return [_group(labels, marks, group, calls) for group in members.values()]


def _group(
    labels: dict[int, str], marks: Marks, members: list[LayerRecord], calls: dict[str, int]
) -> LayerGroup:
    first = members[0]
    label, seen = labels[first.order], len({member.call for member in members})
    if seen > 1:
        label += f" ×{seen}"
    elif calls[first.name] > 1:
        label += f" #{first.call}"
    return LayerGroup(label=label, members=tuple(members), mark=marks.get(first.order))
