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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode

INPUT_OP = "input"
OPAQUE_OP = "opaque"
ESCAPES = frozenset({"item", "tolist", "numpy", "__array__", "__float__", "__int__", "__index__"})
"""Ops that take values out of the graph and return no tensor."""
_NO_OPS = "to contiguous float double half bfloat16 type type_as cpu cuda flatten reshape requires_grad_ resolve_conj"
MAY_RETURN_ITSELF = frozenset(_NO_OPS.split())
"""Ops that return their argument as it is where there is nothing to do: that makes no new tensor."""
_BLANKS = """
new_empty new_zeros new_ones new_full new_tensor empty_like zeros_like ones_like full_like rand_like randn_like
randint_like
"""
BLANK_OPS = frozenset(_BLANKS.split())
"""Ops that take a tensor for its shape alone: none of its values goes in."""
LIKE_OPS = frozenset({"expand_as", "view_as", "reshape_as", "type_as", "to"})
"""Ops that take every tensor but the first for its shape or dtype alone."""
_TORCH_FOLDER = str(Path(torch.__file__).parent)
_OWN_FOLDER = str(Path(__file__).parent.parent)
_HELPERS = (_TORCH_FOLDER, _OWN_FOLDER, "<")
_PLAIN_FUNCTIONS = frozenset({FunctionType, BuiltinFunctionType, MethodDescriptorType})
"""Types of nearly all that a mode is handed; the name of one is that of its op."""


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


class Joining(NamedTuple):
    """A custom autograd function that has returned."""

    name: str
    start: int
    """The first node that could be made in its forward."""


Frame = tuple[str, int, str]
"""File, line and function of a caller."""
Observer = Callable[[Node, Tensor, tuple[Any, ...]], None]
"""Called for every op with its node, the tensor it returned and the arguments it was given."""
Before = Callable[[str, tuple[Any, ...], dict[str, Any] | None], None]
"""Called before an op runs: an in-place one is about to overwrite what it was given."""


class Dataflow(TorchFunctionMode):
    """Records nodes while it is entered.

    Args:
        parameters: The model's parameters.
        running: Fully qualified names of the modules that are running, outermost first.
        observer: Told of each new node, with torch functions unobserved.
        before: Told of the ops whose operands matter, before they run: op -> callback.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        running: Sequence[str],
        observer: Observer,
        before: Mapping[str, Before],
    ) -> None:
        super().__init__()
        self._before = before
        self._references: list[weakref.ref[Tensor] | None] = []
        self.nodes: list[Node] = []
        self._parameters = {id(parameter) for parameter in parameters}
        self._running = running
        self._observer = observer
        self._by_tensor: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._remembered: dict[int, int] = {}
        self._original_apply: Any = None
        self.functions: list[str] = []
        """Custom autograd functions whose forward is running, outermost first."""
        self.joining: Joining | None = None
        """Set while what one of them returns is recorded."""
        self.unseen: Callable[[Node, Tensor], None] = _ignore
        """Told of a tensor that no op was seen to make, once it is traced back."""

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
        op = func.__name__ if type(func) in _PLAIN_FUNCTIONS else _op_name(func)
        before = self._before.get(op)
        if before is not None:
            before(op, args, kwargs)
        result = func(*args, **kwargs) if kwargs else func(*args)
        if isinstance(result, Tensor):
            self._record(op, args, kwargs, (result,))
        elif op in ESCAPES:
            self._record_escape(op, args[0])
        elif type(result) is tuple or type(result) is list:
            self._record(op, args, kwargs, _tensors(result))
        elif result is None:
            if func is Tensor.__setitem__:
                self._record("__setitem__", args, kwargs, (args[0],))
        elif isinstance(result, tuple) and not isinstance(result, torch.Size):
            self._record(op, args, kwargs, _tensors(tuple(result)))
        return result

    def add_input(self, tensor: Tensor) -> None:
        """Make a tensor the model was given a root of the graph."""
        self._append(tensor, INPUT_OP, (), ()).from_data = True

    def node_of(self, tensor: Tensor) -> Node | None:
        """The node of a tensor as it is now; None for one that no op was seen to make."""
        entry = self._by_tensor.get(id(tensor))
        return self.nodes[entry[1]] if entry is not None and entry[0]() is tensor else None

    def tensor_of(self, index: int) -> Tensor | None:
        """The tensor of a node, where it still exists and has not been changed in place since."""
        reference = self._references[index]
        tensor = None if reference is None else reference()
        return tensor if tensor is not None and self._known(tensor) == index else None

    def is_of(self, index: int, tensor: Tensor) -> bool:
        """The node is of this very tensor, as it is or as it was."""
        reference = self._references[index]
        return reference is not None and reference() is tensor

    def _record(
        self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None, results: Iterable[Tensor]
    ) -> None:
        inputs: list[int] = []
        parameters: list[int] = []
        values = args[:1] if op in LIKE_OPS else args[1:] if op in BLANK_OPS else args
        self._add_origins(values, inputs, parameters)
        if kwargs and op not in LIKE_OPS:
            self._add_origins(tuple(kwargs.values()), inputs, parameters)
        origin, consumed = tuple(inputs), tuple(parameters)
        for tensor in results:
            if id(tensor) in self._parameters or (op in MAY_RETURN_ITSELF and args and tensor is args[0]):
                continue
            node = self._append(tensor, op, origin, consumed)
            if op[-1] == "_":
                self._write_through(tensor, op, node)
            self._observer(node, tensor, args)

    def _add_origins(self, values: Iterable[Any], inputs: list[int], parameters: list[int]) -> None:
        """Sort the tensors among arguments into nodes and parameters; this runs for every op of the model."""
        for value in values:
            identity = id(value)
            entry = self._by_tensor.get(identity)
            if entry is not None and entry[0]() is value:
                inputs.append(entry[1])
            elif identity in self._parameters:
                parameters.append(identity)
            elif isinstance(value, Tensor):
                opaque = self._append_opaque(value) if value.requires_grad else None
                if opaque is not None:
                    inputs.append(opaque)
            elif isinstance(value, tuple | list):
                self._add_origins(value, inputs, parameters)
            elif isinstance(value, dict):
                self._add_origins(value.values(), inputs, parameters)

    def _known(self, tensor: Tensor) -> int | None:
        entry = self._by_tensor.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def _append(self, tensor: Tensor, op: str, inputs: tuple[int, ...], parameters: tuple[int, ...]) -> Node:
        nodes, stack = self.nodes, self._running
        requires_grad = tensor.requires_grad
        from_data, from_parameter = False, bool(parameters)
        gradient_goes_in = from_parameter
        for i in inputs:
            origin = nodes[i]
            from_data = from_data or origin.from_data
            from_parameter = from_parameter or origin.from_parameter
            gradient_goes_in = gradient_goes_in or origin.requires_grad
        node = Node(
            len(nodes),
            op,
            inputs,
            parameters,
            stack[-1] if stack else "",
            tensor.shape,
            tensor.is_floating_point() or tensor.is_complex(),
            requires_grad,
            from_data,
            from_parameter,
        )
        if gradient_goes_in and not requires_grad:
            node.source = user_source()
        reference = weakref.ref(tensor)
        self._by_tensor[id(tensor)] = (reference, node.index)
        self._references.append(reference)
        nodes.append(node)
        return node

    def _append_opaque(self, tensor: Tensor) -> int | None:
        """Trace a tensor of unknown origin back through autograd to what is known."""
        if tensor.grad_fn is None:
            return None
        inputs, parameters = self._autograd_origin(tensor.grad_fn, self._findable_gradients())
        node = self._append(tensor, OPAQUE_OP, inputs, parameters)
        self.unseen(node, tensor)
        return node.index

    def imagine(
        self, op: str, tensors: Sequence[Tensor], shape: Sequence[int], made_from: Sequence[Node] = ()
    ) -> Node:
        """A node for a tensor that a fused op is about to make inside, and never hands out."""
        inputs = [node.index for node in made_from]
        parameters: list[int] = []
        self._add_origins(tensors, inputs, parameters)
        origins = [self.nodes[i] for i in inputs]
        self._references.append(None)
        self.nodes.append(
            Node(
                index=len(self.nodes),
                op=op,
                inputs=tuple(inputs),
                parameters=tuple(parameters),
                module=self._running[-1] if self._running else "",
                shape=torch.Size(shape),
                floating=True,
                requires_grad=any(t.requires_grad for t in tensors) or any(o.requires_grad for o in origins),
                from_data=any(origin.from_data for origin in origins),
                from_parameter=bool(parameters) or any(origin.from_parameter for origin in origins),
            )
        )
        return self.nodes[-1]

    def forget(self, nodes: Sequence[Node]) -> None:
        """Take back imagined nodes, the last ones first."""
        for node in reversed(nodes):
            if node is self.nodes[-1]:
                self.nodes.pop()
                self._references.pop()

    def remember(self, node: Node, tensor: Tensor) -> None:
        """Let a node be found again through autograd once its tensor is gone."""
        if tensor.grad_fn is not None:
            self._remembered[tensor.grad_fn._sequence_nr()] = node.index

    def _findable_gradients(self) -> dict[int, int]:
        """Nodes of tensors that are remembered or still exist, by the number of their gradient function."""
        alive = ((reference(), index) for reference, index in self._by_tensor.values())
        found = {t.grad_fn._sequence_nr(): i for t, i in alive if t is not None and t.grad_fn is not None}
        return self._remembered | found

    def _autograd_origin(
        self, start: Any, findable: dict[int, int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inputs: set[int] = set()
        parameters: set[int] = set()
        seen = {start}
        waiting = [start]
        while waiting:
            function = waiting.pop()
            known = findable.get(function._sequence_nr())
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
            self._append(base, op, (known, node.index), ())

    def _record_escape(self, op: str, tensor: Any) -> None:
        index = self._known(tensor) if isinstance(tensor, Tensor) else None
        if index is None or not self.nodes[index].from_parameter:
            return
        self._references.append(None)
        self.nodes.append(
            Node(
                index=len(self.nodes),
                op=op.strip("_"),
                inputs=(index,),
                parameters=(),
                module=self._running[-1] if self._running else "",
                shape=torch.Size(()),
                floating=False,
                requires_grad=False,
                from_data=self.nodes[index].from_data,
                from_parameter=True,
                source=user_source(),
            )
        )

    def _traced_apply(self, function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        name = function.__name__
        # torch's own run what they are given (a checkpoint its block); any other has a backward of its own.
        custom = not function.__module__.startswith("torch.")
        start = len(self.nodes)
        if custom:
            self.functions.append(name)
        try:
            result = self._original_apply.__get__(None, function)(*args, **kwargs)
        finally:
            if custom:
                self.functions.pop()
        with torch._C.DisableTorchFunction():
            if isinstance(result, Tensor | tuple | list):
                made = tuple(_tensors((result,)))
                seen = tuple(tensor for tensor in made if self._known(tensor) is not None)
                if custom:
                    self._record_function(Joining(name, start), args, kwargs, made)
                else:
                    # A checkpoint runs inside its Function: what its ops made stays an origin of what it returns.
                    self._record(name, (*args, *seen), kwargs, made)
        return result

    def _record_function(
        self, joining: Joining, args: tuple[Any, ...], kwargs: dict[str, Any], made: Sequence[Tensor]
    ) -> None:
        """What a custom function returns, in the order in which it was made: the later may come from the earlier."""
        ages = {id(tensor): self._known(tensor) for tensor in made}
        ordered = sorted(made, key=lambda tensor: ages[id(tensor)] or 0)
        self.joining = joining
        for at, tensor in enumerate(ordered):
            own = (tensor,) if ages[id(tensor)] is not None else ()
            self._record(joining.name, (*args, *ordered[:at], *own), kwargs, (tensor,))
        self.joining = None


def _ignore(node: Node, tensor: Tensor) -> None:
    """Nobody asked."""


def _op_name(func: Any) -> str:
    name: str = getattr(func, "__name__", "") or type(func).__name__
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    if isinstance(func, OpOverload | OpOverloadPacket):
        return _library_name(func)
    return name


def _library_name(func: OpOverload | OpOverloadPacket) -> str:
    """ "add" for one of torch's own ("add.Tensor"), "library::op" for any other."""
    packet = func if isinstance(func, OpOverloadPacket) else func.overloadpacket
    library, _, name = packet._qualified_op_name.partition("::")
    return name if library in ("aten", "prims") else f"{library}::{name}"


def _is_in_place(op: str) -> bool:
    return op == "__setitem__" or (op.endswith("_") and not op.endswith("__")) or op.startswith("__i")


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, lists and dicts of them included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def user_source() -> str:
    """File name and line of the nearest caller outside torch and gradflow; "" where there is none."""
    for filename, line, _ in _user_frames():
        return f"{Path(filename).name}:{line}"
    return ""


def user_frames() -> tuple[Frame, ...]:
    """(file, line, function) of every caller outside torch and gradflow, innermost first."""
    return tuple(_user_frames())


def _user_frames() -> Iterator[Frame]:
    frame: Any = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(_HELPERS):
            yield filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


def ancestors(nodes: Sequence[Node], end: int | None) -> set[int]:
    """A node and everything it came from; empty for None."""
    if end is None:
        return set()
    reached = {end}
    waiting = [end]
    while waiting:
        for i in nodes[waiting.pop()].inputs:
            if i not in reached:
                reached.add(i)
                waiting.append(i)
    return reached
