"""One traced forward: which tensor came from which.

A ``TorchFunctionMode`` gives every tensor that an op returns a node, and a node knows the nodes it came from,
the parameters it consumed and the module whose forward ran it. Tensors are known by weak references: the
graph holds no tensor and marks none.

What the mode cannot see (custom autograd functions, scripted functions) is filled in: ``Function.apply`` is
wrapped while the mode is on, and a tensor of unknown origin is traced back through its autograd graph to
tensors that are known.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

INPUT_OP = "input"
OPAQUE_OP = "opaque"
ESCAPES = frozenset({"item", "tolist", "numpy", "__array__", "__float__", "__int__", "__index__"})
"""Ops that take values out of the graph and return no tensor."""
_TORCH_FOLDER = str(Path(torch.__file__).parent)
_OWN_FOLDER = str(Path(__file__).parent.parent)
_HELPERS = (_TORCH_FOLDER, _OWN_FOLDER, "<")


@dataclass(slots=True, eq=False)
class Node:
    """One tensor at one moment: an in-place op makes a new node of the same tensor."""

    index: int
    op: str
    inputs: tuple[int, ...]
    """Nodes of the tensor arguments, first to last; parameters are in ``parameters``."""
    parameters: tuple[int, ...]
    """``id`` of each parameter consumed directly."""
    module: str
    """Fully qualified name of the module whose forward ran the op."""
    shape: torch.Size
    floating: bool
    requires_grad: bool
    from_data: bool
    """An input of the model is among its ancestors."""
    from_parameter: bool
    """A parameter is among its ancestors (or consumed here)."""
    source: str = ""
    """"model.py:31"; filled in only where somebody asks while the op runs."""
    made_by: str | None = None
    """The first module that returned this tensor: for an op of a leaf module, the leaf."""
    returned_by: str | None = None
    """The outermost module that returned this tensor."""
    probe: int | None = None
    """Where the recorder measures it."""

    @property
    def place(self) -> str:
        """Fully qualified name of the module to point a reader to."""
        return self.module if self.made_by is None else self.made_by


Observer = Callable[[Node, Tensor, tuple[Any, ...]], None]
"""Called for every op with its node, the tensor it returned and the arguments it was given."""


class Dataflow(TorchFunctionMode):
    """Records nodes while it is entered.

    Args:
        parameters: The model's parameters.
        current_module: Returns the fully qualified name of the module that is running.
        observer: Told of each new node, with torch functions unobserved.
    """

    def __init__(
        self, parameters: Iterable[Tensor], current_module: Callable[[], str], observer: Observer
    ) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self._parameters = {id(parameter) for parameter in parameters}
        self._current_module = current_module
        self._observer = observer
        self._by_tensor: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._by_gradient: dict[int, int] = {}
        self._original_apply: Any = None

    def __enter__(self) -> Dataflow:
        self._original_apply = torch.autograd.Function.__dict__["apply"]
        torch.autograd.Function.apply = classmethod(self._traced_apply)  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        torch.autograd.Function.apply = self._original_apply  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        kind = type(result)
        if kind is Tensor or kind is tuple or kind is list or isinstance(result, Tensor):
            self._record(_op_name(func), args, kwargs, result)
        elif result is None:
            if func is Tensor.__setitem__:
                self._record("__setitem__", args, kwargs, args[0])
        elif getattr(func, "__name__", "") in ESCAPES and args:
            self._record_escape(func.__name__, args[0])
        return result

    def add_input(self, tensor: Tensor) -> None:
        """Make a tensor the model was given a root of the graph."""
        self._append(tensor, INPUT_OP, (), (), from_data=True)

    def node_of(self, tensor: Tensor) -> Node | None:
        """The node of a tensor as it is now; None for one that no op was seen to make."""
        index = self._known(tensor)
        return None if index is None else self.nodes[index]

    def _record(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None, result: Any) -> None:
        inputs: list[int] = []
        parameters: list[int] = []
        for tensor in _tensors(args):
            self._add_origin(tensor, inputs, parameters)
        if kwargs:
            for tensor in _tensors(tuple(kwargs.values())):
                self._add_origin(tensor, inputs, parameters)
        origin, consumed = tuple(inputs), tuple(parameters)
        from_data = any(self.nodes[i].from_data for i in origin)
        for tensor in (result,) if isinstance(result, Tensor) else _tensors(tuple(result)):
            if id(tensor) in self._parameters:
                continue
            node = self._append(tensor, op, origin, consumed, from_data=from_data)
            self._write_through(tensor, op, node)
            self._observer(node, tensor, args)

    def _add_origin(self, tensor: Tensor, inputs: list[int], parameters: list[int]) -> None:
        if id(tensor) in self._parameters:
            parameters.append(id(tensor))
            return
        index = self._known(tensor)
        if index is None and tensor.requires_grad:
            index = self._append_opaque(tensor)
        if index is not None:
            inputs.append(index)

    def _known(self, tensor: Tensor) -> int | None:
        entry = self._by_tensor.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def _append(
        self,
        tensor: Tensor,
        op: str,
        inputs: tuple[int, ...],
        parameters: tuple[int, ...],
        *,
        from_data: bool,
    ) -> Node:
        nodes = self.nodes
        requires_grad = tensor.requires_grad
        node = Node(
            index=len(nodes),
            op=op,
            inputs=inputs,
            parameters=parameters,
            module=self._current_module(),
            shape=tensor.shape,
            floating=tensor.is_floating_point() or tensor.is_complex(),
            requires_grad=requires_grad,
            from_data=from_data,
            from_parameter=bool(parameters) or any(nodes[i].from_parameter for i in inputs),
        )
        if not requires_grad and (parameters or any(nodes[i].requires_grad for i in inputs)):
            node.source = user_source()
        nodes.append(node)
        self._by_tensor[id(tensor)] = (weakref.ref(tensor), node.index)
        if requires_grad and tensor.grad_fn is not None:
            self._by_gradient[tensor.grad_fn._sequence_nr()] = node.index
        return node

    def _append_opaque(self, tensor: Tensor) -> int | None:
        """Trace a tensor of unknown origin back through autograd to what is known."""
        if tensor.grad_fn is None:
            return None
        inputs, parameters = self._autograd_origin(tensor.grad_fn)
        from_data = any(self.nodes[i].from_data for i in inputs)
        return self._append(tensor, OPAQUE_OP, inputs, parameters, from_data=from_data).index

    def _autograd_origin(self, start: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inputs: set[int] = set()
        parameters: set[int] = set()
        seen = {start}
        waiting = [start]
        while waiting:
            function = waiting.pop()
            known = self._by_gradient.get(function._sequence_nr())
            if known is not None:
                inputs.add(known)
            elif getattr(function, "variable", None) is not None:
                if id(function.variable) in self._parameters:
                    parameters.add(id(function.variable))
            else:
                following = [f for f, _ in function.next_functions if f is not None and f not in seen]
                seen.update(following)
                waiting.extend(following)
        return tuple(sorted(inputs)), tuple(parameters)

    def _write_through(self, tensor: Tensor, op: str, node: Node) -> None:
        """Writing into a view changes its base: the base then comes from this op too."""
        if not _is_in_place(op) or not tensor._is_view():
            return
        base = tensor._base
        known = None if base is None else self._known(base)
        if base is not None and known is not None:
            self._append(
                base, op, (known, node.index), (), from_data=node.from_data or self.nodes[known].from_data
            )

    def _record_escape(self, op: str, tensor: Any) -> None:
        index = self._known(tensor) if isinstance(tensor, Tensor) else None
        if index is None or not self.nodes[index].requires_grad:
            return
        self.nodes.append(
            Node(
                index=len(self.nodes),
                op=op.strip("_"),
                inputs=(index,),
                parameters=(),
                module=self._current_module(),
                shape=torch.Size(()),
                floating=False,
                requires_grad=False,
                from_data=self.nodes[index].from_data,
                from_parameter=True,
                source=user_source(),
            )
        )

    def _traced_apply(self, function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        result = self._original_apply.__get__(None, function)(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            if isinstance(result, Tensor | tuple | list):
                made = tuple(_tensors((result,)))
                # A checkpoint runs inside its Function: what its ops made stays an origin of what it returns.
                self._record(function.__name__, (*args, *made), kwargs, result)
        return result


def _op_name(func: Any) -> str:
    name: str = getattr(func, "__name__", "") or type(func).__name__
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return name


def _is_in_place(op: str) -> bool:
    return op == "__setitem__" or (op.endswith("_") and not op.endswith("__")) or op.startswith("__i")


def _tensors(values: tuple[Any, ...] | list[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, lists and dicts of them included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(tuple(value.values()))


def user_source() -> str:
    """File name and line of the nearest caller outside torch and gradflow; "" where there is none."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(_HELPERS):
            return f"{Path(filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
