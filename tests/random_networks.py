"""Random networks that know their own residual sites.

A network is a row of pieces on one stream: (batch, features), (batch, tokens, features) or (batch, channels, height,
width), in float64. Each piece is written twice on the same parameters: ``forward`` in one of the many ways people
write a residual connection, and ``explicit``, plainly, which hands both operands of each add to a :class:`Witness`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

STREAMS = ("features", "tokens", "image")
SIDE = 4


@dataclass(kw_only=True)
class Seen:
    """One site as the plain reading of the network saw it."""

    name: str
    index: int
    call: int
    kind: str
    source: Tensor
    skip: Tensor
    branch: Tensor
    total: Tensor
    branches: int = 1
    in_place: bool = False
    parent: int | None = None
    branch_scale: float | None = None
    skip_scale: float | None = None


@dataclass
class Witness:
    """Collects sites in the order in which their adds run."""

    sites: list[Seen] = field(default_factory=list)
    _calls: Counter[str] = field(default_factory=Counter)
    _here: Counter[tuple[str, int]] = field(default_factory=Counter)

    def called(self, name: str) -> int:
        """Count a call of a module; the root's own adds are all in call 0."""
        self._calls[name] += 1
        return self._calls[name] - 1

    def add(
        self, name: str, call: int, first: int, source: Tensor, skip: Tensor, branch: Tensor, **of: Any
    ) -> Tensor:
        """Add, and note a site whose branch holds the sites from position ``first`` on."""
        total = skip + branch
        for tensor in (source, total):
            if tensor.requires_grad:
                tensor.retain_grad()
        for inner in self.sites[first:]:
            inner.parent = len(self.sites) if inner.parent is None else inner.parent
        index = self._here[name, call]
        self._here[name, call] += 1
        site = Seen(
            name=name, index=index, call=call, source=source, skip=skip, branch=branch, total=total, **of
        )
        self.sites.append(site)
        return total


def rms(tensor: Tensor) -> float:
    return tensor.detach().square().mean().sqrt().item()


class Layer(nn.Module):
    """A weight layer of a stream: linear, or a 3x3 convolution; called as a module or as a function."""

    def __init__(
        self, stream: str, inside: int, outside: int, *, functional: bool, size: int = 3, stride: int = 1
    ) -> None:
        super().__init__()
        self.stride, self.pad, self.functional = stride, size // 2, functional
        core = (
            nn.Conv2d(inside, outside, size, stride, size // 2)
            if stream == "image"
            else nn.Linear(inside, outside)
        )
        if functional:
            self.weight, self.bias = core.weight, core.bias
        else:
            self.core = core

    def forward(self, x: Tensor) -> Tensor:
        if not self.functional:
            return self.core(x)
        if self.weight.dim() == 4:
            return F.conv2d(x, self.weight, self.bias, self.stride, self.pad)
        return F.linear(x, self.weight, self.bias)


def norm_of(stream: str, width: int) -> nn.Module:
    return nn.GroupNorm(1, width) if stream == "image" else nn.LayerNorm(width)


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # as written, and as the plain reading computes it
    "relu": (F.relu, F.relu),
    "relu in place": (lambda z: F.relu(z, inplace=True), F.relu),
    "relu_": (lambda z: z.relu_(), F.relu),
    "tanh": (torch.tanh, torch.tanh),
    "gelu": (F.gelu, F.gelu),
    "silu": (F.silu, F.silu),
}


class Body(nn.Module):
    """What a branch is made of: a norm perhaps, a layer, an activation, perhaps a residual block, a layer."""

    def __init__(
        self, stream: str, inside: int, hidden: int, outside: int, plan: BodyPlan, inner: Residual | None
    ) -> None:
        super().__init__()
        self.norm = norm_of(stream, inside) if plan.norm_first else nn.Identity()
        self.first = Layer(stream, inside, hidden, functional=plan.functional, stride=plan.stride)
        self.inner = inner
        self.last = Layer(stream, hidden, outside, functional=plan.functional)
        self.after = norm_of(stream, outside) if plan.norm_last else nn.Identity()
        self.written, self.plainly = ACTIVATIONS[plan.activation]

    def forward(self, x: Tensor) -> Tensor:
        x = self.written(self.first(self.norm(x)))
        if self.inner is not None:
            x = self.inner(x)
        return self.after(self.last(x))

    def explicit(self, x: Tensor, path: str, witness: Witness) -> Tensor:
        x = self.plainly(self.first(self.norm(x)))
        if self.inner is not None:
            x = self.inner.explicit(x, f"{path}.inner", witness)
        return self.after(self.last(x))


@dataclass(frozen=True, kw_only=True)
class BodyPlan:
    norm_first: bool = False
    norm_last: bool = False
    functional: bool = False
    activation: str = "relu"
    stride: int = 1


class Joined(torch.autograd.Function):
    """An add with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor) -> Tensor:
        return x + f

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient


# How the add is written. In place only where autograd still has what it needs: a copy, or the branch.
SPELLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x + f": lambda x, f: x + f,
    "f + x": lambda x, f: f + x,
    "torch.add(x, f)": lambda x, f: torch.add(x, f),
    "torch.add(f, x)": lambda x, f: torch.add(f, x),
    "torch.add(input, other)": lambda x, f: torch.add(input=x, other=f),
    "x.add(f)": lambda x, f: x.add(f),
    "f.add_(x)": lambda x, f: f.add_(x),
    "f += x": lambda x, f: f.__iadd__(x),
    "copy += f": lambda x, f: x.clone().__iadd__(f),
    "x.add(f, alpha=)": lambda x, f: x.add(f, alpha=0.5),
    "torch.add(f, x, alpha=)": lambda x, f: torch.add(f, x, alpha=0.75),
    "f.add_(x, alpha=)": lambda x, f: f.add_(x, alpha=-1.5),
    "x - f": lambda x, f: x - f,
    "torch.sub(x, f, alpha=)": lambda x, f: torch.sub(x, f, alpha=2),
    "copy -= f": lambda x, f: x.clone().__isub__(f),
    "addcmul": lambda x, f: torch.addcmul(x, f, torch.full((1,), 0.5, dtype=f.dtype), value=0.5),
    "addcmul of x": lambda x, f: torch.addcmul(f, x, torch.full((1,), 0.5, dtype=f.dtype)),
    "lerp": lambda x, f: torch.lerp(x, f, 0.25),
    "f.lerp_(x)": lambda x, f: f.lerp_(x, 0.375),
    "sum([x, f])": lambda x, f: sum([x, f]),
    "stack, sum": lambda x, f: torch.stack([f, x]).sum(0),
    "torch.sum(stack)": lambda x, f: torch.sum(torch.stack((x, f), -1), dim=-1),
    "stack, mean": lambda x, f: torch.stack([x, f], 1).mean(1),
    "a x + b f": lambda x, f: x * 0.5 + f * 2,
    "aten.add": lambda x, f: torch.ops.aten.add.Tensor(x, f),
    "custom function": lambda x, f: Joined.apply(x, f),
}
IN_PLACE = ("f.add_(x)", "f += x", "copy += f", "f.add_(x, alpha=)", "copy -= f", "f.lerp_(x)")
OPAQUE = "custom function"
# What some spellings multiply skip and branch by.
MULTIPLIES = {
    "x.add(f, alpha=)": (1.0, 0.5),
    "torch.add(f, x, alpha=)": (0.75, 1.0),
    "f.add_(x, alpha=)": (-1.5, 1.0),
    "x - f": (1.0, -1.0),
    "torch.sub(x, f, alpha=)": (1.0, -2.0),
    "copy -= f": (1.0, -1.0),
    "addcmul": (1.0, 0.25),
    "addcmul of x": (0.5, 1.0),
    "lerp": (0.75, 0.25),
    "f.lerp_(x)": (0.375, 0.625),
    "stack, mean": (0.5, 0.5),
    "a x + b f": (0.5, 2.0),
}

# Ops that keep the values; each gets the tensor and must return one of its shape.
KEEPING: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    ".to(dtype)": lambda x: x.to(torch.float64),
    ".contiguous()": lambda x: x.contiguous(),
    ".clone()": lambda x: x.clone(),
    ".view": lambda x: x.contiguous().view(len(x), -1).view(x.shape),
    ".reshape": lambda x: x.reshape(-1).reshape(x.shape),
    ".transpose": lambda x: x.transpose(0, 1).transpose(0, 1),
    "[:]": lambda x: x[:, :],
    "chunk, cat": lambda x: x.unsqueeze(0)[0],
    "dropout": lambda x: F.dropout(x, 0.25),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One residual block. ``spelling`` and ``keeping`` are keys of the tables above."""

    spelling: str = "x + f"
    skip_keeping: str = "nothing"
    branch_keeping: str = "nothing"
    bodies: tuple[BodyPlan, ...] = (BodyPlan(),)
    left_first: bool = False
    """(x + a) + b instead of x + (a + b)."""
    skip_scale: str = ""
    """"", "number" or "parameter"."""
    branch_scale: str = ""
    """"", "number", "division", "parameter", "channels" or "zero"."""
    projection: bool = False
    inner: Plan | None = None
    after: str = ""
    """"", "norm", "relu" or "relu_"."""
    in_root: bool = False


class Residual(nn.Module):
    """A residual block as its plan says."""

    def __init__(self, stream: str, inside: int, outside: int, hidden: int, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        inner = None if plan.inner is None else Residual(stream, hidden, hidden, hidden, plan.inner)
        self.bodies = nn.ModuleList(
            Body(stream, inside, hidden, outside, body, inner if at == 0 else None)
            for at, body in enumerate(plan.bodies)
        )
        stride = plan.bodies[0].stride
        self.shortcut = (
            nn.Sequential(
                Layer(stream, inside, outside, functional=False, size=1, stride=stride),
                norm_of(stream, outside),
            )
            if plan.projection
            else None
        )
        shape = (outside, 1, 1) if stream == "image" else (outside,)
        self.gamma = nn.Parameter(torch.rand(shape) + 0.1) if plan.branch_scale == "channels" else None
        self.alpha = nn.Parameter(torch.tensor(0.3)) if plan.branch_scale == "parameter" else None
        if plan.branch_scale == "zero":
            self.alpha = nn.Parameter(torch.tensor(0.0))
        self.beta = nn.Parameter(torch.tensor(0.7)) if plan.skip_scale == "parameter" else None
        self.norm = norm_of(stream, outside) if plan.after == "norm" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.write(x)

    def write(self, x: Tensor) -> Tensor:
        """The block as people write it; called by the root, its adds are the root's."""
        plan, add = self.plan, SPELLINGS[self.plan.spelling]
        parts = [self.branch_kept(self.scaled(body(x))) for body in self.bodies]
        skip = self.skip(x)
        if len(parts) == 1:
            total = add(skip, parts[0])
        elif plan.left_first:
            total = (skip + parts[0]) + parts[1]
        else:
            total = add(skip, parts[0] + parts[1])
        if plan.after == "relu_":
            return total.relu_()
        return F.relu(total) if plan.after == "relu" else self.norm(total)

    def explicit(self, x: Tensor, path: str, witness: Witness) -> Tensor:
        plan = self.plan
        call = 0 if plan.in_root else witness.called(path)
        first = len(witness.sites)
        prefix = self.path if plan.in_root else path
        parts = [
            self.branch_kept(self.scaled(body.explicit(x, f"{prefix}.bodies.{at}", witness)))
            for at, body in enumerate(self.bodies)
        ]
        by_skip, by_branch = self.multiplies()
        total = witness.add(
            path,
            call,
            first,
            source=x,
            skip=by_skip * self.skip(x) if by_skip != 1 else self.skip(x),
            branch=by_branch * sum(parts[1:], parts[0]),
            kind=self.kind(),
            branches=len(parts),
            in_place=plan.spelling in IN_PLACE and not self.twice(),
            branch_scale=self.branch_factor(),
            skip_scale=self.skip_factor() if self.kind() == "scaled" else None,
        )
        return F.relu(total) if plan.after.startswith("relu") else self.norm(total)

    def skip(self, x: Tensor) -> Tensor:
        x = KEEPING[self.plan.skip_keeping](x)
        if self.shortcut is not None:
            return self.shortcut(x)
        if self.beta is not None:
            return x * self.beta
        return 0.5 * x if self.plan.skip_scale == "number" else x

    def branch_kept(self, f: Tensor) -> Tensor:
        return KEEPING[self.plan.branch_keeping](f)

    def scaled(self, f: Tensor) -> Tensor:
        if self.plan.branch_scale == "number":
            return f * 0.25
        if self.plan.branch_scale == "division":
            return f / 4.0
        factor = self.gamma if self.gamma is not None else self.alpha
        return f if factor is None else factor * f

    def twice(self) -> bool:
        """Two branches are added one after the other, each with a plain add."""
        return len(self.plan.bodies) > 1 and self.plan.left_first

    def multiplies(self) -> tuple[float, float]:
        return (1.0, 1.0) if self.twice() else MULTIPLIES.get(self.plan.spelling, (1.0, 1.0))

    def kind(self) -> str:
        if self.plan.spelling == OPAQUE and not self.twice():
            return "opaque"
        if self.plan.projection:
            return "projection"
        return "scaled" if self.plan.skip_scale or self.multiplies()[0] != 1 else "identity"

    def branch_factor(self) -> float | None:
        """Of one branch its own factor counts, of two only what the spelling multiplies their sum by."""
        number = self.multiplies()[1]
        own: float | None = None
        if len(self.bodies) == 1:
            factor = self.gamma if self.gamma is not None else self.alpha
            if self.plan.branch_scale in ("number", "division"):
                own = 0.25
            elif factor is not None:
                own = rms(factor)
        return number * (1 if own is None else own) if number != 1 or own is not None else None

    def skip_factor(self) -> float | None:
        own = rms(self.beta) if self.beta is not None else 0.5 if self.plan.skip_scale == "number" else None
        number = self.multiplies()[0]
        return number * (1 if own is None else own) if number != 1 or own is not None else None

    path = ""
    """Where the root keeps it."""


class Decoy(nn.Module):
    """Adds that are no residual connections."""

    def __init__(self, stream: str, width: int, kind: str) -> None:
        super().__init__()
        self.kind, self.stream = kind, stream
        shape = (width, 1, 1) if stream == "image" else (width,)
        self.scale, self.shift = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
        self.one = Layer(stream, width, width, functional=False)
        self.two = Layer(stream, width, width, functional=True)

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "bias":
                return x + self.shift
            case "constant":
                return x + torch.ones_like(x)
            case "polynomial":
                return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x.pow(3))))
            case "response norm":
                energy = (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
                return self.scale * (x * (energy / (energy.mean() + 1e-6))) + self.shift + x
            case "gate of itself":
                return x + x * torch.sigmoid(x)
            case "two heads":
                return self.one(x) + self.two(x)
            case "broadcast mean":
                return x + x.mean(dim=0, keepdim=True)
            case "rotation":
                turned = torch.cat((-x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]), dim=1)
                return x * torch.cos(self.scale.detach()) + turned * torch.sin(self.scale.detach())
        return F.relu(self.one(x))  # "plain"


DECOYS = (
    "bias",
    "constant",
    "polynomial",
    "response norm",
    "gate of itself",
    "two heads",
    "broadcast mean",
    "rotation",
    "plain",
)


class Network(nn.Module):
    """A stem, pieces and a head; some pieces are written in the root's own forward, some come again."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        torch.manual_seed(spec.seed)
        self.spec = spec
        pieces: list[nn.Module] = []
        width = spec.width
        for piece in spec.pieces:
            if isinstance(piece, str):
                pieces.append(Decoy(spec.stream, width, piece))
                continue
            outside = width + 2 if piece.projection else width
            block = Residual(spec.stream, width, outside, spec.hidden, piece)
            block.path = f"pieces.{len(pieces)}"
            pieces.append(block)
            width = outside
        self.stem = (
            Layer(spec.stream, spec.width, spec.width, functional=False) if spec.stem else nn.Identity()
        )
        self.pieces = nn.ModuleList(pieces)
        self.order = [at for at, again in enumerate(spec.again) for _ in range(2 if again else 1)]
        self.head = Layer(spec.stream, width, 3, functional=False)
        self.double()

    def inputs(self) -> Tensor:
        spec = self.spec
        shape = {
            "features": (spec.batch, spec.width),
            "tokens": (spec.batch, spec.tokens, spec.width),
            "image": (spec.batch, spec.width, SIDE, SIDE),
        }[spec.stream]
        return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(spec.seed))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for at in self.order:
            piece = self.pieces[at]
            in_root = isinstance(piece, Residual) and piece.plan.in_root
            x = piece.write(x) if in_root else piece(x)
        return self.head(x)

    def explicit(self, x: Tensor, witness: Witness) -> Tensor:
        x = self.stem(x)
        for at in self.order:
            piece = self.pieces[at]
            if isinstance(piece, Residual):
                x = piece.explicit(x, "" if piece.plan.in_root else piece.path, witness)
            else:
                x = piece(x)
        return self.head(x)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A network on paper."""

    seed: int
    stream: str
    batch: int
    tokens: int
    width: int
    hidden: int
    stem: bool
    pieces: tuple[Plan | str, ...]
    again: tuple[bool, ...]
    """Which pieces run twice."""


def body_plans(*, stride: int = 1, in_place: bool = False) -> st.SearchStrategy[BodyPlan]:
    return st.builds(
        BodyPlan,
        norm_first=st.booleans(),
        norm_last=st.booleans(),
        functional=st.booleans(),
        activation=st.sampled_from(tuple(ACTIVATIONS)),
        stride=st.just(stride),
    )


@st.composite
def plans(draw: st.DrawFn, *, stream: str, depth: int = 0) -> Plan:
    """A block; one level of nesting, a projection only on the outer level."""
    kind = draw(
        st.sampled_from(("identity", "identity", "scaled", "projection" if depth == 0 else "identity"))
    )
    projection = kind == "projection"
    stride = draw(st.sampled_from((1, 2))) if projection and stream == "image" else 1
    parallel = kind == "identity" and draw(st.integers(0, 4)) == 4
    inner = draw(plans(stream=stream, depth=1)) if depth == 0 and draw(st.integers(0, 3)) == 3 else None
    return Plan(
        spelling=draw(st.sampled_from(tuple(SPELLINGS))),
        skip_keeping=draw(st.sampled_from(tuple(KEEPING))),
        branch_keeping=draw(st.sampled_from(tuple(KEEPING))),
        bodies=tuple(draw(body_plans(stride=stride)) for _ in range(2 if parallel else 1)),
        left_first=draw(st.booleans()),
        skip_scale=draw(st.sampled_from(("number", "parameter"))) if kind == "scaled" else "",
        branch_scale=draw(st.sampled_from(("", "", "number", "division", "parameter", "channels", "zero"))),
        projection=projection,
        inner=inner,
        after=draw(st.sampled_from(("", "norm", "relu", "relu_"))),
        in_root=depth == 0 and draw(st.integers(0, 4)) == 4,
    )


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """A network of one to six pieces."""
    stream = draw(st.sampled_from(STREAMS))
    piece = st.one_of(plans(stream=stream), plans(stream=stream), st.sampled_from(DECOYS))
    pieces = tuple(draw(st.lists(piece, min_size=1, max_size=6)))
    # Running twice wants the shape to stay, and a count of calls.
    again = tuple(
        draw(st.integers(0, 5)) == 5 and not (isinstance(p, Plan) and (p.projection or p.in_root))
        for p in pieces
    )
    return Spec(
        seed=draw(st.integers(0, 2**16)),
        stream=stream,
        batch=draw(st.integers(2, 5)),
        tokens=draw(st.integers(2, 5)),
        width=2 * draw(st.integers(2, 4)),
        hidden=draw(st.integers(3, 7)),
        stem=draw(st.booleans()),
        pieces=pieces,
        again=again,
    )
