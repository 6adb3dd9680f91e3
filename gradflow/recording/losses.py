"""How outputs become the scalar that backward starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradflow.errors import LossError, UsageError
from gradflow.recording.leaves import Leaf, floating_leaves
from gradflow.recording.signatures import positional_count
from gradflow.recording.target_types import Batch, Loss, user_inputs

LOSSES = ("cross-entropy", "mse", "sum", "probe")
PROBE = "probe"
OWN_LOSS = "the output's own .loss"


def named_loss(name: str, seed: int) -> Loss:
    """Make the loss of ``--loss``.

    Raises:
        UsageError: There is no loss of that name.
    """
    if name == "cross-entropy":
        return Loss(
            description="cross-entropy (random targets)", compute=lambda out, _: _cross_entropy(out, seed)
        )
    if name == "mse":
        return Loss(description="mse (random targets)", compute=lambda out, _: _mse(out, seed))
    if name == "sum":
        return Loss(description="sum of the outputs", compute=lambda out, _: _sum(out))
    if name == "probe":
        return probe_loss(seed)
    raise UsageError(
        f"--loss {name!r} is none of {', '.join(LOSSES)}; a loss of your own goes into the file as loss()"
    )


def probe_loss(seed: int) -> Loss:
    """Make the probe: a seeded N(0, 1) cotangent on every floating output (the averaged Jacobian).

    The loss is the sum over output leaves y of sum(y * v) with v ~ N(0, 1), so that dL/dy = v.
    """
    return Loss(description=PROBE, compute=lambda outputs, _: _probe(outputs, seed), is_probe=True)


def returned_loss(seed: int) -> Loss:
    """Take the loss that the model returns, else the probe; which one is known after the first step."""
    kinds: list[Loss] = []

    def compute(outputs: Any, batch: Batch) -> Tensor:
        kind = loss_of_outputs(outputs, seed)
        kinds[:] = [kind]
        return kind.compute(outputs, batch)

    return Loss(
        description=f"{OWN_LOSS}, else the {PROBE}",
        compute=compute,
        settle=lambda: kinds[0] if kinds else returned_loss(seed),
    )


def loss_of_outputs(outputs: Any, seed: int) -> Loss:
    """Choose between a returned loss and the probe, given what the model returned once."""
    own = own_loss(outputs)
    if own is None:
        return probe_loss(seed)
    words = OWN_LOSS if own is not outputs else "the output itself"
    return Loss(
        description=_counted(words, own),
        compute=lambda out, _: total(own_loss(out), words),
    )


def own_loss(outputs: Any) -> Any:
    """Return ``outputs.loss``, ``outputs["loss"]``, or outputs that are nothing but scalars; else None."""
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if found is not None and not callable(found):
        return found
    leaves = floating_leaves(outputs)
    if leaves and all(leaf.dim() == 0 for _, leaf in leaves):
        return outputs
    return None


def function_loss(function: Callable[..., Any], description: str) -> Loss:
    """Make a loss of the user's ``loss(outputs, inputs)``; a function of one argument gets the outputs."""
    counts: list[str] = []
    takes_inputs = positional_count(function) != 1

    def compute(outputs: Any, batch: Batch) -> Tensor:
        value = function(outputs, user_inputs(batch)) if takes_inputs else function(outputs)
        counts[:] = [_counted(description, value)]
        return total(value, description)

    def settle() -> Loss:
        return Loss(description=counts[0] if counts else description, compute=compute)

    return Loss(description=description, compute=compute, settle=settle)


def total(value: Any, words: str) -> Tensor:
    """Sum what a loss returned to one scalar.

    Raises:
        LossError: It is no tensor, or not a scalar.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    leaves = floating_leaves(value)
    if isinstance(value, Tensor):
        shape = "×".join(map(str, value.shape))
        raise LossError(f"{words} is not a scalar but {shape}; return its .mean() or .sum()")
    if not leaves:
        kind = type(value).__name__
        raise LossError(f"{words} is no tensor but a {kind}; return a scalar tensor (without .item())")
    return torch.stack([total(leaf, f"{words} at {path!r}") for path, leaf in leaves]).sum()


def _counted(words: str, value: Any) -> str:
    count = len(floating_leaves(value))
    return f"{words} (sum of {count})" if count > 1 else words


def _generator(seed: int) -> torch.Generator:
    """A generator beside the global one, which it must not draw from.

    It follows the step's seed too, so that several steps with one fixed batch see several cotangents.
    """
    return torch.Generator().manual_seed((seed + torch.initial_seed()) % 2**63)


def _differentiable(outputs: Any) -> list[Leaf]:
    """Floating leaves that a gradient can start from, a tensor that comes twice taken once.

    Where none requires a gradient (all detached, all frozen) it is all of them: what cut them off is a
    finding (GF103), not an error.
    """
    floating = floating_leaves(outputs)
    if not floating:
        raise LossError(
            f"the model returned {_kind(outputs)}, so there is no floating-point tensor to differentiate"
        )
    wanted = [pair for pair in floating if pair[1].requires_grad] or floating
    leaves = {id(leaf): (path, leaf) for path, leaf in reversed(wanted)}
    return list(reversed(leaves.values()))


def _kind(outputs: Any) -> str:
    """What a model returned, for a sentence: "a 4×2 int64 tensor", "None", "a dict"."""
    if isinstance(outputs, Tensor):
        shape = "×".join(map(str, outputs.shape)) or "scalar"
        return f"a {shape} {str(outputs.dtype).removeprefix('torch.')} tensor"
    return "None" if outputs is None else f"a {type(outputs).__name__} without one"


def _dense(leaf: Tensor) -> Tensor:
    """A leaf as plain real numbers, at least in single precision: sums of halves overflow."""
    if leaf.layout is not torch.strided:
        leaf = leaf.to_dense()
    if leaf.is_complex():
        leaf = torch.view_as_real(leaf)
    return leaf.float() if leaf.dtype in (torch.float16, torch.bfloat16) else leaf


def _probe(outputs: Any, seed: int) -> Tensor:
    generator = _generator(seed)
    terms = []
    for _, leaf in _differentiable(outputs):
        values = _dense(leaf)
        # Drawn on the CPU: the same numbers on every device.
        cotangent = torch.randn(values.shape, generator=generator, device="cpu").to(values)
        terms.append((values * cotangent).sum())
    return _added(terms)


def _sum(outputs: Any) -> Tensor:
    return _added([_dense(leaf).sum() for _, leaf in _differentiable(outputs)])


def _mse(outputs: Any, seed: int) -> Tensor:
    generator = _generator(seed)
    leaves = [_dense(leaf) for _, leaf in _differentiable(outputs)]
    return _added(
        [F.mse_loss(v, torch.randn(v.shape, generator=generator, device="cpu").to(v)) for v in leaves]
    )


def _added(terms: list[Tensor]) -> Tensor:
    loss = terms[0]
    for term in terms[1:]:
        loss = loss + term.to(loss)
    return loss


def _cross_entropy(outputs: Any, seed: int) -> Tensor:
    """Cross-entropy with seeded random classes: of [N, C], of tokens [N, T, C], of pixels [N, C, H, W]."""
    leaves = _differentiable(outputs)
    scores = [(path, leaf) for path, leaf in leaves if leaf.dim() >= 2]
    named = [pair for pair in scores if pair[0].rpartition(".")[2] == "logits"]
    if not scores:
        path, leaf = leaves[-1]
        shape = "×".join(map(str, leaf.shape)) or "a scalar"
        raise LossError(f"cross-entropy needs logits (batch, classes), but the output {path!r} is {shape}")
    logits = _dense((named or scores)[-1][1])
    logits = logits.flatten(0, 1) if logits.dim() == 3 else logits
    if logits.shape[1] < 2:
        raise LossError(
            f"cross-entropy over one class is always 0 (the output is {'×'.join(map(str, logits.shape))}); "
            "use --loss mse, --loss probe, or a loss() in the file"
        )
    positions = (logits.shape[0], *logits.shape[2:])
    targets = torch.randint(0, logits.shape[1], positions, generator=_generator(seed), device="cpu")
    return F.cross_entropy(logits, targets.to(logits.device))
