"""An exception from running a model -> one sentence: whose fault it is, at which layer, and what to try.

Inputs that do not fit are the command line's fault (exit 2): a layer that reads an input directly got another
shape or dtype than it wants, or a layer further in got a size that follows from the input's (the Linear
behind a flattened image). A width that the model itself fixes, so that no input could fit, and whatever else
raises is the model's (exit 3).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from torch import Tensor, nn

from gradflow.errors import GradflowError, InputError, ModelError
from gradflow.recording.layer_wants import out_width, wants
from gradflow.recording.tracebacks import (
    frames,
    is_out_of_memory,
    is_user_file,
    model_error,
    one_line,
    user_traceback,
)

_MISFIT = re.compile(
    r"cannot be multiplied|Given (?:transposed=\d, )?(?:groups|weight|normalized_shape|input size)"
    r"|expected input\[|size of tensor a|[Ee]xpected \d(?:-D or \d-D|D)|must match|invalid for input of size"
    r"|running_mean should contain|must be equal to input_size|has inconsistent input_size"
    r"|[Ii]ndex(?: -?\d+ is)? out of (?:range|bounds)|embedding dimension"
    r"|Dimension out of range|values to unpack|too many indices|same dtype|scalar type|should be the same"
    r"|Expected tensor for argument|must be tuple of ints|mat1|RNN: Expected|LSTM: Expected|GRU: Expected"
    r"|feature number of src and tgt|batch number of src and tgt|more than 1 value per channel"
    r"|not implemented for"
)
_CALL = re.compile(
    r"(missing \d+ required|unexpected keyword argument|takes .* positional argument|multiple values)"
)
_CALLERS = (
    "dataflow.py",
    "input_inference.py",
    "lightning_bridge.py",
    "losses.py",
    "object_target.py",
    "steps.py",
    "target.py",
    "trial.py",
)
"""Ours that call the user's code or pass on an op of it; the others only measure."""
_TENSOR_NAMES = ("input", "query", "src", "x", "hidden_states", "inputs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The innermost module on a traceback."""

    name: str
    """Fully qualified; "" for the root."""
    layer: nn.Module
    got: Tensor | None
    """The tensor it was given."""
    from_input: bool
    """True where that is an input of the model, or a view of one."""

    @property
    def words(self) -> str:
        """Name it for a sentence: "layer blocks.3.fc"."""
        return f"layer {self.name}" if self.name else f"{type(self.layer).__name__}'s own forward"


def describe_failure(error: BaseException, module: nn.Module, phase: str) -> GradflowError:
    """Turn an exception that a model raised into one of gradflow's.

    Args:
        error: As caught, with its traceback.
        module: The model that ran, for the names of its layers.
        phase: "forward", "loss" or "backward", as the sentence says it.

    Raises:
        Exception: The same one, where gradflow's own measuring raised it: that is a bug, not the model's.
    """
    if isinstance(error, GradflowError):
        return error
    if is_out_of_memory(error):
        return ModelError(
            f"out of memory in the {phase}: try a smaller --batch-size, smaller inputs, or --device cpu",
            trace_text=user_traceback(error),
        )
    if _is_ours(error):
        raise error
    place = find_place(error, module)
    if phase == "forward":
        misfit = _call_misfit(error, place) or _misfit(error, module, place)
        if misfit is not None:
            return misfit
    at = f" in {place.words}" if place is not None and place.name else ""
    return model_error(error, f"the model's {phase}{at}")


def _is_ours(error: BaseException) -> bool:
    """Tell an exception of a statistic or a hook, which run in the middle of the model's own code."""
    *_, (innermost, _) = frames(error) if error.__traceback__ is not None else [(None, 0)]
    file = Path(innermost.f_code.co_filename) if innermost is not None else Path()
    return file.parent == Path(__file__).parent and file.name not in _CALLERS


def find_place(error: BaseException, module: nn.Module) -> Place | None:
    """Find the innermost module that was running when an exception was raised."""
    running = [
        (frame, owner)
        for frame, _ in frames(error)
        if isinstance(owner := frame.f_locals.get("self"), nn.Module)
    ]
    if not running:
        return None
    names = {id(m): name for name, m in module.named_modules(remove_duplicate=True)}
    # Inputs are tried on a copy, which is a tree of its own with the same names.
    names |= {id(m): name for name, m in running[0][1].named_modules() if id(m) not in names}
    known = [(frame, owner) for frame, owner in running if id(owner) in names]
    if not known:
        return None
    layer = known[-1][1]
    got = next((t for frame, owner in known if owner is layer for t in _given(frame)), None)
    inputs = list(_tensors_in(known[0][0]))
    return Place(name=names[id(layer)], layer=layer, got=got, from_input=_is_any_of(got, inputs))


def _given(frame: FrameType) -> Iterator[Tensor]:
    """The tensors that a module's call got: the arguments of ``_call_impl``, else named locals."""
    args = frame.f_locals.get("args")
    yield from (a for a in args if isinstance(a, Tensor)) if isinstance(args, tuple) else ()
    yield from (t for name in _TENSOR_NAMES if isinstance(t := frame.f_locals.get(name), Tensor))


def _tensors_in(frame: FrameType) -> Iterator[Tensor]:
    yield from _given(frame)
    kwargs = frame.f_locals.get("kwargs")
    yield from (v for v in kwargs.values() if isinstance(v, Tensor)) if isinstance(kwargs, dict) else ()


def _is_any_of(tensor: Tensor | None, inputs: list[Tensor]) -> bool:
    return tensor is not None and any(_same_memory(tensor, other) for other in inputs)


def _same_memory(tensor: Tensor, other: Tensor) -> bool:
    if tensor is other:
        return True
    try:
        start = tensor.untyped_storage().data_ptr()
        return start != 0 and start == other.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse and other tensors without one storage
        return False


def _call_misfit(error: BaseException, place: Place | None) -> InputError | None:
    """forward() itself refused the call: an argument is missing, or one too many."""
    text = str(error)
    if not isinstance(error, TypeError) or _CALL.search(text) is None or place is None or place.name:
        return None
    *_, (innermost, _) = frames(error)
    if is_user_file(innermost.f_code.co_filename):
        return None
    name = type(place.layer).__name__
    said = text.rpartition("()")[2].strip() or text
    missing = re.findall(r"'(\w+)'", said) if "missing" in said else []
    hint = (
        " ".join(f"--input {argument}=SHAPE" for argument in missing)
        or "--input NAME=SHAPE for each argument"
    )
    return InputError(
        f"the inputs do not fit {name}.forward: it {said}; give {hint}, or get_inputs() in the file"
    )


def _misfit(error: BaseException, module: nn.Module, place: Place | None) -> GradflowError | None:
    if place is None:
        return None
    expected = wants(place.layer)
    if _MISFIT.search(str(error)) is None or (expected is None and not place.from_input):
        return None
    if expected is None:
        # Nothing says what a layer of the user's own wants but its error.
        if not isinstance(error, (ValueError, IndexError)) or place.name:
            return None
        return _unfit(place, one_line(error))
    got = _words(place.got) if place.got is not None else "something else"
    sentence = f"got {got} and wants {expected}"
    if not place.from_input and _is_fixed_by_model(place, module):
        return ModelError(
            f"{place.words} ({type(place.layer).__name__}) {sentence}: the layers before it give that width, "
            "whatever the inputs are",
            trace_text=user_traceback(error),
        )
    return _unfit(place, sentence)


def _unfit(place: Place, sentence: str) -> InputError:
    kind = f" ({type(place.layer).__name__})" if place.name else ""
    return InputError(
        f"the inputs do not fit: {place.words}{kind} {sentence}; give others with --input or get_inputs()"
    )


def _is_fixed_by_model(place: Place, module: nn.Module) -> bool:
    """Tell whether another layer makes just the width that this one got."""
    got = place.got
    if got is None or got.dim() < 2 or not got.is_floating_point():
        return False
    convolution = type(place.layer).__name__.startswith(("Conv", "BatchNorm", "GroupNorm", "InstanceNorm"))
    width = got.shape[1] if convolution else got.shape[-1]
    return any(out_width(other) == width for other in module.modules() if other is not place.layer)


def _words(tensor: Tensor) -> str:
    shape = "×".join(map(str, tensor.shape)) or "a scalar"
    dtype = str(tensor.dtype).removeprefix("torch.")
    if (
        not tensor.is_floating_point()
        and not tensor.is_complex()
        and tensor.numel() > 0
        and not tensor.is_meta
    ):
        return f"{shape} {dtype} ({int(tensor.min())}..{int(tensor.max())})"
    return f"{shape} {dtype}"
