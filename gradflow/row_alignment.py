"""Which row of one table is which row of another: by name, then by position."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import StrEnum

_MOST_COMPARISONS = 4_000_000
"""Rows of one gap times rows of the other up to which the best alignment is looked for."""


class AlignedBy(StrEnum):
    """What brought two rows together, or that nothing did."""

    NAME = "name"
    POSITION = "position"
    ONLY_A = "only a"
    ONLY_B = "only b"


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedPair:
    """Positions of a row in both tables; None where it has no partner."""

    a: int | None
    b: int | None
    by: AlignedBy


@dataclass(frozen=True, slots=True, kw_only=True)
class RowIdentity:
    """What a row is known by."""

    name: tuple[Hashable, ...]
    make: Hashable
    """What a renamed row keeps: the class of its module."""


def align(
    a: Sequence[RowIdentity], b: Sequence[RowIdentity], *, same_make: bool = False
) -> list[AlignedPair]:
    """Every row of both tables once, in the order of ``b`` with the rows of ``a`` alone where they stood.

    Rows of one name belong together; of several, the first to the first. The others are compared within the
    gaps between those, in order: rows of one make first, then as many of one kind as of the other.

    Args:
        a: The rows of the table before.
        b: The rows of the table after.
        same_make: Only rows of one make are ever aligned by position.
    """
    named = _by_name(a, b)
    gaps_a, gaps_b = _gaps(named, len(a)), _gaps({at: at for at in named.values()}, len(b))
    pairs = [AlignedPair(a=left, b=right, by=AlignedBy.NAME) for left, right in named.items()]
    for gap in gaps_a.keys() | gaps_b.keys():
        pairs += _within(gaps_a[gap], gaps_b[gap], a, b, same_make)
    return _ordered(pairs)


def _by_name(a: Sequence[RowIdentity], b: Sequence[RowIdentity]) -> dict[int, int]:
    places = {key: at for at, key in enumerate(_numbered(b))}
    return {at: places[key] for at, key in enumerate(_numbered(a)) if key in places}


def _numbered(rows: Sequence[RowIdentity]) -> Iterator[tuple[Hashable, int]]:
    seen: Counter[Hashable] = Counter()
    for row in rows:
        yield row.name, seen[row.name]
        seen[row.name] += 1


def _gaps(named: dict[int, int], count: int) -> defaultdict[int, list[int]]:
    """Rows without a namesake, by the row of ``b`` that their nearest named neighbour before them belongs to."""
    gaps: defaultdict[int, list[int]] = defaultdict(list)
    last = -1
    for at in range(count):
        last = named.get(at, last)
        if at not in named:
            gaps[last].append(at)
    return gaps


def _within(
    left: list[int], right: list[int], a: Sequence[RowIdentity], b: Sequence[RowIdentity], same_make: bool
) -> Iterator[AlignedPair]:
    makes_a, makes_b = [a[at].make for at in left], [b[at].make for at in right]
    found = dict(_matches(makes_a, makes_b, same_make))
    for at, place in enumerate(left):
        partner = right[found[at]] if at in found else None
        by = AlignedBy.ONLY_A if partner is None else AlignedBy.POSITION
        yield AlignedPair(a=place, b=partner, by=by)
    taken = set(found.values())
    for at, place in enumerate(right):
        if at not in taken:
            yield AlignedPair(a=None, b=place, by=AlignedBy.ONLY_B)


def _matches(a: list[Hashable], b: list[Hashable], same_make: bool) -> Iterator[tuple[int, int]]:
    if a == b:
        yield from enumerate(range(len(a)))
        return
    if len(a) * len(b) > _MOST_COMPARISONS:
        yield from ((at, at) for at, (x, y) in enumerate(zip(a, b, strict=False)) if x == y)
        return
    for what, a0, a1, b0, b1 in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if what == "equal" or (what == "replace" and a1 - a0 == b1 - b0 and not same_make):
            yield from zip(range(a0, a1), range(b0, b1), strict=True)


def _ordered(pairs: list[AlignedPair]) -> list[AlignedPair]:
    partners = sorted((pair.a, pair.b) for pair in pairs if pair.a is not None and pair.b is not None)
    places: dict[int, int] = {}
    last, at = -1, 0
    lonely = sorted(pair.a for pair in pairs if pair.a is not None and pair.b is None)
    for alone in lonely:
        while at < len(partners) and partners[at][0] < alone:
            last, at = partners[at][1], at + 1
        places[alone] = last
    return sorted(
        pairs,
        key=lambda pair: (pair.b, 0, 0) if pair.b is not None else (places[pair.a or 0], 1, pair.a or 0),
    )
