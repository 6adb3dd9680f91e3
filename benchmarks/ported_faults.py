"""Faults of other people's benchmarks that one forward and backward can show, rebuilt in PyTorch.

    python benchmarks/ported_faults.py

From deepmufl (Ghanbari et al., ASE 2023: 109 bugs from Stack Overflow) the nine whose fault is an activation, an
initialisation or the scale of the data, each with what the published tables say that five tools found; from
TheDeepChecker (Ben Braiek and Khomh, TOSEM 2023: 21 synthetic kinds of fault) the kinds ``wrong_init``,
``wrong_activation``, ``missing_normalization`` and ``redundant_softmax``, next to its two clean programs. Faults of
learning rate, loss choice, labels, batches or epochs need a training run, and are not here.

Layers, initial values and losses are those of the originals, with Keras' defaults where they say nothing (Glorot
uniform, biases 0). The data are not: scikit-learn's digits, enlarged to 28×28, stand in for MNIST, and generated
numbers of the same shape and scale for tables. *Caught* means a warning or an error from at least two of three seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow

Loss = Callable[[Tensor, Tensor], Tensor]
Built = tuple[nn.Module, Tensor, Tensor, Loss]
SEEDS = (0, 1, 2)
BATCH = 64
TOOLS = ("deepmufl", "DeepDiagnosis", "DeepLocalize", "UMLAUT", "NeuraLint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One program; ``healthy`` ones are to be left alone."""

    name: str
    what: str
    build: Callable[[], Built]
    found_by: tuple[str, ...] | None = None
    """The tools that found it, by deepmufl's tables (its own: MUSE, all mutants); None where they do not say."""
    healthy: bool = False


class Outer(nn.Module):
    """An activation behind a net, such as a softmax that should not be there."""

    def __init__(self, net: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.net, self.activation = net, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.net(x))


def keras(module: nn.Module, weights: Callable[[Tensor], Any] | None = None) -> nn.Module:
    """Initialise as Keras does: Glorot uniform or ``weights``, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d):
            (weights or nn.init.xavier_uniform_)(part.weight)
            nn.init.zeros_(part.bias)
    return module


def uniform(weight: Tensor) -> None:
    """Keras' "uniform": within 0.05."""
    nn.init.uniform_(weight, -0.05, 0.05)


def normal(std: float) -> Callable[[Tensor], Any]:
    """Keras' "normal" has 0.05."""
    return lambda weight: nn.init.normal_(weight, std=std)


def dense(sizes: Sequence[int], activation: Callable[[], nn.Module], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers of these sizes with an activation, and a dropout, between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), activation()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers[: -2 if dropout else -1])


def table(features: int, targets: int = 1, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Normal numbers, and a linear function of them."""
    x = scale * torch.randn(BATCH, features)
    return x, x @ torch.randn(features, targets) / features**0.5


def classified(features: int, classes: int = 2) -> tuple[Tensor, Tensor]:
    """Normal numbers of classes with means of their own."""
    y = torch.arange(BATCH) % classes
    return torch.randn(BATCH, features) + torch.randn(classes, features)[y], y


def digits() -> tuple[Tensor, Tensor]:
    """Digits as MNIST has them: one channel of 28×28 in 0..1."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    chosen = torch.randperm(len(images))[:BATCH]
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[chosen] / 16
    return F.interpolate(x, size=28, mode="bilinear"), torch.tensor(labels)[chosen].long()


def probability_loss(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Keras' categorical cross-entropy of probabilities."""
    return F.nll_loss(probabilities.clamp(1e-7, 1 - 1e-7).log(), targets)


def one_hot_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error against one-hot targets."""
    return F.mse_loss(outputs, F.one_hot(targets, outputs.shape[1]).float())


def so_33969059() -> Built:
    """Inputs up to 10,000, tanh, and a softmax over a single output."""
    net = keras(dense((3, 3, 2, 1), nn.Tanh, dropout=0.5), uniform)
    x = 1e4 * torch.rand(BATCH, 3)
    return Outer(net, nn.Softmax(dim=1)), x, x @ torch.tensor([[2.0], [1.0], [0.5]]) + 2.2, F.mse_loss


def so_34673164() -> Built:
    net = keras(dense((14, 64, 64, 2), nn.Tanh, dropout=0.5), uniform)
    return Outer(net, nn.Softmax(dim=1)), *classified(14), one_hot_error


def so_45442843() -> Built:
    net = nn.Sequential(keras(nn.Linear(1, 1)), nn.Sigmoid(), keras(nn.Linear(1, 2), normal(0.05)))
    x, y = table(1)
    return (
        Outer(net, nn.Softmax(dim=1)),
        x,
        50 * y,
        lambda outputs, targets: F.l1_loss(outputs, targets.expand_as(outputs)),
    )


def so_48385830() -> Built:
    """Two linear layers without an activation, weights and biases of standard deviation 1."""
    net = keras(nn.Sequential(nn.Flatten(), nn.Linear(784, 30), nn.Linear(30, 10)), normal(1.0))
    return net, *digits(), one_hot_error


def so_49583466() -> Built:
    x = torch.rand(BATCH, 1)
    return keras(dense((1, 20, 20, 20, 1), nn.Sigmoid), uniform), x, (20 * x).sin() / 2 + 0.5, F.mse_loss


def so_57407973() -> Built:
    net = keras(dense((28, 28, 200, 300, 300, 150, 1), nn.Sigmoid, dropout=0.5), normal(0.05))
    x, y = classified(28)
    return (
        net,
        x,
        y[:, None].float(),
        lambda outputs, targets: F.binary_cross_entropy(outputs.clamp(1e-7, 1 - 1e-7), targets),
    )


def so_58043002() -> Built:
    convolutions = nn.Sequential(
        nn.Conv1d(7, 64, 3), nn.Sigmoid(), nn.MaxPool1d(3), nn.Conv1d(64, 64, 2), nn.Sigmoid()
    )
    net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = classified(70)
    return Outer(keras(net), nn.Softmax(dim=1)), x.view(BATCH, 7, 10), y, probability_loss


def so_60766775() -> Built:
    net = keras(dense((8, 32, 20, 15, 4), nn.Sigmoid, dropout=0.1))
    x, y = table(8, targets=4)
    return Outer(net, nn.Softmax(dim=1)), x, 100 * y, F.mse_loss


def so_65777704() -> Built:
    """Five layers of sigmoids on images of unit norm."""
    net = keras(nn.Sequential(nn.Flatten(), *dense((784, 8, 16, 32, 64, 128, 10), nn.Sigmoid)))
    x, y = digits()
    return Outer(net, nn.Softmax(dim=1)), F.normalize(x.flatten(1)).view_as(x), y, probability_loss


def base_cnn(
    weights: Callable[[Tensor], Any], activation: Callable[[], nn.Module] = nn.ReLU, scale: float = 1.0
) -> Built:
    """TheDeepChecker's ``baseCNN``, on images in 0..1 times ``scale``."""
    net = nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        activation(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 49, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )
    x, y = digits()
    return keras(net, weights), scale * x, y, F.cross_entropy


def regr_nn(weights: Callable[[Tensor], Any], last: nn.Module | None = None, scale: float = 1.0) -> Built:
    """TheDeepChecker's ``regrNN``: nine features, two hidden layers of 64."""
    x, y = table(9, scale=scale)
    net = keras(dense((9, 64, 64, 1), nn.ReLU), weights)
    return (Outer(net, last) if last else net), x, y, F.mse_loss


def redundant_softmax() -> Built:
    net, x, y, loss = base_cnn(nn.init.kaiming_normal_)
    return Outer(net, nn.Softmax(dim=1)), x, y, loss


def constant(weight: Tensor) -> None:
    """TheDeepChecker's: all weights 0.01."""
    nn.init.constant_(weight, 0.01)


HE = nn.init.kaiming_normal_
FAULTS: tuple[Fault, ...] = (
    Fault(
        name="SO 33969059",
        what="unscaled inputs into tanh, softmax over one output",
        build=so_33969059,
        found_by=("NeuraLint",),
    ),
    Fault(name="SO 34673164", what="tanh, weights within 0.05", build=so_34673164, found_by=("deepmufl",)),
    Fault(
        name="SO 45442843", what="one sigmoid unit, softmax on a regression", build=so_45442843, found_by=()
    ),
    Fault(
        name="SO 48385830",
        what="no activation, weights of std 1",
        build=so_48385830,
        found_by=("DeepDiagnosis", "DeepLocalize"),
    ),
    Fault(
        name="SO 49583466",
        what="three sigmoids, weights within 0.05",
        build=so_49583466,
        found_by=("deepmufl",),
    ),
    Fault(
        name="SO 57407973",
        what="five sigmoids, weights of std 0.05",
        build=so_57407973,
        found_by=("deepmufl", "DeepLocalize", "NeuraLint"),
    ),
    Fault(
        name="SO 58043002",
        what="sigmoids behind convolutions (its LSTM stands as a dense layer)",
        build=so_58043002,
        found_by=("deepmufl",),
    ),
    Fault(
        name="SO 60766775",
        what="three sigmoids, softmax on a regression",
        build=so_60766775,
        found_by=("DeepLocalize",),
    ),
    Fault(name="SO 65777704", what="five sigmoids", build=so_65777704, found_by=("deepmufl",)),
    Fault(name="baseCNN wrong_init", what="all weights 0.01", build=lambda: base_cnn(constant)),
    Fault(name="baseCNN wrong_init", what="std 0.1 everywhere", build=lambda: base_cnn(normal(0.1))),
    Fault(name="regrNN wrong_init", what="all weights 0.01", build=lambda: regr_nn(constant)),
    Fault(name="regrNN wrong_init", what="std 0.25 everywhere", build=lambda: regr_nn(normal(0.25))),
    Fault(
        name="baseCNN wrong_activation",
        what="softmax between layers",
        build=lambda: base_cnn(HE, lambda: nn.Softmax(dim=1)),
    ),
    Fault(
        name="regrNN wrong_activation",
        what="softmax over one output",
        build=lambda: regr_nn(HE, nn.Softmax(dim=1)),
    ),
    Fault(
        name="baseCNN missing_normalization", what="images in 0..255", build=lambda: base_cnn(HE, scale=255.0)
    ),
    Fault(
        name="regrNN missing_normalization", what="features of std 1000", build=lambda: regr_nn(HE, scale=1e3)
    ),
    Fault(name="baseCNN redundant_softmax", what="softmax before the cross-entropy", build=redundant_softmax),
    Fault(name="baseCNN", what="clean", build=lambda: base_cnn(HE), healthy=True),
    Fault(name="regrNN", what="clean", build=lambda: regr_nn(HE), healthy=True),
)


def said(fault: Fault) -> tuple[tuple[str, ...], ...]:
    """Warnings and errors, root causes only, of each seed."""
    found = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        net, x, y, loss = fault.build()
        report = gradflow.inspect(net, x, lambda outputs, _, y=y, loss=loss: loss(outputs, y), seed=seed)
        roots = (f for f in report.findings if f.consequence_of is None)
        found.append(
            tuple(f"{f.rule} {f.severity}" for f in roots if f.severity is not gradflow.Severity.INFO)
        )
    return tuple(found)


def caught(findings: Sequence[Sequence[str]]) -> bool:
    """Something was said from at least two of three seeds."""
    return sum(map(bool, findings)) > len(findings) / 2


def main() -> None:
    """Print what was caught, program by program, and the shares."""
    rows = [(fault, said(fault)) for fault in FAULTS]
    shown = Table("program", "fault", "gradflow says", "caught", "found by (published)")
    for fault, findings in rows:
        words = ", ".join(dict.fromkeys(word for seed in findings for word in seed))
        published = (
            "not stated" if fault.found_by is None else ", ".join(fault.found_by) or "none of the five"
        )
        verdict = "yes" if caught(findings) else "no"
        shown.add_row(fault.name, fault.what, words or "nothing", verdict, "" if fault.healthy else published)
    console = Console(width=140)
    console.print(shown)
    for prefix in ("SO", "baseCNN", "regrNN"):
        mine = [(f, s) for f, s in rows if f.name.startswith(prefix) and not f.healthy]
        console.print(f"{prefix}: gradflow {sum(caught(s) for _, s in mine)} of {len(mine)}", highlight=False)
    for tool in TOOLS:
        count = sum(tool in f.found_by for f, _ in rows if f.found_by is not None)
        console.print(f"SO, published: {tool} {count} of 9", highlight=False)


if __name__ == "__main__":
    main()
