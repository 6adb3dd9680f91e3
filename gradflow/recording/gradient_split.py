"""The gradient at a residual sum, split between what the skip and what the branch bring back to the source.

Autograd adds up all that arrives at the source, other readers included. One step before, each backward function
that reads the source hands over its own contribution: those are caught here and told apart by the side of the add
that they lie on. Nothing is subtracted, no second backward is run, and of a bare skip that waits for its branch
only a reference is held: to the gradient at the sum, which autograd holds as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from gradflow.recording import kernels
from gradflow.recording.tensor_stats import flat_values, is_transformed, real_values

PIECE = 65_536
"""Products are summed over this many elements at a time: in single precision, into double."""
SAFE = (1e-20, 1e30)
"""Squared norms outside of this are taken again in double precision: squares may have under- or overflowed."""

SKIP, BRANCH = 0, 1
Edge = tuple[Node, int]
"""A backward function, and the how-manieth of its outputs."""

NO_SOURCE = "what skip and branch come from was gone when they were added"
NO_GRADIENT_ASKED = "what skip and branch come from asks for no gradient"
NOT_REACHED = "no gradient came back to what skip and branch come from"
SHARED = "skip and branch share ops besides what they come from"
NO_SKIP = "no gradient comes back through the skip alone"
READ_ELSEWHERE = "something outside reads the inside of the branch"
UNREADABLE = "the gradients cannot be read"
NO_SUM = "skip and branch are not summed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """Places in the autograd graph of a site."""

    start: Edge
    """Where skip and branch bring the gradient back to."""
    branches: tuple[Edge, ...]
    """Where it enters the branch, or each of parallel ones."""


@dataclass(slots=True, kw_only=True)
class GradientSplit:
    """What skip and branch of one site bring back, while backward runs.

    Attributes:
        products: Squared norms of both and their inner product, float64, once all has arrived.
        note: Why there are none.
    """

    products: Tensor | None = None
    note: str = NOT_REACHED
    _source: Edge | None = None
    _base: Edge | None = None
    """Of the tensor that the source is another view of: an add into the source goes back to that."""
    _branches: list[Edge] = field(default_factory=list)
    _landings: list[Node] = field(default_factory=list)
    """Where the way back from the sum may meet the branch: its operands, and the bases they are views of."""
    _root: Node | None = None
    _awaited: int = 0
    _parts: list[Tensor | None] = field(default_factory=lambda: [None, None])

    def add_branches(self, branches: Iterable[Landing]) -> None:
        """Note operands that bring F, or parts of it."""
        for branch in branches:
            self._landings += branch.landings
            self._branches += branch.branches

    def add_sum(self, total: Tensor) -> None:
        """Note the sum; where a second branch is added, the last sum counts."""
        self._root = total.grad_fn

    def listen(self) -> None:
        """Hook the backward functions that read the source; call it between forward and backward."""
        ways = self._ways()
        # A hook that held its own function would never be freed.
        self._source = self._base = self._root = None
        self._branches, self._landings = [], []
        if ways is not None:
            inside, beside = ways.inside.readers, ways.beside.readers
            self._hook([(reader, BRANCH) for reader in inside] + [(reader, SKIP) for reader in beside])

    def ends(self) -> Ends | None:
        """Where the gradient enters the branch and where it arrives; instead of ``listen``. None without a split."""
        source, base, ways = self._source, self._base, self._ways()
        if ways is None or source is None:
            return None
        direct = [node.next_functions[place] for node, place in ways.beside.readers]
        start = base if base is not None and base in direct else source
        return Ends(start=start, branches=tuple(dict.fromkeys(ways.beside.entries)))

    def _ways(self) -> _Ways | None:
        """The ways from the sum back to the source, told apart; None, and a note, where they cannot be."""
        source, base, root = self._source, self._base, self._root
        if source is None or root is None:
            return None
        inside = _walk([node for node, _ in self._branches], [source], frozenset())
        sources = [source] if base is None else [source, base]
        beside = _walk([root], sources, inside.met)
        if any(node not in self._landings for node, _ in beside.entries):
            self.note = SHARED
        elif not beside.readers:
            self.note = NO_SKIP
        else:
            return _Ways(inside=inside, beside=beside)
        return None

    def _hook(self, readers: Iterable[tuple[Edge, int]]) -> None:
        places: dict[Node, list[tuple[int, int]]] = {}
        for (node, place), side in readers:
            places.setdefault(node, []).append((place, side))
        self._awaited = len(places)
        for node, wanted in places.items():
            node.register_hook(partial(self._arrive, tuple(wanted)))

    def _arrive(self, wanted: Sequence[tuple[int, int]], grad_inputs: Any, grad_outputs: Any) -> None:
        if not self._awaited:
            return
        for place, side in wanted:
            gradient, held = grad_inputs[place], self._parts[side]
            if gradient is not None:
                self._parts[side] = gradient.detach() if held is None else held + gradient.detach()
        self._awaited -= 1
        if not self._awaited:
            self._finish()

    def _finish(self) -> None:
        skip, branch = self._parts
        self._parts = [None, None]
        if any(part is not None and not _is_readable(part) for part in (skip, branch)):
            self.note = UNREADABLE
        elif skip is not None or branch is not None:
            self.products, self.note = pair_products(skip, branch), ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Landing:
    """Where the way back from a sum leads into an operand."""

    branches: tuple[Edge, ...]
    landings: tuple[Node, ...]
    """The operand, and the base that it is a view of."""


def landing_of(operand: Tensor) -> Landing:
    """Note an operand that brings F, or a part of it, before the add may overwrite it."""
    own = (_edge(operand),) if operand.requires_grad else ()
    base = operand._base if operand._is_view() else None
    below = (_edge(base)[0],) if base is not None and base.requires_grad else ()
    return Landing(branches=own, landings=(*(node for node, _ in own), *below))


def start_split(source: Tensor | None, branches: Iterable[Landing]) -> GradientSplit:
    """Begin with the site that is about to be added: its source and the operands that bring F."""
    if source is None:
        return GradientSplit(note=NO_SOURCE)
    if not source.requires_grad or is_transformed(source):
        return GradientSplit(note=NO_GRADIENT_ASKED)
    base = source._base if source._is_view() else None
    whole = base is not None and base.numel() == source.numel() and base.is_contiguous()
    alias = base if whole and base is not None and base.requires_grad and source.is_contiguous() else None
    split = GradientSplit(_source=_edge(source), _base=None if alias is None else _edge(alias))
    split.add_branches(branches)
    return split


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitNumbers:
    """Fields as in ``ResidualRecord``."""

    skip_gradient_norm: float | None = None
    branch_gradient_norm: float | None = None
    gradient_cosine: float | None = None
    branch_gain: float | None = None
    path_share: float | None = None
    split_note: str = ""


def split_numbers(split: GradientSplit | None, gradient_norm: float | None, *, closed: bool) -> SplitNumbers:
    """Transfer and combine.

    Args:
        split: Of a site; None where there is no sum to split.
        gradient_norm: At the sum.
        closed: Nothing outside the site reads the inside of its branch, on a way to the loss.
    """
    if split is None:
        return SplitNumbers(split_note=NO_SUM)
    if split.products is None or not closed:
        return SplitNumbers(split_note=split.note or READ_ELSEWHERE)
    skip, branch, both = split.products.tolist()
    roots = math.sqrt(skip), math.sqrt(branch)
    scale, energy = roots[SKIP] * roots[BRANCH], skip + branch
    return SplitNumbers(
        skip_gradient_norm=roots[SKIP],
        branch_gradient_norm=roots[BRANCH],
        gradient_cosine=both / scale if scale else None,
        branch_gain=roots[BRANCH] / gradient_norm if gradient_norm else None,
        path_share=branch / energy if energy else None,
    )


def pair_products(first: Tensor | None, second: Tensor | None) -> Tensor:
    """Squared norms of two tensors of one shape and their inner product, float64, on their device.

    ``None`` stands for zeros.
    """
    if first is None or second is None:
        only = second if first is None else first
        if only is None:
            return torch.zeros(3, dtype=torch.float64)
        square = pair_products(only, only)[0]
        zero = torch.zeros_like(square)
        return torch.stack((zero, square, zero) if first is None else (square, zero, zero))
    a, b = _aligned(real_values(first), real_values(second))
    found = kernels.products(a, b)
    if found is not None:
        return torch.tensor(found, dtype=torch.float64, device=a.device)
    if a.device.type != "cpu" or a.dtype is torch.float64:
        return _products(a.double(), b.double())
    products = _products(a, b)
    low, high = SAFE
    if all(low < value < high for value in products[:2].tolist()):
        return products
    return _products(a.double(), b.double())


def _products(a: Tensor, b: Tensor) -> Tensor:
    rows = []
    for left, right in zip(torch.split(a, PIECE), torch.split(b, PIECE), strict=True):
        if left.dtype in (torch.float16, torch.bfloat16):
            left, right = left.float(), right.float()
        rows += [torch.dot(left, left), torch.dot(right, right), torch.dot(left, right)]
    return torch.stack(rows).double().view(-1, 3).sum(0)


def _aligned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dimension, element beside element, without a copy where they are laid out alike."""
    if b.dtype is not a.dtype:
        wide = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(wide), b.to(wide)
    if a.stride() == b.stride():
        return flat_values(a), flat_values(b)
    return a.reshape(-1), b.reshape(-1)


def _is_readable(tensor: Tensor) -> bool:
    strided = tensor.layout is torch.strided
    return strided and not is_transformed(tensor) and not tensor.is_meta and tensor.numel() > 0


def _edge(tensor: Tensor) -> Edge:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


@dataclass(frozen=True, slots=True, kw_only=True)
class _Walk:
    """What was met on the way back from some functions to a source."""

    readers: list[Edge]
    """The functions that read the source, and as how-manieth argument."""
    met: Set[Node]
    entries: list[Edge]
    """Where the way ended at a function that it was not to pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ways:
    inside: _Walk
    """Through the branch."""
    beside: _Walk
    """From the sum, around the branch."""


def _walk(starts: Iterable[Node], sources: Sequence[Edge], closed: Set[Node]) -> _Walk:
    """Go back from some functions to the sources, through none of ``closed``.

    What is older than the source cannot have read it, and is not walked.
    """
    oldest = min(_age(node) for node, _ in sources)
    readers: list[Edge] = []
    entries: list[Edge] = []
    waiting = list(starts)
    met = set(waiting)
    while waiting:
        node = waiting.pop()
        for place, (following, output) in enumerate(node.next_functions):
            if following is None:
                continue
            if (following, output) in sources:
                readers.append((node, place))
            elif following in closed:
                entries.append((following, output))
            elif following not in met and following._sequence_nr() > oldest:
                met.add(following)
                waiting.append(following)
    return _Walk(readers=readers, met=met, entries=entries)


def _age(node: Node) -> int:
    """Below the number of every function that can have read what this one makes.

    A leaf has none, and the function of a view is made anew when it is first read after a write into its base.
    """
    return node._sequence_nr() if node.next_functions and not node.name().startswith(_OF_VIEWS) else -1


_OF_VIEWS = ("AsStrided", "View", "Slice", "Select", "Unsafe", "Transpose", "Permute", "Squeeze", "Unsqueeze")
