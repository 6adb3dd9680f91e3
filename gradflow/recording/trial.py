"""One try of a guess: the model runs on a copy, and a failure says which op of which input it stopped at."""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gradflow.recording.seeding import random_state_kept

LARGE_MODEL = 50_000_000
"""Parameters above which the copy shares them with the model: a forward reads them only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Which inputs a tensor was made from."""

    inputs: frozenset[str]
    dims: tuple[int | None, ...]
    """For each dimension, which dimension of the one input it still is; None where that is lost."""

    @property
    def name(self) -> str | None:
        """The input, where there is one only."""
        return next(iter(self.inputs)) if len(self.inputs) == 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a try stopped."""

    error: BaseException
    op: str
    """Name of the torch function that raised; "" where Python code did."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    origins: Callable[[Any], Origin | None]
    progress: int
    """How many torch functions had run: of two failures the later one is the better guess."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """What one try gave: outputs, or the failure."""

    outputs: Any = None
    failure: Failure | None = None


def unwrapped(module: nn.Module) -> nn.Module:
    """Look through ``torch.compile`` and the data-parallel wrappers: what to read a signature from."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and type(module).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = getattr(module, "module", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


class Trials:
    """Tries calls of one model, which stays as it is: what a try changes is a copy, or put back."""

    def __init__(self, module: nn.Module) -> None:
        module = unwrapped(module)
        self._module = module
        self._copy = _copied(module)

    def run(self, inputs: dict[str, Any], call: Callable[[nn.Module], Any]) -> TrialResult:
        """Run ``call(model)``, following the tensors of ``inputs`` by name."""
        tracer = _Tracer(inputs)
        try:
            with _quietly(), self._as_found() as model, tracer:
                return TrialResult(outputs=call(model))
        except Exception as error:
            return TrialResult(failure=tracer.failure(error))

    @contextlib.contextmanager
    def _as_found(self) -> Iterator[nn.Module]:
        if self._copy is not None:
            yield self._copy
            return
        kept = [(m, dict(vars(m)), dict(m._buffers)) for m in self._module.modules()]
        values = [(b, b.clone()) for b in self._module.buffers()]
        try:
            yield self._module
        finally:
            for module, attributes, buffers in kept:
                vars(module).clear()
                vars(module).update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)
            for buffer, value in values:
                buffer.copy_(value)


def _copied(module: nn.Module) -> nn.Module | None:
    """Copy a model; None for one that cannot be (old weight_norm, open files, locks)."""
    memo: dict[int, Any] = {}
    parameters = [p for p in module.parameters() if not isinstance(p, nn.UninitializedParameter)]
    if sum(p.numel() for p in parameters) > LARGE_MODEL:
        memo = {id(p): p for p in parameters}
    try:
        return copy.deepcopy(module, memo)
    except Exception:  # whatever a __deepcopy__ raises; the tries then run in place and put things back
        return None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without gradients, warnings or a trace in the random state; compiled parts run eager."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_state_kept())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


_SWAPS = {"transpose", "swapaxes", "swapdims", "t", "permute"}
_MIXING = {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm"}


@dataclass(slots=True)
class _FailedOp:
    error: BaseException
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


class _Tracer(TorchFunctionMode):
    """Follows each input's dimensions through the ops that keep them."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__()
        self._origins = WeakTensorKeyDictionary()
        self._failed: _FailedOp | None = None
        self._count = 0
        for name, value in inputs.items():
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor):
                    self._origins[tensor] = Origin(inputs=frozenset((name,)), dims=tuple(range(tensor.dim())))

    def origin(self, value: Any) -> Origin | None:
        """Return where a tensor comes from; None for a parameter or a constant."""
        if not isinstance(value, Tensor) or value not in self._origins:
            return None
        origin: Origin = self._origins[value]
        return origin

    def failure(self, error: BaseException) -> Failure:
        """Describe the exception that ended the run."""
        failed = self._failed
        if failed is None or failed.error is not error:
            failed = _FailedOp(error, "", ())
        return Failure(
            error=error,
            op=failed.op,
            args=failed.args,
            kwargs=failed.kwargs,
            origins=self.origin,
            progress=self._count,
        )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._count += 1
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            self._failed = _FailedOp(error, getattr(func, "__name__", ""), args, kwargs)
            raise
        self._follow(getattr(func, "__name__", ""), args, kwargs, result)
        return result

    def _follow(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        flat = [
            item
            for arg in (*args, *kwargs.values())
            for item in (arg if isinstance(arg, (list, tuple)) else (arg,))
        ]
        sources = [(item, origin) for item in flat if (origin := self.origin(item)) is not None]
        if not sources:
            return
        inputs = frozenset().union(*(origin.inputs for _, origin in sources))
        for made in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(made, Tensor) and self.origin(made) is None:
                tensor, origin = sources[0]
                dims = _dims_after(op, args, tensor, origin.dims, made)
                self._origins[made] = Origin(inputs=inputs, dims=dims)


def _dims_after(
    op: str, args: tuple[Any, ...], source: Tensor, dims: tuple[int | None, ...], made: Tensor
) -> tuple[int | None, ...]:
    if op in _SWAPS and made.dim() == source.dim():
        return _permuted(op, args, source, dims)
    if op == "unsqueeze" and len(args) > 1 and isinstance(args[1], int):
        at = args[1] % made.dim()
        return (*dims[:at], None, *dims[at:])
    if op in _MIXING or op.startswith("conv"):
        kept = dims[: made.dim() - 1] if op in _MIXING else dims[:1]
        return (*kept, *[None] * (made.dim() - len(kept)))
    return _matched(tuple(source.shape), dims, tuple(made.shape))


def _permuted(
    op: str, args: tuple[Any, ...], source: Tensor, dims: tuple[int | None, ...]
) -> tuple[int | None, ...]:
    order = list(range(source.dim()))
    if op == "permute":
        given = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        return tuple(dims[d] for d in given) if len(given) == len(order) else (None,) * len(order)
    first, second = (0, 1) if op == "t" else args[1:3] if len(args) > 2 else (None, None)
    if first is None or second is None or len(order) < 2:
        return (None,) * len(order)
    order[first], order[second] = order[second], order[first]
    return tuple(dims[d] for d in order)


def _matched(
    before: tuple[int, ...], dims: tuple[int | None, ...], after: tuple[int, ...]
) -> tuple[int | None, ...]:
    """Carry dimensions over an op of any other kind: equal sizes from the front, then from the back."""
    made: list[int | None] = [None] * len(after)
    front = 0
    while front < min(len(before), len(after)) and before[front] == after[front]:
        made[front] = dims[front]
        front += 1
    back = 1
    while back <= min(len(before), len(after)) - front and before[-back] == after[-back]:
        made[-back] = dims[-back]
        back += 1
    return tuple(made)
