"""Models with a known verdict: faulty pairs, mild and severe, and healthy ones that must stay silent.

Every builder takes a seed, and a width and a depth where they are not to be those of the recipe, and returns a fresh
``(module, inputs, loss)``; nothing else varies.
The expected gains stand beside each case: they are what the recipe gives by theory, not what gradflow
measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import zoo_networks as networks
from torch import nn
from torch.nn import functional as F

from gradflow.findings import Severity

Built = tuple[nn.Module, tuple[torch.Tensor, ...], Callable[[Any, Any], torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model and what must be said about it."""

    name: str
    build: Callable[..., Built]
    """``build(seed, width=..., depth=...)``; what depth counts is the recipe's: layers, blocks, blocks a stage."""
    rule: str | None = None
    """The code of the root cause; None for a healthy model."""
    severity: Severity | None = None
    """The least severity the finding must have; None for a healthy model."""
    region: str = ""
    """What the location's names start with."""
    exactly: bool = False
    """True where the finding must not be worse than ``severity``."""
    also: tuple[str, ...] = ()
    """Rules that must be reported beside it: another side of the same fault."""
    trained: bool = False
    """True where the weights are to be judged as trained ones."""


def labels_loss(labels: torch.Tensor) -> Callable[[Any, Any], torch.Tensor]:
    return lambda outputs, _inputs: F.cross_entropy(outputs, labels)


def clusters(seed: int, width: int, batch: int = 256, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten Gaussian clusters with unit variance in every direction, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=generator)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    noise = torch.randn(batch, width, generator=generator)
    return (centres[labels] + noise) / math.sqrt(2), labels


def images(seed: int, batch: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator), torch.randint(
        0, 10, (batch,), generator=generator
    )


def mlp_builder(
    initialise: Callable[[nn.Linear], None], *, depth: int, rectified: bool = False, **options: Any
) -> Callable[..., Built]:
    """A builder of MLPs on the clusters; ``options`` go to the network.

    ``rectified`` gives the first layer what a hidden layer sees, ReLU of the clusters. Behind a batch
    normalisation the gradient scales with the inverse of its input, so without this the first layer alone
    would take a factor of 0.6 off the gain that the recipe promises.
    """

    def build(seed: int, width: int = 256, depth: int = depth) -> Built:
        torch.manual_seed(seed)
        x, labels = clusters(seed, width)
        x = x.relu() if rectified else x
        return networks.MLP(width, depth=depth, initialise=initialise, **options), (x,), labels_loss(labels)

    return build


def image_builder(
    network: Callable[[int, int], nn.Module], *, batch: int, channels: int, depth: int
) -> Callable[..., Built]:
    def build(seed: int, width: int = channels, depth: int = depth) -> Built:
        torch.manual_seed(seed)
        x, labels = images(seed, batch)
        return network(width, depth), (x,), labels_loss(labels)

    return build


def xavier(linear: nn.Linear) -> None:
    nn.init.xavier_normal_(linear.weight)
    nn.init.zeros_(linear.bias)


def he(linear: nn.Linear) -> None:
    nn.init.kaiming_normal_(linear.weight)
    nn.init.zeros_(linear.bias)


def default(linear: nn.Linear) -> None:
    linear.reset_parameters()


def gaussian(weight_variance: float, bias_variance: float = 0.0) -> Callable[[nn.Linear], None]:
    """Mean-field initialisation: weight variance sw2 / fan-in, bias variance sb2."""

    def initialise(linear: nn.Linear) -> None:
        nn.init.normal_(linear.weight, std=math.sqrt(weight_variance / linear.in_features))
        nn.init.normal_(linear.bias, std=math.sqrt(bias_variance))

    return initialise


def unused_head(seed: int, width: int = 256, depth: int = 6) -> Built:
    torch.manual_seed(seed)
    x, labels = clusters(seed, width)
    return networks.Auxiliary(width, depth, initialise=he), (x,), labels_loss(labels)


def cut_trunk(seed: int, width: int = 256, depth: int = 3) -> Built:
    torch.manual_seed(seed)
    x, labels = clusters(seed, width)
    return networks.Detached(width, depth, initialise=he), (x,), labels_loss(labels)


def language(seed: int, width: int = 128, depth: int = 12) -> Built:
    torch.manual_seed(seed)
    ids = torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(seed))

    def next_token(logits: torch.Tensor, _inputs: Any) -> torch.Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return networks.GPT(vocabulary=512, width=width, depth=depth), (ids,), next_token


def masked_language(seed: int, width: int = 128, depth: int = 12) -> Built:
    torch.manual_seed(seed)
    ids = torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(seed))

    def every_token(logits: torch.Tensor, _inputs: Any) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())

    return networks.PostNormEncoder(vocabulary=512, width=width, depth=depth), (ids,), every_token


def sequence(seed: int, width: int = 64, depth: int = 2) -> Built:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 50, width, generator=generator)
    labels = torch.randint(0, 10, (32,), generator=generator)
    return networks.LSTMClassifier(width, depth), (x,), labels_loss(labels)


def segmentation(seed: int, width: int = 16, depth: int = 2) -> Built:
    torch.manual_seed(seed)
    x, _ = images(seed, batch=16)
    labels = torch.randint(0, 4, (16, 32, 32), generator=torch.Generator().manual_seed(seed))
    return networks.UNet(width, depth), (x,), labels_loss(labels)


WARNING, ERROR = Severity.WARNING, Severity.ERROR
_vanishing = {"rule": "GF101", "region": "layers."}
_exploding = {"rule": "GF102", "region": "layers."}

FAULTY: tuple[Case, ...] = (
    # Gain 0.236 a layer: below the limit of the slope, though three layers lose only a factor of 76.
    Case(
        name="V1a", build=mlp_builder(xavier, depth=4, activation=nn.Sigmoid), severity=WARNING, **_vanishing
    ),
    # 0.236^9 = 2e-6
    Case(
        name="V1b", build=mlp_builder(xavier, depth=10, activation=nn.Sigmoid), severity=ERROR, **_vanishing
    ),
    # 0.707^23 = 3e-4, with a ratio of parameter gradients near 1
    Case(
        name="V2a",
        build=mlp_builder(xavier, depth=24, activation=nn.ReLU),
        severity=WARNING,
        exactly=True,
        **_vanishing,
    ),
    # 0.707^39 = 1.4e-6
    Case(name="V2b", build=mlp_builder(xavier, depth=40, activation=nn.ReLU), severity=ERROR, **_vanishing),
    # 1.228^29 = 4e2
    Case(
        name="X1a",
        build=mlp_builder(gaussian(2.3**2), depth=30, activation=nn.Tanh),
        severity=WARNING,
        exactly=True,
        **_exploding,
    ),
    # 1.542^29 = 3e5
    Case(
        name="X1b",
        build=mlp_builder(gaussian(4.0**2), depth=30, activation=nn.Tanh),
        severity=ERROR,
        **_exploding,
    ),
    # 1.21^31 = 4e2
    Case(
        name="X2a",
        build=mlp_builder(he, depth=32, activation=nn.ReLU, norm=nn.BatchNorm1d, rectified=True),
        severity=WARNING,
        exactly=True,
        **_exploding,
    ),
    # 1.21^63 = 1.7e5
    Case(
        name="X2b",
        build=mlp_builder(he, depth=64, activation=nn.ReLU, norm=nn.BatchNorm1d, rectified=True),
        severity=ERROR,
        **_exploding,
    ),
    Case(name="U1a", build=unused_head, rule="GF103", severity=WARNING, region="auxiliary", exactly=True),
    Case(name="U1b", build=cut_trunk, rule="GF103", severity=ERROR, region="encoder"),
)

HEALTHY: tuple[Case, ...] = (
    Case(name="H1", build=mlp_builder(he, depth=6, activation=nn.ReLU)),
    Case(name="H2", build=mlp_builder(default, depth=3, activation=nn.ReLU)),
    Case(name="H3", build=image_builder(networks.VGG, batch=64, channels=32, depth=3)),
    Case(name="H4", build=image_builder(networks.vgg_batch_norm, batch=64, channels=32, depth=3)),
    Case(name="H5", build=image_builder(networks.ResNet20, batch=16, channels=16, depth=3)),
    Case(name="H9", build=mlp_builder(gaussian(1.76, 0.05), depth=30, activation=nn.Tanh)),
    Case(name="H10", build=language),
    Case(name="H11", build=masked_language),
    Case(name="H12", build=image_builder(networks.ViT, batch=16, channels=192, depth=12)),
    Case(name="H13", build=sequence),
    Case(name="H14", build=segmentation),
)
