"""What other tools' published rules say about a model: AutoTrainer, SageMaker Debugger, TheDeepChecker, TorchLens,
torchmortem.

Each rule is written here from its published definition and default thresholds, and sees what its tool would see in one
forward and backward: ``look`` runs them and takes the numbers down. Rules that need a whole training run (a loss that
oscillates, updates, a trend over steps) have nothing to say about one step and are left out; that is said in
``docs/evidence.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

VANISHING, EXPLODING, DEAD, SATURATED, NON_FINITE, NO_GRADIENT = (
    "vanishing",
    "exploding",
    "dead units",
    "saturated units",
    "non-finite",
    "no gradient",
)
ACTIVATIONS = (nn.ReLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Softmax)
NEAREST = {
    VANISHING: ("GF101",),
    EXPLODING: ("GF102",),
    DEAD: ("GF301",),
    SATURATED: ("GF302",),
    NON_FINITE: ("GF303", "GF104"),
    NO_GRADIENT: ("GF103", "GF204"),
}
"""gradflow's rules for the same fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """The gradient of one parameter, in the order of ``named_parameters``; only those that got one."""

    name: str
    kernel: bool
    """Two dimensions or more; also the scale of a normalisation, which Keras stores where a kernel stands."""
    size: int
    norm: float
    mean_magnitude: float
    zeros: int
    finite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """One call of ReLU, tanh or sigmoid; a unit is a channel of images, else a feature."""

    op: str
    active: tuple[float, ...]
    """Share of the observations in which each unit's output is above 0."""
    inside: tuple[float, ...]
    """Share in which its input is inside SageMaker Debugger's limits of tanh and sigmoid; empty for ReLU."""
    magnitude95: tuple[float, ...]
    """The 95th percentile of each unit's output, without its sign."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What a tool can see of one forward and backward."""

    gradients: tuple[Gradient, ...]
    without: tuple[str, ...]
    """Parameters that ask for a gradient and got none."""
    units: tuple[Units, ...]
    ops: tuple[float, ...]
    """L2 norm of the gradient at the output of each op that received one."""
    layers: tuple[float, ...]
    """L2 norm of the gradient at the output of each leaf module with trainable parameters, in the order of
    ``named_modules``; 0 where none arrived, as torchmortem stores it."""
    near_zero: tuple[float, ...]
    """Share of the elements below 1e-6 that each activation module, or leaf module with parameters, returned."""
    finite: bool
    """No op returned a NaN or an Inf."""


class _Watcher(TorchFunctionMode):
    """Notes every op's output: its gradient when it comes, and the units of ReLU, tanh and sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[float] = []
        self.units: list[Units] = []
        self.finite = True

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "").rstrip("_")
        watched = name in ("relu", "tanh", "sigmoid") and args and isinstance(args[0], Tensor)
        before = args[0].detach().clone() if watched else None
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self.finite = self.finite and bool(torch.isfinite(out).all())
                if before is not None:
                    self.units.append(_units(name, before, out.detach()))
                if out.requires_grad and out.grad_fn is not None:
                    out.register_hook(lambda gradient: self.ops.append(float(gradient.norm())))
        return out


def _units(op: str, before: Tensor, after: Tensor) -> Units:
    channel = 1 if after.dim() == 4 else -1
    rows = after.movedim(channel, -1).flatten(0, -2)
    inputs = before.movedim(channel, -1).flatten(0, -2)
    limits = {"tanh": (-9.4999, 9.4999), "sigmoid": (-23.0, 16.99999)}.get(op)
    inside = ((inputs > limits[0]) & (inputs < limits[1])).float().mean(0) if limits else None
    return Units(
        op=op,
        active=tuple((rows > 0).float().mean(0).tolist()),
        inside=() if inside is None else tuple(inside.tolist()),
        magnitude95=tuple(torch.quantile(rows[:4096].abs(), 0.95, dim=0).tolist()),
    )


def look(module: nn.Module, inputs: Sequence[Tensor], loss: Callable[[Any, Any], Tensor]) -> Sight:
    """Run one forward and backward and take down what the tools would; the module is used up by it."""
    module.zero_grad(set_to_none=True)
    norms: dict[str, float] = {}
    near_zero: dict[str, float] = {}
    leaves = [(name, part) for name, part in module.named_modules() if not list(part.children())]
    names = [name for name, part in leaves if any(p.requires_grad for p in part.parameters(recurse=False))]
    hooks = [part.register_forward_hook(_layer_hook(name, norms, near_zero)) for name, part in leaves]
    with _Watcher() as watcher:
        value = loss(module(*inputs), inputs)
    value.backward()
    for hook in hooks:
        hook.remove()
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return Sight(
        gradients=tuple(_gradient(name, p) for name, p in trainable if p.grad is not None),
        without=tuple(name for name, p in trainable if p.grad is None),
        units=tuple(watcher.units),
        ops=tuple(watcher.ops),
        layers=tuple(norms.get(name, 0.0) for name in names),
        near_zero=tuple(near_zero.values()),
        finite=watcher.finite,
    )


def _layer_hook(name: str, norms: dict[str, float], near_zero: dict[str, float]) -> Callable[..., None]:
    def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(module, ACTIVATIONS) or list(module.parameters(recurse=False)):
            near_zero[name] = float((first.detach().abs() < 1e-6).float().mean())
        if first.requires_grad and first.grad_fn is not None:
            first.register_hook(lambda gradient: norms.__setitem__(name, float(gradient.norm())))

    return hook


def _gradient(name: str, parameter: nn.Parameter) -> Gradient:
    values = parameter.grad.detach()
    return Gradient(
        name=name,
        kernel=parameter.dim() > 1,
        size=values.numel(),
        norm=float(values.norm()),
        mean_magnitude=float(values.abs().mean()),
        zeros=int((values == 0).sum()),
        finite=bool(torch.isfinite(values).all()),
    )


def auto_trainer(sight: Sight) -> Iterator[str]:
    """AutoTrainer (Zhang et al., ICSE 2021), its defaults beta_1 = 1e-3, beta_2 = 1e-4, beta_3 = 70, gamma = 0.7."""
    if not all(gradient.finite for gradient in sight.gradients):
        yield EXPLODING
        return
    kernels = [gradient.norm for gradient in sight.gradients if gradient.kernel]
    if len(kernels) > 1:
        ratio = kernels[0] / kernels[-1] if kernels[-1] else math.inf if kernels[0] else math.nan
        if ratio < 1e-3 and kernels[0] < 1e-4:
            yield VANISHING
        if ratio > 70:
            yield EXPLODING
    size = sum(gradient.size for gradient in sight.gradients)
    if size and sum(gradient.zeros for gradient in sight.gradients) / size >= 0.7:
        yield DEAD


def sagemaker_debugger(sight: Sight) -> Iterator[str]:
    """SageMaker Debugger's built-in rules VanishingGradient, ExplodingTensor, DeadRelu and SaturatedActivation."""
    if any(gradient.mean_magnitude < 1e-7 for gradient in sight.gradients):
        yield VANISHING
    if not sight.finite or not all(gradient.finite for gradient in sight.gradients):
        yield NON_FINITE
    if any(u.op == "relu" and _share(a < 0.01 for a in u.active) > 0.5 for u in sight.units):
        yield DEAD
    if any(u.inside and _share(i < 0.01 for i in u.inside) > 0.5 for u in sight.units):
        yield SATURATED


def the_deep_checker(sight: Sight) -> Iterator[str]:
    """TheDeepChecker (Ben Braiek and Khomh, TOSEM 2023): mean magnitudes of weight gradients, and dead layers."""
    kernels = [gradient for gradient in sight.gradients if gradient.kernel]
    if any(gradient.mean_magnitude < 1e-6 for gradient in kernels):
        yield VANISHING
    if any(gradient.mean_magnitude > 1e6 for gradient in kernels):
        yield EXPLODING
    if not sight.finite or not all(gradient.finite for gradient in kernels):
        yield NON_FINITE
    if any(u.op == "relu" and _share(m < 1e-5 for m in u.magnitude95) > 0.5 for u in sight.units):
        yield DEAD


def torch_lens(sight: Sight) -> Iterator[str]:
    """TorchLens 2.36, ``tl.debug.gradient_flow_audit`` at its defaults: 1e-7, 1e4, and exact zeros."""
    if any(norm == 0 for norm in sight.ops):
        yield NO_GRADIENT
    if any(0 < norm < 1e-7 for norm in sight.ops):
        yield VANISHING
    if any(not math.isfinite(norm) or norm > 1e4 for norm in sight.ops):
        yield EXPLODING


def torch_mortem(sight: Sight) -> Iterator[str]:
    """torchmortem 0.1.1, ``gradient_flow`` and ``dead_units`` at their defaults: last/first 100, 1e3, 1e-8, 0.5."""
    layers = sight.layers
    if len(layers) > 1:
        ratio = math.inf if layers[0] < 1e-30 else 0.0 if layers[-1] < 1e-30 else layers[-1] / layers[0]
        if ratio >= 100:
            yield VANISHING
        if any(norm > 1e3 for norm in layers):
            yield EXPLODING
        if any(norm < 1e-8 for norm in layers):
            yield NO_GRADIENT
    if any(share > 0.5 for share in sight.near_zero):
        yield DEAD


def _share(values: Iterator[bool]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else 0.0


RIVALS: tuple[tuple[str, Callable[[Sight], Iterator[str]]], ...] = (
    ("AutoTrainer", auto_trainer),
    ("SageMaker Debugger", sagemaker_debugger),
    ("TheDeepChecker", the_deep_checker),
    ("TorchLens", torch_lens),
    ("torchmortem", torch_mortem),
)
