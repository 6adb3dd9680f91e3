"""Leaving a branch out is the same as deleting its block by hand, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradflow.recording.ablation import AblationRequest, _others
from gradflow.recording.execution import record
from gradflow.recording.op_calls import OpCall, SeenCall, zeroed
from gradflow.recording.target import target_from_objects
from gradflow.trace_model import Ablation, Trace
from tests.fingerprint import fingerprint
from tests.residual_spellings import SPELLINGS, Parts
from tests.transformers_zoo import MODELS

WIDTH = 12


def square(outputs: Any, inputs: Any) -> Tensor:
    """A loss without parameters or chance."""
    return outputs.square().mean()


def ablated(model: nn.Module, inputs: Any, loss: Any = square, *, steps: int = 1, **request: Any) -> Trace:
    target = target_from_objects(model, inputs, loss)
    return record(target, steps=steps, ablation=AblationRequest(**request))


def results(trace: Trace) -> Ablation:
    assert trace.ablation is not None
    return trace.ablation


def loss_of(model: nn.Module, inputs: Tensor, seed: int = 0) -> float:
    torch.manual_seed(seed)
    return float(square(model(inputs), inputs).detach())


class Block(nn.Module):
    """``how`` is one way to write the same block; ``gone`` takes the branch out by hand."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.gone = False
        self.norm = nn.LayerNorm(WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        f = self.second(self.drop(torch.tanh(self.first(self.norm(x)))))
        if self.gone:
            return x * 0.5 if self.how == "scaled" else x
        if self.how == "plain":
            return x + f
        if self.how == "branch first":
            return f + x
        if self.how == "torch.add":
            return torch.add(x, other=f)
        if self.how == "in place on the stream":
            stream = x * 1.0
            stream += f
            return stream
        if self.how == "in place on the branch":
            f += x
            return f
        if self.how == "scaled":
            return x * 0.5 + f
        return (x + f) + self.first(x)  # parallel, one after the other


HOWS = (
    "plain",
    "branch first",
    "torch.add",
    "in place on the stream",
    "in place on the branch",
    "scaled",
    "parallel",
)


class Stack(nn.Module):
    def __init__(self, how: str, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(how) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("how", HOWS)
def test_ablating_is_deleting_by_hand(how: str) -> None:
    torch.manual_seed(1)
    model = Stack(how).double().train()
    inputs = torch.randn(5, WIDTH, dtype=torch.float64)
    found = results(ablated(model, inputs))
    whole = loss_of(model, inputs)
    assert found.losses == (whole,)
    assert len(found.branches) == 3
    for branch, block in zip(found.branches, model.blocks, strict=True):
        block.gone = True
        assert branch.changes == (loss_of(model, inputs) - whole,), branch.note
        assert branch.changes != (0.0,)
        block.gone = False


class Basic(nn.Module):
    """The block of ResNet-18, its ReLU after the add in place."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def skip(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += self.skip(x)
        return self.relu(out)


class Deleted(nn.Module):
    """A basic block without its branch."""

    def __init__(self, block: Basic) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.block.skip(x))


def images() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(2)
    stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
    blocks = nn.Sequential(Basic(6, 6, 1), Basic(6, 8, 2), Basic(8, 8, 1))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(stem, blocks, head).double(), torch.randn(4, 3, 12, 12, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_sees_the_batch_without_the_branch(training: bool) -> None:
    model, inputs = images()
    model.train(training)
    before = fingerprint(model)
    trace = ablated(model, inputs)
    assert fingerprint(model) == before
    assert [site.kind for site in trace.residuals] == ["identity", "projection", "identity"]
    whole = loss_of(model, inputs)
    blocks = model[1]
    assert isinstance(blocks, nn.Sequential)
    for at, branch in enumerate(results(trace).branches):
        block = blocks[at]
        assert isinstance(block, Basic)
        blocks[at] = Deleted(block)
        assert branch.changes == (loss_of(model, inputs) - whole,)
        blocks[at] = block


class Zero(nn.Module):
    """Stands where a sublayer stood whose output is added by its parent."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, hidden: Tensor | None = None, *_: Any, **named: Any) -> Any:
        given = named["hidden_states"] if hidden is None else hidden
        return self.wrap(torch.zeros_like(given))


def transformer(name: str) -> tuple[nn.Module, list[tuple[nn.Module, str, Any]]]:
    """A tiny model with each sublayer that stands on a branch: its owner, its name, how it returns."""
    transformers = pytest.importorskip("transformers")
    pair: Any = lambda hidden: (hidden, None)  # noqa: E731
    lone: Any = lambda hidden: hidden  # noqa: E731
    small = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(3)
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, **small)
        model = transformers.GPT2LMHeadModel(config)
        parts = [
            (block, part, how)
            for block in model.transformer.h
            for part, how in (("attn", pair), ("mlp", lone))
        ]
    else:
        config = transformers.LlamaConfig(
            num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2, **small
        )
        model = transformers.LlamaForCausalLM(config)
        parts = [
            (block, part, how)
            for block in model.model.layers
            for part, how in (("self_attn", pair), ("mlp", lone))
        ]
    return model.double().eval(), parts


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_transformer_without_one_sublayer(name: str) -> None:
    model, parts = transformer(name)
    ids = torch.randint(0, 50, (2, 10))
    trace = ablated(model, {"input_ids": ids, "labels": ids}, None)
    found = results(trace)
    assert found.measure == "loss"
    with torch.no_grad():
        whole = model(input_ids=ids, labels=ids)
        assert len(found.branches) == len(parts)
        for branch, (owner, part, wrap) in zip(found.branches, parts, strict=True):
            kept = getattr(owner, part)
            setattr(owner, part, Zero(wrap))
            deleted = model(input_ids=ids, labels=ids)
            setattr(owner, part, kept)
            assert branch.changes[0] == pytest.approx(float(deleted.loss - whole.loss), abs=1e-14)
            assert branch.changes[0] != 0.0
            moved = torch.cat([(whole.logits - deleted.logits).flatten(), (whole.loss - deleted.loss)[None]])
            norm = torch.cat([whole.logits.flatten(), whole.loss[None]]).norm()
            assert branch.output_changes[0] == pytest.approx(float(moved.norm() / norm), rel=1e-9)


def test_parallel_branches_go_together() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    config = transformers.GPTJConfig(
        n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=50, rotary_dim=4
    )
    model = transformers.GPTJForCausalLM(config).double().eval()
    ids = torch.randint(0, 50, (2, 10))
    trace = ablated(model, {"input_ids": ids, "labels": ids}, None)
    assert [site.branches for site in trace.residuals] == [2, 2]
    whole = float(model(input_ids=ids, labels=ids).loss.detach())
    first = model.transformer.h[0]
    first.attn, first.mlp = Zero(lambda hidden: (hidden, None)), Zero(lambda hidden: hidden)
    deleted = float(model(input_ids=ids, labels=ids).loss.detach())
    assert results(trace).branches[0].changes[0] == pytest.approx(deleted - whole, abs=1e-14)


def test_nested_sites_are_each_ablated() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer, self.inner = nn.Linear(WIDTH, WIDTH), Block("plain")

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(torch.tanh(self.outer(x)))

    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Nested()).double().eval()
    inputs = torch.randn(5, WIDTH, dtype=torch.float64)
    trace = ablated(model, inputs)
    whole = loss_of(model, inputs)
    by_name = {trace.residuals[b.order].name: b.changes[0] for b in results(trace).branches}
    nested = model[1]
    assert isinstance(nested, Nested)
    nested.inner.gone = True
    assert by_name["1.inner"] == loss_of(model, inputs) - whole
    nested.inner.gone = False
    assert by_name["1"] == loss_of(model[0], inputs) - whole


def test_a_probe_says_how_far_the_output_moves() -> None:
    torch.manual_seed(6)
    model = Stack("plain").double().eval()
    inputs = torch.randn(5, WIDTH, dtype=torch.float64)
    found = results(ablated(model, inputs, None))
    assert (found.measure, found.losses) == ("output", ())
    whole = model(inputs)
    model.blocks[1].gone = True
    moved = (whole - model(inputs)).norm() / whole.norm()
    assert found.branches[1].changes == ()
    assert found.branches[1].output_changes[0] == pytest.approx(float(moved.detach()), rel=1e-12)


def test_several_steps_are_paired_by_their_seed() -> None:
    torch.manual_seed(7)
    model = Stack("plain").double().train()
    inputs = torch.randn(5, WIDTH, dtype=torch.float64)
    found = results(ablated(model, inputs, steps=3))
    assert found.varied == "seeds"
    whole = [loss_of(model, inputs, seed) for seed in range(3)]
    assert found.losses == tuple(whole)
    model.blocks[0].gone = True
    without = [loss_of(model, inputs, seed) for seed in range(3)]
    assert found.branches[0].changes == tuple(a - b for a, b in zip(without, whole, strict=True))


def test_seeds_that_change_nothing_are_one_sample() -> None:
    torch.manual_seed(7)
    found = results(ablated(Stack("plain").eval(), torch.randn(5, WIDTH), steps=3))
    assert (found.varied, len(found.losses)) == ("", 1)
    assert "the seed changes nothing" in found.notes[0]


def test_several_batches_are_all_run() -> None:
    torch.manual_seed(8)
    model = Stack("plain").double().eval()
    batches = [torch.randn(5, WIDTH, dtype=torch.float64) for _ in range(3)]
    found = results(ablated(model, iter(batches)))
    assert found.varied == "batches"
    assert found.losses == tuple(loss_of(model, batch) for batch in batches)
    assert all(len(branch.changes) == 3 for branch in found.branches)


def test_the_greedy_order_is_that_of_a_search_by_hand() -> None:
    torch.manual_seed(9)
    model = Stack("plain", depth=4).double().eval()
    inputs = torch.randn(5, WIDTH, dtype=torch.float64)
    found = results(ablated(model, inputs, order="greedy"))
    whole = loss_of(model, inputs)
    left, expected = set(range(4)), []
    while left:
        losses = {}
        for at in left:
            model.blocks[at].gone = True
            losses[at] = loss_of(model, inputs)
            model.blocks[at].gone = False
        best = min(losses, key=lambda at: losses[at])
        model.blocks[best].gone = True
        left.remove(best)
        expected.append((best, (losses[best] - whole,)))
    assert [(removal.order, removal.changes) for removal in found.removals] == expected
    assert found.forwards == 4 + 3 + 2 + 1


def test_the_greedy_order_can_stop_early_and_says_its_cost() -> None:
    said: list[str] = []
    counts: list[tuple[int, int]] = []
    found = results(
        ablated(
            Stack("plain", depth=4),
            torch.randn(2, WIDTH),
            order="greedy",
            most=2,
            announce=said.append,
            count=lambda done, total: counts.append((done, total)),
        )
    )
    assert len(found.removals) == 2
    assert len(said) == 1
    assert said[0].startswith("greedy ablation of 4 branches: 7 forwards, about ")
    assert counts == [(at, 7) for at in range(1, 8)]


class Wayward(nn.Module):
    """Takes another way, or raises, once the first block is left out."""

    def __init__(self, raises: bool) -> None:
        super().__init__()
        self.first, self.second, self.raises = Block("plain"), Block("plain"), raises

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if torch.equal(x, y):
            if self.raises:
                raise ValueError("the first block does nothing")
            return y
        return self.second(y)


def test_an_exception_leaves_the_model_as_found_and_is_said() -> None:
    model = Wayward(raises=True)
    model.register_forward_hook(lambda *_: None)
    inputs = torch.randn(2, WIDTH)
    before = fingerprint(model)
    found = results(ablated(model, inputs))
    assert fingerprint(model) == before
    assert "ValueError: the first block does nothing" in found.branches[0].note
    assert found.branches[0].changes == ()
    assert found.branches[1].changes


def test_a_site_that_does_not_come_again_is_said() -> None:
    model = Wayward(raises=False)
    found = results(ablated(model, torch.randn(2, WIDTH), order="greedy"))
    assert len(found.branches[0].changes) == 1
    # With the first block gone the second never runs: the two cannot be left out together.
    assert len(found.removals) == 1
    assert "not found again" in found.notes[0]


def test_an_interrupt_leaves_the_model_as_found() -> None:
    model, inputs = Stack("plain").train(), torch.randn(2, WIDTH)
    before = fingerprint(model)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablated(model, inputs, count=interrupt)
    assert fingerprint(model) == before


def test_a_model_that_does_not_repeat_itself_is_said() -> None:
    class Restless(Stack):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Restless.calls += 1
            return super().forward(x) * (1 + 0.1 * Restless.calls)

    found = results(ablated(Restless("plain"), torch.randn(2, WIDTH)))
    assert found.notes
    assert "differ by" in found.notes[0]


def test_nothing_to_leave_out() -> None:
    trace = ablated(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), torch.randn(2, WIDTH))
    assert trace.ablation is None


def test_a_recording_is_the_same_with_and_without() -> None:
    model, inputs = images()
    plain = record(target_from_objects(model, inputs, square))
    assert repr(replace(ablated(model, inputs), ablation=None)) == repr(plain)


def test_an_encoder_layer_keeps_its_slow_road() -> None:
    """Without gradients torch runs it as one fused kernel, in which no add is seen."""
    torch.manual_seed(10)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    found = results(ablated(model, torch.randn(2, 6, 16, dtype=torch.float64)))
    assert [branch.note for branch in found.branches] == [""] * 4
    assert all(branch.changes[0] != 0.0 for branch in found.branches)


NOT_F_OR_G = (
    *("functional branch", "nested", "one after the other", "a norm on the branch alone", ".to and back"),
    *("addmm", "addmm(beta=, alpha=)", "baddbmm", "x + (a + one linear map)", "after a custom function"),
)
"""Spellings whose branches are more, or other layers, than the ones that are silenced by hand."""


@pytest.mark.parametrize("name", [name for name in SPELLINGS if name not in NOT_F_OR_G])
def test_however_it_is_spelled(name: str) -> None:
    """Layers that return zeros are the same as an operand of zeros: where the branch is ``f``, ``g`` or both."""
    torch.manual_seed(11)
    found = SPELLINGS[name]
    double = name != ".to of its own dtype"
    model = Parts(found.write).double() if double else Parts(found.write)
    inputs = torch.randn(4, 6, dtype=torch.float64 if double else torch.float32)
    trace = ablated(model, inputs)
    if not {site.kind for site in trace.residuals} & {"identity", "projection", "scaled"}:
        assert trace.ablation is None
        return
    (branch,) = results(trace).branches
    for layer in (model.f, model.g):
        layer.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    silenced = loss_of(model, inputs)
    assert branch.note == ""
    assert results(trace).losses[0] + branch.changes[0] == pytest.approx(
        silenced, rel=1e-13 if double else 1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_site_of_a_library_model_is_found_again(name: str) -> None:
    model, inputs = MODELS[name]()
    trace = ablated(model, inputs, None)
    found = results(trace)
    assert [branch.note for branch in found.branches] == [""] * len(found.branches)
    assert all(branch.output_changes[0] > 0 for branch in found.branches)
    assert found.notes == ()


@pytest.mark.parametrize(
    ("op", "skip_at", "left"),
    [
        ("addmm", 0, lambda x, f, w: x),
        ("addcmul", 0, lambda x, f, w: x),
        ("addcmul", 2, lambda x, f, w: w * x),
        ("lerp", 0, lambda x, f, w: torch.lerp(x, torch.zeros_like(f), w)),
        ("lerp", 1, lambda x, f, w: torch.lerp(torch.zeros_like(f), x, w)),
    ],
)
def test_of_a_fused_sum_the_skip_keeps_its_factor(op: str, skip_at: int, left: Any) -> None:
    """What stays of each op when zeros stand where the branch was."""
    x, f, w = (torch.randn(3, 3, dtype=torch.float64) for _ in range(3))
    operands = {0: (x, f, w), 1: (f, x, w), 2: (f, w, x)}[skip_at]
    call = OpCall("", 0, op, 0)
    positions = _others(SeenCall(call=call, nodes=tuple(range(3))), skip_at)
    args, kwargs = zeroed(op, operands, {}, positions)
    assert torch.equal(getattr(torch, op)(*args, **kwargs), left(x, f, w))
