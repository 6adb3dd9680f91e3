"""What each torch function that raised says about the inputs: one entry a function."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from gradflow.recording.guesses import SEQUENCE, Guess, Guesses
from gradflow.recording.refinement import Refinement, Step


def refine_op(step: Step) -> Iterator[Guesses]:
    """Propose better guesses for the function that raised; nothing for one that says nothing."""
    refinement = _BY_OP.get(step.failure.op.strip("_").removesuffix("_"))
    if refinement is not None:
        yield from refinement(step)


def _linear(step: Step) -> Iterator[Guesses]:
    data, weight = step.argument(0, "input"), step.argument(1, "weight")
    if isinstance(data, Tensor) and isinstance(weight, Tensor):
        yield from _product(step, data, -1, weight.shape[-1], weight)


def _matmul(step: Step) -> Iterator[Guesses]:
    left, right = step.argument(0, "input"), step.argument(1, "other")
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or not left.dim() or not right.dim():
        return
    inner = right.shape[max(right.dim() - 2, 0)]
    if step.origin(left) is not None:
        yield from _product(step, left, -1, inner, right)
    if step.origin(right) is not None:
        yield from _product(step, right, max(right.dim() - 2, 0), left.shape[-1], left)


def _product(step: Step, data: Tensor, dim: int, wanted: int, other: Tensor) -> Iterator[Guesses]:
    if data.dtype != other.dtype and not data.is_floating_point():
        yield from step.retyped(data, "float")
    elif data.dim() == 0:
        yield from step.with_ndim(data, 2)
    elif data.shape[dim] != wanted:
        yield from step.with_size(data, dim, wanted)


def _convolution(step: Step) -> Iterator[Guesses]:
    op = step.failure.op
    data, weight = step.argument(0, "input"), step.argument(1, "weight")
    if not isinstance(data, Tensor) or not isinstance(weight, Tensor):
        return
    transposed = "transpose" in op
    groups = step.argument(6, "groups") if not transposed else 1
    channels = weight.shape[0] if transposed else weight.shape[1] * (groups or 1)
    if not data.is_floating_point():
        yield from step.retyped(data, "float")
    elif data.dim() != weight.dim():
        yield from _as_grid(step, data, channels, weight.dim())
    elif data.shape[1] != channels:
        yield from step.with_size(data, 1, channels)
    else:
        yield from step.grown()


def _as_grid(step: Step, data: Tensor, channels: int, ndim: int) -> Iterator[Guesses]:
    origin = step.origin(data)
    if origin is None or origin.name is None:
        return
    guess = step.guesses[origin.name]
    # An unsqueezed input lacks a dimension that the model adds itself.
    own = len(guess.shape) + ndim - data.dim()
    if own == ndim:
        yield step.changed(origin.name, step.search.sizes.grid(channels, ndim - 2))
    elif 2 <= own <= 5:
        yield from step.with_ndim(data, ndim)


def _embedding(step: Step) -> Iterator[Guesses]:
    ids, table = step.argument(0, "input"), step.argument(1, "weight")
    if not isinstance(ids, Tensor) or not isinstance(table, Tensor):
        return
    rows, origin = table.shape[0], step.origin(ids)
    if origin is None or (not ids.is_floating_point() and int(ids.max()) >= rows and _are_positions(ids)):
        yield from _shortened(step, rows)
    if origin is None:
        return
    for name in origin.inputs:
        guess = step.guesses[name]
        if guess.kind != "ids":
            yield step.changed(name, _ids_like(guess, rows, step))
        else:
            yield from step.retyped(ids, "ids", rows if guess.high > rows else max(guess.high // 2, 1))


def _ids_like(guess: Guess, rows: int, step: Step) -> Guess:
    if guess.kind == "float" and len(guess.shape) == 1:
        return replace(guess, kind="ids", high=rows)
    return step.search.sizes.ids(rows)


def _are_positions(ids: Tensor) -> bool:
    flat = ids.reshape(-1, ids.shape[-1])[0] if ids.dim() else ids.reshape(1)
    return flat.numel() > 1 and bool((flat.diff() == 1).all())


def _shortened(step: Step, rows: int) -> Iterator[Guesses]:
    """A table of positions has too few rows: every sequence is at most that long."""
    for name, guess in step.guesses.items():
        if guess.free and guess.shape[guess.free[0]] > rows > 0:
            yield step.changed(name, guess.scaled(rows))
        elif guess.free and guess.shape[guess.free[0]] > 2:
            yield step.changed(name, guess.scaled(guess.shape[guess.free[0]] // 2))


def _layer_norm(step: Step) -> Iterator[Guesses]:
    data, shape = step.argument(0, "input"), step.argument(1, "normalized_shape")
    if not isinstance(data, Tensor) or shape is None:
        return
    if not data.is_floating_point():
        yield from step.retyped(data, "float")
    elif data.dim() < len(shape):
        yield from step.with_ndim(data, len(shape) + 1)
    else:
        for back in range(1, len(shape) + 1):
            if data.shape[-back] != shape[-back]:
                yield from step.with_size(data, data.dim() - back, shape[-back])
                return


def _channel_norm(step: Step) -> Iterator[Guesses]:
    data = step.argument(0, "input")
    tables = [v for v in (*step.failure.args[1:], *step.failure.kwargs.values()) if isinstance(v, Tensor)]
    if not isinstance(data, Tensor) or not tables:
        return
    if not data.is_floating_point():
        yield from step.retyped(data, "float")
    elif data.dim() > 1 and data.shape[1] != tables[0].numel():
        yield from step.with_size(data, 1, tables[0].numel())
    else:
        yield from step.grown()


def _attention(step: Step) -> Iterator[Guesses]:
    embed_dim = step.argument(3, "embed_dim_to_check")
    for index, name in enumerate(("query", "key", "value")):
        data = step.argument(index, name)
        if not isinstance(data, Tensor) or embed_dim is None:
            continue
        if not data.is_floating_point():
            yield from step.retyped(data, "float")
        elif data.dim() != 3:
            yield from step.with_ndim(data, 3)
        elif data.shape[-1] != embed_dim:
            yield from step.with_size(data, 2, embed_dim)


def _elementwise(step: Step) -> Iterator[Guesses]:
    first, second = (*step.failure.args[:2], None, None)[:2]
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return
    for back in range(1, min(first.dim(), second.dim()) + 1):
        here, there = first.shape[-back], second.shape[-back]
        if here == there or 1 in (here, there):
            continue
        # What the model owns stays: the input is to follow it. Of two inputs the later follows the earlier.
        if step.origin(second) is None:
            yield from step.with_size(first, first.dim() - back, there)
        else:
            yield from step.with_size(second, second.dim() - back, here)
            yield from step.with_size(first, first.dim() - back, there)


def _join(step: Step) -> Iterator[Guesses]:
    tensors = step.argument(0, "tensors")
    if not isinstance(tensors, (list, tuple)) or len(tensors) < 2:
        return
    first, *others = (t for t in tensors if isinstance(t, Tensor))
    for other in others:
        names = [origin.name for t in (first, other) if (origin := step.origin(t)) is not None]
        if len(names) == 2 and None not in names and first.dim() != other.dim():
            model, follower = str(names[0]), str(names[1])
            yield step.changed(follower, step.guesses[model])
            yield step.changed(model, step.guesses[follower])
            return
        for dim in range(min(first.dim(), other.dim())):
            if first.shape[dim] != other.shape[dim]:
                yield from step.with_size(other, dim, first.shape[dim])


def _view(step: Step) -> Iterator[Guesses]:
    data = step.argument(0, "input")
    wanted = step.failure.args[1:] or tuple(step.failure.kwargs.values())
    if len(wanted) == 1 and isinstance(wanted[0], (list, tuple)):
        wanted = tuple(wanted[0])
    if not isinstance(data, Tensor) or not all(isinstance(size, int) for size in wanted):
        return
    origin = step.origin(data)
    if origin is None or origin.name is None:
        return
    guess = step.guesses[origin.name]
    if guess.free and len(guess.shape) > 2:
        yield from step.searched(origin.name, data.numel(), abs(math.prod(wanted)))
        if -1 in wanted:  # the rest is not known, but (batch, …) must divide by it
            yield from step.grown()
    rest = [size for size in wanted[1:] if size > 0]
    if rest and guess.kind == "float":
        features = math.prod(rest)
        yield step.changed(origin.name, step.search.sizes.vector(features))
        yield step.changed(origin.name, Guess(shape=(guess.shape[0], *rest)))


def _index(step: Step) -> Iterator[Guesses]:
    data, text = step.argument(0, "input"), str(step.failure.error)
    if not isinstance(data, Tensor):
        return
    if "too many indices" in text:
        yield from step.with_ndim(data, data.dim() + 1)
    if (found := re.search(r"index (-?\d+) is out of bounds for dimension (\d+)", text)) is not None:
        yield from step.with_size(data, int(found[2]), abs(int(found[1])) + 1)
    indices = step.argument(1, "index")
    for index in indices if isinstance(indices, (list, tuple)) else (indices,):
        if isinstance(index, Tensor) and data.dim():
            yield from step.retyped(index, "ids", data.shape[0])


def _gather(step: Step) -> Iterator[Guesses]:
    data, dim, index = step.argument(0, "input"), step.argument(1, "dim"), step.argument(2, "index")
    if isinstance(data, Tensor) and isinstance(dim, int) and data.dim():
        yield from step.retyped(index, "ids", data.shape[dim])


def _one_hot(step: Step) -> Iterator[Guesses]:
    classes = step.argument(1, "num_classes")
    high = classes if isinstance(classes, int) and classes > 0 else 10
    yield from step.retyped(step.argument(0, "tensor"), "ids", high)


def _class_loss(step: Step) -> Iterator[Guesses]:
    scores, target = step.argument(0, "input"), step.argument(1, "target")
    if not isinstance(scores, Tensor) or not isinstance(target, Tensor) or scores.dim() < 2:
        return
    origin = step.origin(target)
    for name in origin.inputs if origin is not None else ():
        high = scores.shape[1]
        yield step.changed(name, Guess(shape=(scores.shape[0], *scores.shape[2:]), kind="ids", high=high))
        yield step.changed(
            name, Guess(shape=(step.search.sizes.sequence_batch, SEQUENCE), kind="ids", high=high)
        )


def _like_loss(step: Step) -> Iterator[Guesses]:
    scores, target = step.argument(0, "input"), step.argument(1, "target")
    origin = step.origin(target)
    for name in origin.inputs if origin is not None else ():
        if isinstance(scores, Tensor):
            yield step.changed(name, Guess(shape=tuple(scores.shape)))


def _window(step: Step) -> Iterator[Guesses]:
    if isinstance(data := step.argument(0, "input"), Tensor) and not data.is_floating_point():
        yield from step.retyped(data, "float")
    yield from step.grown()


def _split(step: Step) -> Iterator[Guesses]:
    data, dim = step.argument(0, "tensor"), step.argument(2, "dim")
    sizes = step.argument(1, "split_size_or_sections") or step.argument(1, "split_size")
    whole = isinstance(sizes, (list, tuple)) and all(isinstance(size, int) for size in sizes)
    if isinstance(data, Tensor) and whole:
        yield from step.with_size(data, dim if isinstance(dim, int) else 0, sum(sizes))


def _table(*groups: tuple[str, Refinement]) -> Mapping[str, Refinement]:
    return {name: refinement for names, refinement in groups for name in names.split()}


_BY_OP = _table(
    ("linear", _linear),
    ("split split_with_sizes", _split),
    ("matmul mm bmm addmm rmatmul einsum", _matmul),
    ("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", _convolution),
    ("embedding embedding_bag", _embedding),
    ("layer_norm rms_norm", _layer_norm),
    ("batch_norm group_norm instance_norm", _channel_norm),
    ("multi_head_attention_forward", _attention),
    ("add mul sub div truediv radd rmul rsub rtruediv iadd imul where maximum minimum", _elementwise),
    ("cat stack concat hstack vstack concatenate", _join),
    ("view reshape unflatten", _view),
    ("getitem select index", _index),
    ("gather index_select scatter scatter_add take_along_dim", _gather),
    ("one_hot", _one_hot),
    ("cross_entropy nll_loss", _class_loss),
    ("mse_loss l1_loss smooth_l1_loss binary_cross_entropy binary_cross_entropy_with_logits", _like_loss),
    ("max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d unfold pad", _window),
)
