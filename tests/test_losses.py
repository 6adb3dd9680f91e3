"""How outputs become a scalar: values against their closed forms, and what is no loss."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradflow.errors import LossError, UsageError
from gradflow.recording.losses import function_loss, loss_of_outputs, named_loss, probe_loss, returned_loss
from gradflow.recording.target import Batch, Loss

BATCH = Batch(args=(torch.ones(2, 3),), kwargs={}, lone=True)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def gradients(loss: Loss, outputs: Any, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss.compute(outputs, BATCH), leaves))


def test_the_probe_is_a_standard_normal_cotangent_on_every_leaf() -> None:
    a, b = leaf(64, 64), leaf(128, 32)
    outputs = {"a": a, "ids": torch.arange(3), "nested": [b, None, torch.ones(2)]}
    state = torch.get_rng_state()
    first, second = (gradients(probe_loss(0), outputs, a, b) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
        assert abs(one.mean()) < 0.05 and abs(one.std() - 1) < 0.05
    assert not torch.equal(first[0], gradients(probe_loss(1), outputs, a)[0])
    witness = (first[0] * a).sum() + (first[1] * b).sum()
    assert probe_loss(0).compute(outputs, BATCH).item() == pytest.approx(witness.item(), rel=1e-5)


def test_the_probe_follows_the_steps_seed() -> None:
    a = leaf(8, 8)
    seen = []
    with torch.random.fork_rng():
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            seen.append(gradients(probe_loss(0), a, a)[0])
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


def test_the_probe_takes_a_tensor_that_comes_twice_once() -> None:
    a = leaf(256, 16)
    twice = gradients(probe_loss(0), (a, a), a)[0]
    assert abs(twice.std() - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_the_probe_of_other_dtypes(dtype: torch.dtype) -> None:
    a = leaf(300, 300, dtype=dtype)
    loss = probe_loss(0).compute(a, BATCH)
    assert not loss.is_complex() and torch.isfinite(loss)
    (gradient,) = torch.autograd.grad(loss, a)
    assert gradient.dtype == dtype and bool((gradient != 0).any())


def test_the_probe_of_odd_leaves() -> None:
    dense, empty = leaf(4, 4), leaf(0, 3)
    sparse = dense.to_sparse()
    assert gradients(probe_loss(0), (sparse, empty), dense)[0].count_nonzero() == 16


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (torch.arange(3), "returned a 3 int64 tensor, so there is no floating-point tensor"),
        (None, "returned None, so"),
        ({"ids": torch.arange(3)}, "returned a dict without one, so"),
    ],
)
def test_nothing_to_start_from(outputs: Any, words: str) -> None:
    for loss in (probe_loss(0), named_loss("sum", 0), named_loss("mse", 0)):
        with pytest.raises(LossError, match=words):
            loss.compute(outputs, BATCH)


@pytest.mark.parametrize("name", ["probe", "sum", "mse", "cross-entropy"])
def test_outputs_that_are_all_detached_make_a_loss_without_a_gradient(name: str) -> None:
    outputs = {"logits": leaf(3, 4).detach(), "hidden": leaf(3, 4).detach()}
    loss = named_loss(name, 0).compute(outputs, BATCH)
    assert loss.dim() == 0 and not loss.requires_grad


def _like(loss: Tensor, a: Tensor, scores: Callable[[Tensor], Tensor]) -> bool:
    """Tell a cross-entropy by its gradient, (softmax - one-hot) / n: rows sum to 0, one class is off."""
    (gradient,) = torch.autograd.grad(loss, a)
    rows = scores(gradient)
    expected = scores(a.detach()).softmax(-1) / rows.shape[0]
    off = (rows - expected).abs() > 1e-6
    return bool((off.sum(-1) == 1).all()) and torch.allclose(
        rows.sum(-1), torch.zeros(rows.shape[0]), atol=1e-5
    )


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((5, 7), lambda t: t),
        ((5, 3, 7), lambda t: t.reshape(-1, 7)),
        ((2, 7, 4, 4), lambda t: t.permute(0, 2, 3, 1).reshape(-1, 7)),
    ],
)
def test_cross_entropy(shape: tuple[int, ...], rows: Callable[[Tensor], Tensor]) -> None:
    a = leaf(*shape)
    loss = named_loss("cross-entropy", 0)
    assert _like(loss.compute(a, BATCH), a, rows)
    assert loss.compute(a, BATCH) == loss.compute({"logits": a, "hidden": leaf(2, 2)}, BATCH)


@pytest.mark.parametrize(
    ("shape", "words"), [((4, 1), "one class"), ((4,), "needs logits"), ((), "a scalar")]
)
def test_cross_entropy_refused(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(LossError, match=words):
        named_loss("cross-entropy", 0).compute(leaf(*shape), BATCH)


def test_sum_and_mse() -> None:
    a, b = leaf(4, 3), leaf(2)
    assert named_loss("sum", 0).compute((a, b), BATCH).item() == pytest.approx((a.sum() + b.sum()).item())
    (gradient,) = gradients(named_loss("mse", 0), a, a)
    target = a.detach() - gradient * a.numel() / 2
    assert named_loss("mse", 0).compute(a, BATCH).item() == pytest.approx(
        F.mse_loss(a, target).item(), rel=1e-5
    )
    with pytest.raises(UsageError, match="none of cross-entropy, mse, sum, probe"):
        named_loss("hinge", 0)


@pytest.mark.parametrize(
    ("outputs", "description", "is_probe"),
    [
        (SimpleNamespace(loss=leaf().sum(), logits=leaf(2, 3)), "the output's own .loss", False),
        ({"loss": leaf(1), "logits": leaf(2, 3)}, "the output's own .loss", False),
        ({"loss": {"a": leaf(), "b": leaf()}}, "the output's own .loss (sum of 2)", False),
        ({"loss": None, "logits": leaf(2, 3)}, "probe", True),
        (leaf(2, 3), "probe", True),
        (leaf().exp(), "the output itself", False),
        ((leaf().exp(), leaf().cos()), "the output itself (sum of 2)", False),
    ],
)
def test_a_returned_loss_is_taken_before_the_probe(outputs: Any, description: str, is_probe: bool) -> None:
    loss = returned_loss(0)
    value = loss.compute(outputs, BATCH)
    assert value.dim() == 0
    for known in (loss.settled(), loss_of_outputs(outputs, 0)):
        assert (known.description, known.is_probe) == (description, is_probe)
        assert known.compute(outputs, BATCH) == value


def test_a_returned_loss_is_not_settled_before_it_ran() -> None:
    assert returned_loss(0).settled().description == "the output's own .loss, else the probe"


def test_the_users_function() -> None:
    a = leaf(2, 3)
    two = function_loss(lambda out, x: (out * x).sum(), "mine")
    assert two.compute(a, BATCH).item() == pytest.approx(a.sum().item())
    one = function_loss(lambda out: out.mean(), "mine")
    assert one.compute(a, BATCH).item() == pytest.approx(a.mean().item())
    several = function_loss(lambda out, _: {"a": out.sum(), "b": [out.mean()]}, "mine")
    assert several.compute(a, BATCH).item() == pytest.approx((a.sum() + a.mean()).item())
    assert several.settled().description == "mine (sum of 2)"
    assert two.settled().description == "mine"


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda out: out, r"mine is not a scalar but 2×3"),
        (lambda out: out.sum().item(), "mine is no tensor but a float"),
        (lambda out: None, "mine is no tensor but a NoneType"),
        (lambda out: {"a": out.sum(), "b": out}, "mine at 'b' is not a scalar"),
    ],
)
def test_not_a_scalar(returned: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises(LossError, match=words):
        function_loss(lambda out, _: returned(out), "mine").compute(leaf(2, 3), BATCH)
