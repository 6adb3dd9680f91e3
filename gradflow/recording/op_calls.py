"""Which call of an op is this? The answer is the same in every run of the same step.

A call is known by the module whose forward makes it, which entry of that module it is, the op's name, and its
place among the calls of that op there. Two runs of one step with the same seed make the same calls up to the
first one that is changed, and models without data-dependent control flow all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradflow.recording.dataflow import Dataflow
from gradflow.recording.hooks import ModuleHooks
from gradflow.recording.layout import ModelLayout


class OpCall(NamedTuple):
    """One call of an op in one run of a step."""

    module: str
    """Fully qualified name of the module whose forward makes it."""
    entry: int
    """The how-manieth entry of that module, from 0; -1 outside the model (in the loss)."""
    op: str
    ordinal: int
    """The how-manieth call of that op in that entry, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenCall:
    """A call with the tensors it was given, as nodes of the dataflow; None for one without a node."""

    call: OpCall
    nodes: tuple[int | None, ...]


class CallCounter:
    """Numbers calls as they come, given who is running."""

    def __init__(self, hooks: ModuleHooks) -> None:
        self._hooks = hooks
        self._entries: Counter[str] = Counter()
        self._entry_of: dict[int, int] = {}
        self._calls: Counter[tuple[int, str]] = Counter()

    def next(self, op: str) -> OpCall:
        """The call that is about to be made."""
        hooks = self._hooks
        if not hooks.scopes:
            scope, name, entry = -1, "", -1
        else:
            scope, name = hooks.scopes[-1], hooks.running[-1]
            entry = self._entry_of.get(scope, -1)
            if entry < 0:
                entry = self._entry_of[scope] = self._entries[name]
                self._entries[name] += 1
        ordinal = self._calls[scope, op]
        self._calls[scope, op] += 1
        return OpCall(name, entry, op, ordinal)


class CallLog(TorchFunctionMode):
    """Writes down which call made each node of a dataflow; entered inside it.

    Args:
        dataflow: The one that is recording.
        hooks: Who is running.
    """

    def __init__(self, dataflow: Dataflow, hooks: ModuleHooks) -> None:
        super().__init__()
        self.made: dict[int, SeenCall] = {}
        """The call that made a node."""
        self._dataflow = dataflow
        self._counter = CallCounter(hooks)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = self._counter.next(getattr(func, "__name__", ""))
        nodes = tuple(self._index(leaf) for leaf in operands(args, kwargs))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            made = self._index(result)
            if made is not None and made not in nodes:
                self.made.setdefault(made, SeenCall(call=call, nodes=nodes))
        return result

    def _index(self, tensor: Tensor) -> int | None:
        node = self._dataflow.node_of(tensor)
        return None if node is None else node.index


class Zeroing(TorchFunctionMode):
    """Gives chosen calls zeros instead of some of their tensors.

    Args:
        layout: The model's.
        wanted: For each call, which of its tensors (positions among :func:`operands`).
    """

    def __init__(self, layout: ModelLayout, wanted: Mapping[OpCall, frozenset[int]]) -> None:
        super().__init__()
        self.missed = set(wanted)
        """Calls that have not come yet."""
        self._wanted = wanted
        self._hooks = ModuleHooks(layout, _ignore)
        self._counter = CallCounter(self._hooks)

    def __enter__(self) -> Zeroing:
        self._hooks.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = self._counter.next(getattr(func, "__name__", ""))
        positions = self._wanted.get(call)
        if positions is not None:
            self.missed.discard(call)
            args, kwargs = zeroed(call.op, args, kwargs or {}, positions)
        return func(*args, **(kwargs or {}))


def operands(args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> list[Tensor]:
    """The tensors an op is given, in order; not the one it is to write to (``out``)."""
    named = [value for name, value in (kwargs or {}).items() if name != "out"]
    return list(_leaves((*args, *named)))


def zeroed(
    op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], positions: frozenset[int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with zeros at the positions; a tensor that the op writes into is itself set to zero."""
    counter = iter(range(len(operands(args, kwargs))))
    own = 0 if op.startswith("__i") or (op.endswith("_") and not op.endswith("__")) else None

    def replaced(value: Any) -> Any:
        if isinstance(value, Tensor):
            at = next(counter)
            if at not in positions:
                return value
            return value.zero_() if at == own else torch.zeros_like(value)
        if type(value) in (tuple, list):
            return type(value)([replaced(item) for item in value])
        return value

    new_args = tuple(replaced(value) for value in args)
    return new_args, {name: value if name == "out" else replaced(value) for name, value in kwargs.items()}


def _leaves(values: tuple[Any, ...] | list[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (tuple, list):
            yield from _leaves(value)


def _ignore(name: str, module: nn.Module, output: Any) -> None:
    """What modules return is of no interest here."""
