"""The runs behind the figures of docs/residual.md: short, seeded, on one core; every number is gradflow's own.

Each function returns plain values, which ``draw.py`` writes to ``residual.json`` and draws.
"""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow
from gradflow.ablation_profile import agreements

SAMPLES = Path(__file__).resolve().parents[2] / "sample_models"
SEED = 0
Values = dict[str, Any]
_LEFT_OUT = ["loss_change", "loss_change_low", "loss_change_high"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the runs are."""

    image: int = 16
    """Digits are 8x8 and are enlarged to this."""
    images: int = 64
    """A batch of them, to train with and to look at."""
    steps: int = 150
    """Of the plain and the residual networks."""
    depths: tuple[int, ...] = (20, 56)
    norm_depths: tuple[int, ...] = (2, 6, 12, 18)
    norm_seeds: int = 5
    zero_gamma_steps: int = 60
    gpt_depth: int = 6
    gpt_steps: int = 600
    gpt_batches: int = 8
    """To ablate on, of text that was not trained on."""


FULL = Sizes()
TINY = Sizes(
    image=8, images=8, steps=2, depths=(8,), norm_depths=(1, 2), norm_seeds=1, zero_gamma_steps=2,
    gpt_depth=2, gpt_steps=2, gpt_batches=2,
)  # fmt: skip
"""Enough to see that every run runs."""


def sample(file: str, name: str) -> Any:
    """A class of one of the sample models."""
    return runpy.run_path(str(SAMPLES / f"{file}.py"))[name]


def responses(sizes: Sizes) -> Values:
    """He et al. 2016, figure 7: the size of what each 3x3 layer gives, behind its batch norm; plain and residual."""
    found: Values = {}
    for depth in sizes.depths:
        for kind, (file, name) in {"plain": ("plain56", "Plain"), "ResNet": ("resnet56", "ResNet")}.items():
            torch.manual_seed(SEED)
            model = sample(file, name)(depth=depth)
            batches = digits(sizes)
            at_start = _responses(model, next(batches))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
            losses = train(model, optimizer, batches, sizes.steps)
            found[f"{kind}-{depth}"] = {
                "init": at_start,
                "trained": _responses(model, next(batches), trained=True),
                "last_loss": losses,
            }
    return found


def _responses(model: nn.Module, batch: tuple[Tensor, Tensor], *, trained: bool = False) -> Values:
    report = looked_at(model, batch, trained=trained)
    norms = report.layers[report.layers["type"] == "BatchNorm2d"]
    rhos = report.residuals["rho"].tolist() if len(report.residuals) else []
    return {"std": norms["activation_std"].tolist(), "rho": rhos, "gain": report.profile.gain}


def norm_placement(sizes: Sizes) -> Values:
    """Xiong et al. 2020, figure 3: the gradient of the last feed-forward weight at the start, pre- and post-norm."""
    return {
        placement: {
            depth: [
                _last_weight_gradient(depth, pre=placement == "pre-norm", seed=s)
                for s in range(sizes.norm_seeds)
            ]
            for depth in sizes.norm_depths
        }
        for placement in ("pre-norm", "post-norm")
    }


class _Encoder(nn.Module):
    def __init__(self, depth: int, *, pre: bool, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=pre)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width) if pre else nn.Identity()
        self.head = nn.Linear(width, width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def _last_weight_gradient(depth: int, *, pre: bool, seed: int) -> float:
    torch.manual_seed(seed)
    model, x = _Encoder(depth, pre=pre), torch.randn(8, 32, 128)
    targets = torch.randint(0, 128, (8 * 32,))
    report = gradflow.inspect(model, x, lambda y, _: F.cross_entropy(y.flatten(0, 1), targets), seed=seed)
    rows = report.parameters.set_index("name")
    return float(rows.loc[f"layers.{depth - 1}.linear2.weight", "gradient_norm"])


def zero_gamma(sizes: Sizes) -> Values:
    """Goyal et al. 2017: a ResNet-20 whose branches start at exactly zero, before and after some steps."""
    torch.manual_seed(SEED)
    model = sample("zero_gamma_resnet", "ResNet20")()
    batches = digits(sizes)
    before = _sites(looked_at(model, next(batches)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = train(model, optimizer, batches, sizes.zero_gamma_steps)
    after = _sites(looked_at(model, next(batches), trained=True))
    return {"before": before, "after": after, "last_loss": losses}


def ranking(sizes: Sizes) -> Values:
    """A small GPT on the text of Python's own help: what each branch adds, and the loss without it."""
    torch.manual_seed(SEED)
    model = sample("small_gpt", "SmallGPT")(depth=sizes.gpt_depth)
    text = torch.tensor(list("\n".join(topics.values()).encode("ascii", "replace")))
    held_out = len(text) * 9 // 10
    batches = _text(text[:held_out], 16, SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    losses = train(model, optimizer, ((ids, ids) for ids in batches), sizes.gpt_steps, loss=next_character)
    unseen = _text(text[held_out:], 16, SEED + 1)
    samples = [(next(unseen),) for _ in range(sizes.gpt_batches)]
    model.eval()
    report = gradflow.inspect(model, samples, following, steps=len(samples), trained=True, ablate="each")
    stream = report.stream
    left_out = report.ablation.set_index("order")[_LEFT_OUT].to_dict("index")
    sites = [site | left_out[order] for order, site in enumerate(_sites(report))]
    return {
        "sites": sites,
        "agreements": {found.measure: found.spearman for found in agreements(report.trace)},
        "effective_depth": None if stream is None else stream.effective_depth,
        "normalised_depth": None if stream is None else stream.normalised_depth,
        "unseen_loss": median(report.trace.run.loss_values),
        "last_loss": losses,
    }


def following(logits: Tensor, inputs: tuple[Tensor]) -> Tensor:
    """The loss as ``gradflow.inspect`` asks for it."""
    return next_character(logits, inputs)


def _text(text: Tensor, batch: int, seed: int, length: int = 64) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(text) - length, (batch,), generator=generator)
        yield torch.stack([text[i : i + length] for i in starts.tolist()])


def next_character(logits: Tensor, batch: Any) -> Tensor:
    """Cross-entropy of each character given those before it, in nats."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())


def digits(sizes: Sizes) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of scikit-learn's handwritten digits, enlarged, standardised and with three equal channels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    images = F.interpolate((images - images.mean()) / images.std(), size=(sizes.image, sizes.image))
    images, targets = images.expand(-1, 3, -1, -1), torch.tensor(labels, dtype=torch.int64)
    generator = torch.Generator().manual_seed(SEED)
    while True:
        chosen = torch.randint(0, len(images), (sizes.images,), generator=generator)
        yield images[chosen].contiguous(), targets[chosen]


def classify(logits: Tensor, batch: Any) -> Tensor:
    """Cross-entropy of a batch of images and labels."""
    return F.cross_entropy(logits, batch[1])


def looked_at(model: nn.Module, batch: tuple[Tensor, Tensor], *, trained: bool = False) -> gradflow.Report:
    """What gradflow says of a classifier on one batch."""
    images, _ = batch
    return gradflow.inspect(model, images, lambda logits, _: classify(logits, batch), trained=trained)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Any],
    steps: int,
    loss: Callable[[Tensor, Any], Tensor] = classify,
) -> float:
    """Train, and return the median loss of the last tenth of the steps."""
    seen = []
    for _ in range(steps):
        batch = next(batches)
        value = loss(model(batch[0]), batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        seen.append(float(value.detach()))
    return median(seen[-math.ceil(steps / 10) :])


def _sites(report: gradflow.Report) -> list[Values]:
    columns = ["name", "index", "rho", "block_influence"]
    return report.residuals[columns].to_dict("records")


RUNS: dict[str, Callable[[Sizes], Values]] = {
    "responses": responses,
    "norm_placement": norm_placement,
    "zero_gamma": zero_gamma,
    "ranking": ranking,
}
