"""A forward that raised at an add -> whether it was a residual, who changed a shape, and what would mend it.

Everything is read off when it is too late: the operands from the frames of the exception, where they came from
from the dataflow so far. A forward that does not raise pays nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.failed_add import FailedAdd, ResidualShapeError, Shape, ShapeChange, advice, sentence
from gradflow.recording.dataflow import Dataflow, Node
from gradflow.recording.failures import find_place
from gradflow.recording.projections import Layout, projection
from gradflow.recording.residual_ops import ADD_OPS, VALUE_OPS
from gradflow.recording.residual_sites import Branch, Graph, find_bare, find_shaped
from gradflow.recording.sources import shown_path
from gradflow.recording.tracebacks import doubts, frames, is_user_file, user_traceback
from gradflow.recording.weight_ops import CONV_OPS, is_weight_op, weights_of

_JOINING = ADD_OPS | {
    "sub",
    "sub_",
    "__sub__",
    "__rsub__",
    "__isub__",
    "rsub",
    "lerp",
    "lerp_",
    "addcmul",
    "addcmul_",
}
_KINDS = ("identity", "scaled", "projection", "low_rank")
_SLICES = frozenset({"__getitem__", "chunk", "split", "narrow", "select", "unbind", "index_select"})
_RESIZES = frozenset({"interpolate", "upsample", "pixel_shuffle", "pixel_unshuffle"})
_STEPS = 100_000
"""No walk back over a branch is longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Maker:
    """Who gave a dimension its size, and which of its own dimensions that is; None where the two do not match up."""

    node: int
    dimension: int | None
    before: int


_Makers = dict[int, tuple[_Maker, bool]]
"""By dimension of the add: who made it, and whether that stands on the shortcut."""


def explain_failed_add(
    error: BaseException, module: nn.Module, dataflow: Dataflow, graph: Graph
) -> ResidualShapeError | None:
    """Tell whether an exception is a residual add that failed for its shapes.

    Args:
        error: As caught, with its traceback; what it was raised from counts too.
        module: The model, for the names of its layers.
        dataflow: The traced forward that it ended.
        graph: Of that dataflow.

    Returns:
        The error to raise in its place; None where it is no shape, no add, or an add that is no residual.
    """
    for raised in _chain(error):
        operands = _operands(raised)
        if operands is None:
            continue
        nodes = [dataflow.node_of(operand) for operand in operands]
        left, right = nodes
        if left is None or right is None or not (left.from_data and right.from_data):
            return None
        sides = _behind_nothing(left, graph), _behind_nothing(right, graph)
        found = find_bare(*sides, graph) or find_shaped(*sides, graph)
        if found is None or found.kind not in _KINDS:
            return None
        failed = _failed_add(raised, module, found, graph)
        message = f"GF207 shortcut-shape: {sentence(failed)}. {advice(failed)}{doubts(error)}"
        return ResidualShapeError(message, failed, trace_text=user_traceback(error))
    return None


def _behind_nothing(node: Node, graph: Graph) -> int:
    """What a number was added to: ``sum([x, f])`` starts with 0 + x."""
    while node.op in ADD_OPS and len(node.inputs) == 1 and not node.parameters:
        node = graph.nodes[node.inputs[0]]
    return node.index


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it was raised from or while handling, once each."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _operands(error: BaseException) -> tuple[Tensor, Tensor] | None:
    """The two tensors of the add that raised, where it was one and their shapes do not go together."""
    traced = Dataflow.__torch_function__.__code__
    calls = [frame.f_locals for frame, _ in frames(error) if frame.f_code is traced]
    if not calls or getattr(calls[-1].get("func"), "__name__", "") not in _JOINING:
        return None
    given: list[Any] = [*calls[-1]["args"], *(calls[-1].get("kwargs") or {}).values()]
    tensors = [value for value in given if isinstance(value, Tensor)]
    if len(tensors) < 2 or _fit(tensors[0].shape, tensors[1].shape, calls[-1]["func"].__name__):
        return None
    return tensors[0], tensors[1]


def _fit(left: torch.Size, right: torch.Size, op: str) -> bool:
    """Whether torch would have added the shapes: in place, the result must have the first one's."""
    try:
        joined = torch.broadcast_shapes(left, right)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False
    in_place = op.startswith("__i") or (op.endswith("_") and not op.endswith("__"))
    return not in_place or joined == left


def _failed_add(error: BaseException, module: nn.Module, found: Branch, graph: Graph) -> FailedAdd:
    nodes = graph.nodes
    place = find_place(error, module)
    skip, branch = _shape(nodes[found.skip]), _shape(nodes[found.branch])
    moving = any(nodes[i].op not in VALUE_OPS for i in found.shortcut)
    start = _shape(nodes[found.source]) if moving else skip
    makers = _makers(found, start, graph)
    code = "" if len(start) != len(branch) or start == branch else _code(start, branch, makers, found, nodes)
    source, path = _line(error)
    return FailedAdd(
        name="" if place is None else place.name,
        source=source,
        place=path,
        skip_shape=skip,
        branch_shape=branch,
        changes=_changes(makers, found, nodes),
        projection=code,
        instead="" if code else _instead(start, found, makers, graph),
        has_shortcut=moving,
    )


def _shape(node: Node) -> Shape:
    return tuple(node.shape)


def _line(error: BaseException) -> tuple[str, str]:
    """ "model.py:31" and "models/model.py:31" of the innermost line of the user's."""
    places = [
        (Path(frame.f_code.co_filename), line)
        for frame, line in frames(error)
        if is_user_file(frame.f_code.co_filename)
    ]
    if not places:
        return "", ""
    path, line = places[-1]
    return f"{path.name}:{line}", f"{shown_path(path)}:{line}" if path.is_file() else ""


def _makers(found: Branch, start: Shape, graph: Graph) -> _Makers:
    """Who made each dimension in which skip and branch differ, and whether that was on the shortcut."""
    nodes = graph.nodes
    skip, branch = _shape(nodes[found.skip]), _shape(nodes[found.branch])
    if len(skip) != len(branch):
        return {}
    makers: _Makers = {}
    for dimension, (have, want) in enumerate(zip(skip, branch, strict=True)):
        if have == want:
            continue
        by_branch = _maker(found.branch, dimension, {found.source, *found.inside}, graph)
        maker = by_branch or _maker(found.skip, dimension, {found.source, *found.shortcut}, graph)
        if maker is not None:
            makers[dimension] = (maker, by_branch is None)
    return makers


def _maker(end: int, dimension: int, way: set[int], graph: Graph) -> _Maker | None:
    """Walk back from an operand while the size lasts: who stands where it ends made it; None at the source."""
    nodes = graph.nodes
    size = nodes[end].shape[dimension]
    index, at = end, dimension
    for _ in range(_STEPS):
        before = [i for i in nodes[index].inputs if i in way]
        if not before:
            return None
        carried = [
            (i, d) for i in reversed(before) if (d := _carried(nodes[i], nodes[index], at)) is not None
        ]
        if not carried:
            if nodes[index].op in VALUE_OPS - _SLICES:
                return _first_layer(before[-1], way, nodes)
            return _Maker(node=index, dimension=at, before=_size(nodes[before[-1]], at, size))
        index, at = carried[0]
    return None


def _carried(before: Node, after: Node, dimension: int) -> int | None:
    """The dimension of an op's input that still is this dimension of what it returned; None where it made it."""
    have, size = before.shape, after.shape[dimension]
    from_end = dimension - len(after.shape)
    if len(have) == len(after.shape) and have[dimension] == size:
        return dimension
    if len(have) == len(after.shape) and after.op not in VALUE_OPS:
        return None
    if after.op in _SLICES and len(have) == len(after.shape):
        return None
    if -from_end <= len(have) and have[from_end] == size:
        return len(have) + from_end
    return next((d for d in reversed(range(len(have))) if have[d] == size), None)


def _first_layer(index: int, way: set[int], nodes: Sequence[Node]) -> _Maker | None:
    """Behind a reshape that merges dimensions, the nearest layer."""
    for _ in range(_STEPS):
        if is_weight_op(nodes[index], nodes) or _is_pool(nodes[index]):
            return _Maker(node=index, dimension=None, before=0)
        before = [i for i in nodes[index].inputs if i in way]
        if not before:
            return None
        index = before[-1]
    return None


def _size(node: Node, dimension: int, default: int) -> int:
    return node.shape[dimension] if dimension < len(node.shape) else default


def _is_pool(node: Node) -> bool:
    return "_pool" in node.op


def _changes(makers: _Makers, found: Branch, nodes: Sequence[Node]) -> tuple[ShapeChange, ...]:
    if not makers:
        return _rank_change(found, nodes)
    sizes: dict[tuple[int, bool], list[tuple[int, int, int]]] = {}
    for dimension, (maker, on_shortcut) in makers.items():
        end = nodes[found.skip if on_shortcut else found.branch]
        before = maker.before or nodes[found.source].shape[dimension]
        sizes.setdefault((maker.node, on_shortcut), []).append((dimension, before, end.shape[dimension]))
    return tuple(
        ShapeChange(name=nodes[i].place, op=nodes[i].op, sizes=tuple(changed), on_shortcut=on_shortcut)
        for (i, on_shortcut), changed in sorted(sizes.items())
    )


def _rank_change(found: Branch, nodes: Sequence[Node]) -> tuple[ShapeChange, ...]:
    """The op after which the branch has another number of dimensions than the skip, for good."""
    rank = len(nodes[found.skip].shape)
    if len(nodes[found.branch].shape) == rank:
        return ()
    kept = [i for i in (found.source, *found.inside) if len(nodes[i].shape) == rank]
    later = [i for i in found.inside if not kept or i > kept[-1]]
    return tuple(ShapeChange(name=nodes[i].place, op=nodes[i].op, sizes=()) for i in later[:1])


def _code(start: Shape, want: Shape, makers: _Makers, found: Branch, nodes: Sequence[Node]) -> str:
    normed = any(nodes[i].op == "batch_norm" for i in found.inside)
    return projection(start, want, _layout(makers, found, nodes), batch_norm=normed)


def _layout(makers: _Makers, found: Branch, nodes: Sequence[Node]) -> Layout:
    """Channels first where convolutions or pools made the sizes and nothing was permuted since; else last."""
    rank = len(nodes[found.branch].shape)
    for dimension, (maker, _) in makers.items():
        walked = _positions(nodes[maker.node])
        if walked and maker.dimension == dimension and len(nodes[maker.node].shape) == rank:
            return Layout(features=rank - walked - 1, positions=walked)
    return Layout(features=rank - 1, positions=0)


def _positions(node: Node) -> int:
    """Over how many dimensions a convolution, pool or resize walks; 0 for any other op."""
    if node.op not in CONV_OPS | _RESIZES and not _is_pool(node):
        return 0
    return next((n for n in (1, 2, 3) if f"{n}d" in node.op), len(node.shape) - 2)


def _instead(start: Shape, found: Branch, makers: _Makers, graph: Graph) -> str:
    nodes = graph.nodes
    branch = _shape(nodes[found.branch])
    if start == branch:
        return "Take the shortcut away: the branch leaves the shape as it is"
    if len(start) != len(branch):
        return (
            "No projection can mend this: the number of dimensions differs; keep them in the branch "
            "(keepdim=True, no flatten), or bring the skip to the same number"
        )
    padding = _padding(makers, graph)
    if padding:
        kept = (*branch[:2], *start[2:])
        more = "" if kept == start else _code(start, kept, makers, found, nodes)
        besides = f"; then give the skip a projection: self.shortcut = {more}" if more else ""
        return f"No projection alone can mend this: {padding}, and the branch keeps its size{besides}"
    dims = [d for d, (have, want) in enumerate(zip(start, branch, strict=True)) if have != want]
    listed = " and ".join(map(str, dims))
    return (
        f"No projection can mend this: dimension{'s' if len(dims) > 1 else ''} {listed} "
        f"{'differ' if len(dims) > 1 else 'differs'} by more than a stride; cut, pad or pool the skip as the "
        "branch does, or let the branch keep its size"
    )


def _padding(makers: _Makers, graph: Graph) -> str:
    """ "give branch.conv1 padding=1" where that alone keeps the size: a convolution without any."""
    found = (_missing_padding(maker, graph) for maker, on_shortcut in makers.values() if not on_shortcut)
    return next(filter(None, found), "")


def _missing_padding(maker: _Maker, graph: Graph) -> str:
    node = graph.nodes[maker.node]
    walked, rank = _positions(node), len(node.shape)
    if node.op not in CONV_OPS or maker.dimension is None or maker.dimension < rank - walked:
        return ""
    weights = [graph.parameters[i] for i in weights_of(node, graph.nodes) if i in graph.parameters]
    kernels = {int(weight.shape[maker.dimension - rank]) for weight in weights if weight.dim() == walked + 2}
    lost = maker.before - node.shape[maker.dimension]
    if len(kernels) != 1 or lost == 0 or lost + 1 not in kernels or lost % 2:
        return ""
    return f"give {node.place or 'the convolution'} padding={lost // 2}"
