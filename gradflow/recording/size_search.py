"""Which side of an image (or length of a signal) gives a layer the flattened size that it wants."""

from __future__ import annotations

from dataclasses import dataclass

# The likeliest first: of two that fit as well, 96 is meant more often than 100.
COMMON_SIDES = (
    *(32, 28, 64, 224, 96, 128, 48, 256, 84, 16, 227, 299, 112, 160, 192, 40, 56, 20, 24),
    *(80, 100, 240, 320, 384, 512, 14, 8, 10, 12, 4),
)
LARGEST_SIDE = 2**17
"""Of a signal; a guess knows what an image can afford."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One side and the flattened size that came of it."""

    side: int
    size: int


def next_sides(tried: tuple[Tried, ...], wanted: int, dims: int) -> tuple[int, ...]:
    """Propose the sides to try next, the likeliest first; none when no side is left.

    The flattened size of a convolutional network grows with side**dims and never shrinks, so two tries
    give a line through size**(1/dims) and every try narrows the interval. Sides that people use are tried
    before the numbers around them.
    """
    low = max((t.side for t in tried if t.size < wanted), default=0)
    high = min((t.side for t in tried if t.size > wanted), default=LARGEST_SIDE + 1)
    if high - low <= 1:
        return ()
    expected = min(max(_estimate(tried, wanted, dims), low + 1), high - 1)
    likely = {side: abs(side - expected) + rank // 4 for rank, side in enumerate(COMMON_SIDES)}
    common = sorted((side for side in COMMON_SIDES if low < side < high), key=likely.__getitem__)
    near = [s for s in common if abs(s - expected) <= max(4, expected // 4)]
    middle = (low + high) // 2 if high <= LARGEST_SIDE else low * 2
    seen = {t.side for t in tried}
    proposals = dict.fromkeys((*near[:3], expected, middle))
    return tuple(side for side in proposals if low < side < high and side not in seen)


def _estimate(tried: tuple[Tried, ...], wanted: int, dims: int) -> int:
    goal = _root(wanted, dims)
    points = sorted({(t.side, _root(t.size, dims)) for t in tried}, key=lambda point: abs(point[1] - goal))
    side, reached = points[0]
    if len(points) > 1 and points[1][1] != reached:
        slope = (points[1][0] - side) / (points[1][1] - reached)
        return round(side + (goal - reached) * slope)
    return round(side * goal / max(reached, 1e-9))


def _root(size: int, dims: int) -> float:
    return float(size ** (1 / max(dims, 1)))
