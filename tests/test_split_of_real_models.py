"""The split at the blocks of models nobody here wrote, against autograd on what their own modules take and return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

import gradflow
from tests.transformers_zoo import bert, gpt2, resnet
from tests.witness import close, norm


class Seen(NamedTuple):
    """One block's add, by the tensors that its modules took and returned."""

    source: GradientEdge
    skip: GradientEdge | None
    """None for a bare skip."""
    branch: GradientEdge


class Watch:
    """Notes inputs and outputs of modules as autograd knows them before anything is written into them."""

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, GradientEdge] = {}
        self.outputs: dict[nn.Module, GradientEdge] = {}
        self.gradients: dict[nn.Module, Tensor] = {}

    def add(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.requires_grad)
        tensor = next(tensors, None)
        if tensor is not None:
            self.inputs[module] = get_gradient_edge(tensor)
            tensor.register_hook(lambda gradient: self.gradients.__setitem__(module, gradient))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            self.outputs[module] = get_gradient_edge(tensor)


def gpt2_adds(model: Any, watch: Watch) -> list[tuple[Seen, nn.Module]]:
    """x + attn(ln_1(x)), read by ln_2; then x + mlp(ln_2(x)), read by the next block's ln_1."""
    blocks = model.transformer.h
    after = [*(block.ln_1 for block in blocks[1:]), model.transformer.ln_f]
    return [
        add
        for block, following in zip(blocks, after, strict=True)
        for add in (
            (Seen(watch.inputs[block.ln_1], None, watch.outputs[block.attn]), block.ln_2),
            (Seen(watch.inputs[block.ln_2], None, watch.outputs[block.mlp]), following),
        )
    ]


def bert_adds(model: Any, watch: Watch) -> list[tuple[Seen, nn.Module]]:
    """LayerNorm(x + dropout(dense(...))), twice a layer: query, key and value all read x."""
    return [
        add
        for layer in model.bert.encoder.layer
        for add in (
            (
                Seen(watch.inputs[layer.attention], None, watch.outputs[layer.attention.output.dropout]),
                layer.attention.output.LayerNorm,
            ),
            (
                Seen(watch.inputs[layer.intermediate], None, watch.outputs[layer.output.dropout]),
                layer.output.LayerNorm,
            ),
        )
    ]


def resnet_adds(model: Any, watch: Watch) -> list[tuple[Seen, nn.Module]]:
    """layer(x), into which shortcut(x) is written, read by the activation."""
    return [
        (
            Seen(
                watch.inputs[block.layer],
                None if isinstance(block.shortcut, nn.Identity) else watch.outputs[block.shortcut],
                watch.outputs[block.layer],
            ),
            block.activation,
        )
        for stage in model.resnet.encoder.stages
        for block in stage.layers
    ]


Adds = Callable[[Any, Watch], list[tuple[Seen, nn.Module]]]


@pytest.mark.parametrize(
    ("build", "adds"),
    [(gpt2, gpt2_adds), (bert, bert_adds), (resnet, resnet_adds)],
    ids=["gpt2", "bert", "resnet"],
)
def test_the_split_is_that_of_autograd_on_the_modules_own_tensors(build: Any, adds: Adds) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    model.double().eval()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    measured = gradflow.inspect(model, inputs).residuals
    watch = Watch()
    for module in model.modules():
        watch.add(module)
    model(**inputs).loss.backward(retain_graph=True)
    expected = adds(model, watch)
    assert len(measured) == len(expected) > 0
    for row, (seen, reader) in zip(measured.itertuples(), expected, strict=True):
        gradient = watch.gradients[reader]
        (branch,) = torch.autograd.grad(seen.branch, seen.source, gradient, retain_graph=True)
        skip = gradient
        if seen.skip is not None:
            (skip,) = torch.autograd.grad(seen.skip, seen.source, gradient, retain_graph=True)
        values = {
            "gradient_norm": norm(gradient),
            "skip_gradient_norm": norm(skip),
            "branch_gradient_norm": norm(branch),
            "gradient_cosine": (skip * branch).sum().item() / norm(skip) / norm(branch),
            "branch_gain": norm(branch) / norm(gradient),
        }
        for column, value in values.items():
            assert close(getattr(row, column), value, 1e-10), (row.name, column)
