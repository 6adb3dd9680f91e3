"""Which object of an imported file is the model, and how it is built."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

from torch import nn

from gradflow.errors import GradflowError, TargetError
from gradflow.recording.module_loading import TargetSpec
from gradflow.recording.seeding import seed_everything
from gradflow.recording.tracebacks import model_error

FACTORIES = ("build_model", "get_model", "make_model", "create_model")
_REQUIRED_KINDS = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModel:
    """A model and what came along with it."""

    module: nn.Module
    name: str
    """The name it was built from."""
    inputs: Any = None
    """From a callable that returned ``(module, inputs)``; None where it did not."""
    loss: Callable[..., Any] | None = None


def build_model(file: ModuleType, spec: TargetSpec, seed: int) -> BuiltModel:
    """Find the model in an imported file by the contract's order and build it, seeded.

    Raises:
        TargetError: No model, several, or one that cannot be built without arguments.
        ModelError: The model's own code raised while it was built.
    """
    name = spec.name or _conventional_name(file)
    if name is None:
        return _only_model(file, spec, seed)
    return _build(_lookup(file, spec, name), name, file, spec, seed)


def required_arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    """Name the arguments that a call cannot leave out; none where there is no readable signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.default is p.empty and p.kind in _REQUIRED_KINDS)


def _conventional_name(file: ModuleType) -> str | None:
    model = getattr(file, "model", None)
    if isinstance(model, nn.Module) or (callable(model) and not isinstance(model, ModuleType)):
        return "model"
    for name in FACTORIES:
        if callable(getattr(file, name, None)):
            return name
    if _is_model_class(getattr(file, "Model", None)) and callable(getattr(file, "get_init_inputs", None)):
        return "Model"
    return None


def _lookup(file: ModuleType, spec: TargetSpec, name: str) -> Any:
    value: Any = file
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            near = difflib.get_close_matches(name, _public_names(file), 3, 0.5) or _candidates(file)
            hint = "; try " + " or ".join(f"{spec.source}:{n}" for n in near) if near else ""
            raise TargetError(f"{spec.source} has no {name!r}{hint}") from None
    return value


def _public_names(file: ModuleType) -> list[str]:
    return [name for name, value in vars(file).items() if not name.startswith("_") and callable(value)]


def _build(value: Any, name: str, file: ModuleType, spec: TargetSpec, seed: int) -> BuiltModel:
    if isinstance(value, nn.Module):
        return BuiltModel(module=value, name=name)
    if not callable(value):
        raise TargetError(
            f"{spec.source}:{name} is a {type(value).__name__}: a target is an nn.Module, a subclass of it, "
            "or a function that returns one"
        )
    made = _call(value, name, file, spec, seed)
    if _is_model_class(made) and not isinstance(value, type):
        made = _call(made, name, file, spec, seed)
    return _unpack(made, name, spec)


def _call(value: Callable[..., Any], name: str, file: ModuleType, spec: TargetSpec, seed: int) -> Any:
    args, kwargs = _arguments(value, name, file, spec)
    seed_everything(seed)
    try:
        return value(*args, **kwargs)
    except (Exception, SystemExit) as error:
        raise model_error(error, f"building {spec.source}:{name}") from error


def _arguments(
    value: Callable[..., Any], name: str, file: ModuleType, spec: TargetSpec
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what to call it with: ``get_init_inputs()`` for a class, else nothing."""
    needed = required_arguments(value)
    init_inputs = getattr(file, "get_init_inputs", None)
    if isinstance(value, type) and callable(init_inputs) and (name == "Model" or needed):
        return _init_inputs(init_inputs, spec)
    if not needed:
        return (), {}
    raise TargetError(_needs_arguments(value, name, needed, spec))


def _init_inputs(function: Callable[[], Any], spec: TargetSpec) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Read ``get_init_inputs()``: a list of arguments, a dict of them, or ``[args, kwargs]``."""
    try:
        given = function()
    except Exception as error:
        raise model_error(error, f"get_init_inputs() of {spec.source}") from error
    if isinstance(given, dict):
        return (), given
    if not isinstance(given, (list, tuple)):
        return (given,), {}
    if len(given) == 2 and isinstance(given[0], (list, tuple)) and isinstance(given[1], dict):
        return tuple(given[0]), given[1]
    return tuple(given), {}


def _needs_arguments(value: Any, name: str, needed: tuple[str, ...], spec: TargetSpec) -> str:
    listed = ", ".join(needed)
    if isinstance(value, type):
        return (
            f"{spec.source}:{name} needs arguments to be built ({listed}): add a build_model() that returns "
            "the model, or a get_init_inputs() that returns the arguments, to the file"
        )
    return (
        f"{spec.source}:{name} needs arguments ({listed}): gradflow calls it with none, "
        "so give them defaults or name a function that takes none"
    )


def _unpack(made: Any, name: str, spec: TargetSpec) -> BuiltModel:
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        kind = type(made).__name__ if not isinstance(made, tuple) else _tuple_words(made)
        raise TargetError(
            f"{spec.source}:{name} returned a {kind}: it must return an nn.Module, (module, inputs) "
            "or (module, inputs, loss)"
        )
    loss = parts[2] if len(parts) == 3 else None
    if loss is not None and not callable(loss):
        raise TargetError(
            f"{spec.source}:{name} returned a {type(loss).__name__} as its loss: it must be a function "
            "loss(outputs, inputs) that returns a scalar tensor"
        )
    return BuiltModel(module=parts[0], name=name, inputs=parts[1] if len(parts) > 1 else None, loss=loss)


def _tuple_words(made: tuple[Any, ...]) -> str:
    return "tuple of (" + ", ".join(type(part).__name__ for part in made[:4]) + ")"


def _is_model_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _own_classes(file: ModuleType) -> dict[str, type[nn.Module]]:
    """Model classes that the file defines (not imports) and that can run: they have a forward."""
    return {
        name: value
        for name, value in vars(file).items()
        if _is_model_class(value) and value.__module__ == file.__name__ and _can_run(value)
    }


def _can_run(model_class: type[nn.Module]) -> bool:
    return model_class.forward is not nn.Module.forward and not inspect.isabstract(model_class)


def _instances(file: ModuleType) -> dict[str, nn.Module]:
    return {name: value for name, value in vars(file).items() if isinstance(value, nn.Module)}


def _candidates(file: ModuleType) -> list[str]:
    return [*_own_classes(file), *_instances(file)]


def _only_model(file: ModuleType, spec: TargetSpec, seed: int) -> BuiltModel:
    """Find the one class that builds with no arguments and is no part of another; else the one instance."""
    classes = _own_classes(file)
    parts = {part for name, cls in classes.items() for part in _names_in_constructor(cls) - {name}}
    buildable = {
        name: cls for name, cls in classes.items() if name not in parts and not required_arguments(cls)
    }
    if len(buildable) == 1:
        ((name, only),) = buildable.items()
        return _build(only, name, file, spec, seed)
    built = _build_each(buildable, file, spec, seed)
    whole = _with_parameters(_not_parts(built))
    if len(whole) == 1:
        return next(iter(whole.values()))
    instances = _instances(file)
    if not whole and len(instances) == 1:
        ((name, module),) = instances.items()
        return BuiltModel(module=module, name=name)
    raise TargetError(_ambiguous(spec, list(whole) or list(instances), classes))


def _build_each(
    classes: dict[str, type[nn.Module]], file: ModuleType, spec: TargetSpec, seed: int
) -> dict[str, BuiltModel]:
    """Build every class that can be; one that raises is left out unless none remains."""
    built, failures = {}, []
    for name, model_class in classes.items():
        try:
            built[name] = _build(model_class, name, file, spec, seed)
        except GradflowError as error:
            failures.append(error)
    if failures and not built:
        raise failures[0]
    return built


def _names_in_constructor(model_class: type[nn.Module]) -> set[str]:
    """Globals that a constructor mentions: the classes of its parts, also where it cannot be called."""
    names: set[str] = set()
    codes = [getattr(model_class.__init__, "__code__", None)]
    while codes:
        code = codes.pop()
        if isinstance(code, CodeType):
            names.update(code.co_names)
            codes.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
    return names


def _not_parts(built: dict[str, BuiltModel]) -> dict[str, BuiltModel]:
    parts = {
        type(child)
        for model in built.values()
        for child in model.module.modules()
        if child is not model.module
    }
    return {name: model for name, model in built.items() if type(model.module) not in parts}


def _with_parameters(built: dict[str, BuiltModel]) -> dict[str, BuiltModel]:
    """A loss or an activation written as a module is no model beside one that has something to train."""
    trained = {name: m for name, m in built.items() if next(m.module.parameters(), None) is not None}
    return trained or built


def _ambiguous(spec: TargetSpec, names: list[str], classes: dict[str, type[nn.Module]]) -> str:
    if names:
        commands = "\n".join(f"  gradflow inspect {spec.source}:{name}" for name in names)
        return f"{spec.source} holds {len(names)} models; name the one you mean:\n{commands}"
    if not classes:
        return (
            f"{spec.source} holds no model: define a subclass of nn.Module, a variable `model`, "
            "or a function build_model() that returns one"
        )
    needs = {name: ", ".join(required_arguments(cls)) or "no arguments" for name, cls in classes.items()}
    listed = "\n".join(f"  gradflow inspect {spec.source}:{n}   needs {words}" for n, words in needs.items())
    return (
        f"{spec.source} holds no model that can be built without arguments; add a build_model() that returns "
        f"one, or a get_init_inputs() that returns the arguments of:\n{listed}"
    )
