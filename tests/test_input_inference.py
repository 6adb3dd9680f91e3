"""Inputs worked out for models that say nothing about them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradflow.errors import InputError
from gradflow.recording.input_inference import infer_inputs
from gradflow.recording.size_search import Tried, next_sides

Forward = Callable[..., Any]


class Model(nn.Module):
    """Layers by name; subclasses write the forward."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class LeNet(Model):
    def forward(self, x: Tensor) -> Any:
        x = F.max_pool2d(F.relu(self.c1(x)), 2)
        x = F.max_pool2d(F.relu(self.c2(x)), 2)
        return self.fc(x.view(x.size(0), -1))


def lenet(flat: int, channels: int = 1) -> nn.Module:
    return LeNet(c1=nn.Conv2d(channels, 6, 5), c2=nn.Conv2d(6, 16, 5), fc=nn.Linear(flat, 10))


class Features(Model):
    def forward(self, x: Tensor) -> Any:
        return self.head(torch.flatten(self.features(x), 1))


def alexnet() -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.MaxPool2d(3, 2), nn.Conv2d(64, 96, 5, padding=2), nn.MaxPool2d(3, 2),
        nn.Conv2d(96, 64, 3, padding=1), nn.MaxPool2d(3, 2),
    )  # fmt: skip
    return Features(features=features, head=nn.Linear(64 * 36, 10))


class ViT(Model):
    def __init__(self, positions: int) -> None:
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        super().__init__(patch=nn.Conv2d(3, 32, 16, 16), encoder=nn.TransformerEncoder(layer, 1))
        self.position = nn.Parameter(torch.zeros(1, positions, 32))
        self.token = nn.Parameter(torch.zeros(1, 1, 32))

    def forward(self, x: Tensor) -> Any:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.encoder(torch.cat((self.token.expand(x.size(0), -1, -1), x), 1) + self.position)


class Checked(Model):
    img_size = 48

    def forward(self, x: Tensor) -> Any:
        _, _, height, _ = x.shape
        assert height == 48, "the size of the image (48) does not match"
        return self.patch(x)


class Gpt(Model):
    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        _, length = idx.size()
        return self.head(self.token(idx) + self.position(torch.arange(length)))


class CharRnn(Model):
    def forward(self, x: Tensor, hidden: Any) -> Any:
        return self.rnn(self.embed(x), hidden)


class CellRnn(Model):
    def forward(self, line: Tensor, hidden: Tensor) -> Any:
        hidden = torch.tanh(self.i2h(torch.cat((line, hidden), 1)))
        return self.h2o(hidden), hidden


class LastStep(Model):
    def forward(self, x: Tensor) -> Any:
        return self.fc(self.rnn(x)[0][-1])


class Packed(Model):
    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(x), lengths.cpu(), True, False)
        return self.rnn(packed)[1][0]


class TwoTowers(Model):
    def forward(self, *, user: Tensor, image: Tensor) -> Any:
        return self.out(self.user(user), self.image(image).mean((2, 3)))


class Seq2Seq(Model):
    def forward(self, src: Tensor, tgt: Tensor) -> Any:
        return self.transformer(self.source(src), self.target(tgt))


class Attends(Model):
    def forward(self, query: Tensor, memory: Tensor) -> Any:
        return self.attention(query, memory, memory)


class Unet(Model):
    def forward(self, x: Tensor, t: Tensor) -> Any:
        h = self.inside(x) + self.time(t[:, None])[:, :, None, None]
        return self.out(torch.cat((h, self.up(self.down(h))), 1))


class Wrapper(Model):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class DefinedLast(Model):
    def forward(self, x: Tensor) -> Any:
        return self.fc(self.conv(x.transpose(1, 2)).mean(-1))


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 4))

    def forward(self, x: Tensor) -> Any:
        return x @ self.weight


class Graph(Model):
    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        h = self.fc(x)
        return torch.zeros_like(h).index_add(0, edge_index[1], h[edge_index[0]])


class Flattened(Model):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x.view(-1, 28 * 28))


class AsImage(Model):
    def forward(self, x: Tensor) -> Any:
        return self.fc(self.conv(x.view(-1, 1, 28, 28)).flatten(1))


class OwnLoss(Model):
    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return F.cross_entropy(self.fc(x), labels)


class Mixer(Model):
    def forward(self, x: Tensor) -> Any:
        return self.channels(x) + self.tokens(x.transpose(1, 2)).transpose(1, 2)


class Masked(Model):
    def forward(self, ids: Tensor, mask: Tensor, *, causal: bool, scale: float = 1.0) -> Any:
        return (self.embed(ids) * mask.unsqueeze(-1)).sum(1)


class Unpacked(Model):
    def forward(self, x: Tensor) -> Any:
        batch, channels, height, width = x.shape
        return self.fc(x.permute(0, 2, 3, 1).reshape(batch, height * width, channels))


class Split(Model):
    def forward(self, x: Tensor) -> Any:
        points, views = torch.split(x, [6, 3], dim=-1)
        return self.fc(torch.cat((self.points(points), views), -1))


def down(channels: int, kernel: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv1d(channels, 8, kernel, stride), nn.MaxPool1d(4), nn.Conv1d(8, 8, 3))


L, C1, C2, C3, E = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...] | Any]]] = {
    "linear": (lambda: L(6, 3), {"0": (8, 6)}),
    "split": (lambda: Split(points=L(6, 4), fc=L(7, 2)), {"0": (8, 9)}),
    "lenet 32": (lambda: lenet(400), {"0": (8, 1, 32, 32)}),
    "lenet 28": (lambda: lenet(256, 3), {"0": (8, 3, 28, 28)}),
    "lenet 56": (lambda: lenet(16 * 11 * 11), {"0": (8, 1, 56, 56)}),
    "alexnet": (alexnet, {"0": (8, 3, 224, 224)}),
    "vit 224": (lambda: ViT(197), {"0": (8, 3, 224, 224)}),
    "vit 96": (lambda: ViT(37), {"0": (8, 3, 96, 96)}),
    "asserted size": (lambda: Checked(patch=C2(3, 8, 8, 8)), {"0": (8, 3, 48, 48)}),
    "conv1d flattened": (lambda: Features(features=C1(2, 4, 5), head=L(4 * 96, 2)), {"0": (8, 2, 100)}),
    "conv3d flattened": (lambda: Features(features=C3(1, 4, 3), head=L(4 * 216, 2)), {"0": (8, 1, 8, 8, 8)}),
    "long signal": (lambda: down(1, 80, 16), {"0": (8, 1, 256)}),
    "grouped": (lambda: nn.Sequential(nn.Identity(), C2(4, 8, 3, groups=2)), {"0": (8, 4, 32, 32)}),
    "generator": (lambda: nn.ConvTranspose2d(100, 64, 4), {"0": (8, 100, 1, 1)}),
    "gpt": (lambda: Gpt(token=E(65, 8), position=E(12, 8), head=L(8, 65)), {"0": (4, 12)}),
    "lstm batch first": (lambda: nn.LSTM(7, 5, batch_first=True), {"0": (4, 16, 7)}),
    "gru time first": (lambda: LastStep(fc=L(20, 3), rnn=nn.GRU(7, 20)), {"0": (16, 4, 7)}),
    "lstm cell": (lambda: nn.LSTMCell(7, 5), {"0": (8, 7)}),
    "char rnn": (lambda: CharRnn(embed=E(30, 8), rnn=nn.LSTM(8, 5)), {"0": (4, 16), "1": None}),
    "cell by hand": (lambda: CellRnn(i2h=L(57 + 128, 128), h2o=L(128, 5)), {"0": (8, 57), "1": (8, 128)}),
    "packed": (
        lambda: Packed(embed=E(30, 8), rnn=nn.LSTM(8, 8, batch_first=True)),
        {"0": (4, 16), "1": (4,)},
    ),
    "keyword only": (
        lambda: TwoTowers(user=E(50, 8), image=C2(3, 8, 3), out=nn.Bilinear(8, 8, 1)),
        {"user": (4,), "image": (4, 3, 32, 32)},
    ),
    "two vocabularies": (
        lambda: Seq2Seq(source=E(40, 32), target=E(30, 32),
                        transformer=nn.Transformer(32, 4, 1, 1, 64, batch_first=True)),
        {"0": (4, 16), "1": (4, 16)},
    ),
    "attention": (
        lambda: Attends(attention=nn.MultiheadAttention(24, 2, batch_first=True)),
        {"0": (4, 16, 24), "1": (4, 16, 24)},
    ),
    "diffusion": (
        lambda: Unet(time=nn.Sequential(L(1, 16), nn.SiLU()), inside=C2(3, 16, 3, padding=1),
                     down=C2(16, 32, 3, 2, 1), up=nn.ConvTranspose2d(32, 16, 2, 2), out=C2(32, 3, 1)),
        {"0": (8, 3, 32, 32), "1": (8,)},
    ),
    "wrapper": (lambda: Wrapper(inner=nn.Sequential(nn.LayerNorm(24), L(24, 3))), {"0": (8, 24)}),
    "first layer defined last": (lambda: DefinedLast(fc=L(8, 2), conv=C1(5, 8, 3)), {"0": (4, 16, 5)}),
    "parameters only": (Matrix, {"0": (8, 20)}),
    "graph": (lambda: Graph(fc=L(9, 4)), {"0": (8, 9), "1": (2, 32)}),
    "view": (lambda: Flattened(fc=L(784, 10)), {"0": (8, 784)}),
    "view as image": (lambda: AsImage(conv=C2(1, 4, 3), fc=L(4 * 26 * 26, 10)), {"0": (8, 784)}),
    "labels": (lambda: OwnLoss(fc=L(10, 4)), {"0": (8, 10), "1": (8,)}),
    "mixer": (lambda: Mixer(channels=L(12, 12), tokens=L(20, 20)), {"0": (4, 20, 12)}),
    "mask and flag": (lambda: Masked(embed=E(11, 6)), {"0": (4, 16), "1": (4, 16), "causal": False}),
    "unpacked shape": (lambda: Unpacked(fc=L(16, 4)), {"0": (8, 16, 32, 32)}),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(4)),
        {"0": (8, 3, 32, 32)},
    ),
}  # fmt: skip


def shape_of(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else value


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("case", CASES)
def test_inferred_shapes(case: str) -> None:
    build, expected = CASES[case]
    torch.manual_seed(0)
    module = build()
    found = infer_inputs(module)
    shapes = {str(i): shape_of(arg) for i, arg in enumerate(found.args)}
    assert shapes | {name: shape_of(value) for name, value in found.kwargs.items()} == expected
    module(*found.args, **found.kwargs)


def test_batch_size_dtype_and_seed() -> None:
    module = lenet(400).double()
    found, again, other = (infer_inputs(module, batch_size=3, dtype=torch.float64, seed=s) for s in (0, 0, 1))
    assert found.args[0].shape == (3, 1, 32, 32) and found.args[0].dtype == torch.float64
    assert torch.equal(found.args[0], again.args[0])
    assert not torch.equal(found.args[0], other.args[0])


class Counting(Model):
    """Changes itself as it runs, and draws from every generator."""

    def __init__(self) -> None:
        super().__init__(conv=C2(1, 6, 5), norm=nn.BatchNorm2d(6), drop=nn.Dropout(), fc=L(6 * 24 * 24, 3))
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        random.random(), numpy.random.rand()
        self.register_buffer("made", torch.ones(1))
        return self.fc(self.drop(self.norm(self.conv(x))).flatten(1))


@pytest.mark.parametrize("copied", [True, False])
def test_the_model_and_the_random_states_stay_as_they_are(copied: bool) -> None:
    module = Counting()
    module.conv.eval()
    if not copied:
        module.lock = (part for part in ())  # type: ignore[assignment]  # a generator cannot be deep-copied
    before = {key: value.clone() for key, value in module.state_dict().items()}
    states = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy())
    modes = [part.training for part in module.modules()]
    assert infer_inputs(module).args[0].shape == (8, 1, 28, 28)
    assert module.calls == 0
    assert [part.training for part in module.modules()] == modes
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()


def test_failing_says_what_was_tried_and_how_to_help() -> None:
    class Structured(Model):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            _, _, _, _, _, channels = x.shape
            return self.fc(y) * channels

    with pytest.raises(InputError) as caught:
        infer_inputs(Structured(fc=L(11, 3)), source="net.py:Net")
    text = str(caught.value)
    for words in ("Structured in ", " tries", "The first layer is fc: Linear(in_features=11", "get_inputs()"):
        assert words in text
    assert "gradflow inspect net.py:Net --input x=" in text and "--input y=8x11" in text


def test_a_model_at_fault_gets_the_inputs_that_came_furthest() -> None:
    module = nn.Sequential(L(10, 20), L(30, 5))
    found = infer_inputs(module)
    assert found.outputs is None and found.args[0].shape == (8, 10)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        module(*found.args)


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = wrap(copy.deepcopy(lenet(400)))
    assert infer_inputs(module).args[0].shape == (8, 1, 32, 32)


@pytest.mark.parametrize("side", [5, 28, 33, 64, 97, 224, 301])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_search_ends_at_the_side(side: int, dims: int) -> None:
    def flattened(tried: int) -> int:
        return 16 * max(tried // 2 - 1, 0) ** dims

    tried, queue = [], [32]
    while queue:
        here = queue.pop(0)
        if flattened(here) == flattened(side):
            break
        tried.append(Tried(side=here, size=flattened(here)))
        queue = list(next_sides(tuple(tried), flattened(side), dims))
    assert flattened(here) == flattened(side)
    assert len(tried) <= 12


def test_the_search_knows_when_there_is_no_side() -> None:
    tried = (Tried(side=32, size=100), Tried(side=33, size=121))
    assert next_sides(tried, 110, 2) == ()


def test_no_text_is_made_so_long_that_a_try_takes_minutes() -> None:
    """The layer wants wider tokens than the table has: lengthening the text does not help."""
    lengths: list[int] = []

    class Misfit(Model):
        def forward(self, input_ids: Tensor) -> Any:
            lengths.append(input_ids.shape[1])
            return self.head(self.embed(input_ids))

    infer_inputs(Misfit(embed=nn.Embedding(50, 8), head=nn.Linear(1024, 4)))
    assert len(lengths) > 1
    assert max(lengths) <= 8192
