"""What is fixed about a model before it runs: its modules and parameters, by their fully qualified names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from gradflow.recording.activations import UnitPool
from gradflow.recording.sample_buffers import BufferPool

COMPILED_CHILD = "_orig_mod"
"""Where ``torch.compile`` keeps the module it wraps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedParameter:
    """A parameter with every name it goes by."""

    parameter: nn.Parameter
    names: tuple[str, ...]
    owner: str
    owner_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayout:
    """A model as it is laid out; one serves every step of it."""

    module: nn.Module
    names: Mapping[nn.Module, str]
    """Every module once, under its first fully qualified name; compiled wrappers are looked through."""
    row_modules: frozenset[nn.Module]
    """Those that get rows: the root, modules without children, and those that own parameters."""
    stacked_modules: frozenset[nn.Module]
    """Those whose forward may run other modules, or code of the user's."""
    parameters: tuple[NamedParameter, ...]
    """Each parameter once, in definition order; tied and shared ones carry their other names."""
    buffers: BufferPool = field(default_factory=BufferPool, compare=False, repr=False)
    """Memory that the steps share."""
    unit_buffers: UnitPool = field(default_factory=UnitPool, compare=False, repr=False)
    """The same, for the units of nonlinearities."""


def layout_of(module: nn.Module) -> ModelLayout:
    """Lay a model out."""
    names = {
        child: clean_name(path)
        for path, child in module.named_modules()
        if COMPILED_CHILD not in child._modules
    }
    return ModelLayout(
        module=module,
        names=names,
        row_modules=frozenset(child for child in names if _has_rows(child, module)),
        stacked_modules=frozenset(child for child in names if not _runs_no_children(child)),
        parameters=_named_parameters(module),
    )


def clean_name(path: str) -> str:
    """A fully qualified name without the steps that ``torch.compile`` adds."""
    if COMPILED_CHILD not in path:
        return path
    return ".".join(part for part in path.split(".") if part != COMPILED_CHILD)


def _runs_no_children(module: nn.Module) -> bool:
    """True for a leaf of torch.nn itself, whose forward is known to run one op and no user code."""
    return not module._modules and type(module).__module__.startswith("torch.nn.modules.")


def _has_rows(module: nn.Module, root: nn.Module) -> bool:
    if module is root:
        return True
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    return not module._modules or any(p is not None for p in module._parameters.values())


def _named_parameters(module: nn.Module) -> tuple[NamedParameter, ...]:
    found: dict[int, list[tuple[str, str, nn.Module, nn.Parameter]]] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        name = clean_name(path)
        for own, parameter in child._parameters.items():
            if parameter is not None:
                full = f"{name}.{own}" if name else own
                found.setdefault(id(parameter), []).append((full, name, child, parameter))
    return tuple(
        NamedParameter(
            parameter=uses[0][3],
            names=tuple(dict.fromkeys(use[0] for use in uses)),
            owner=uses[0][1],
            owner_type=type(uses[0][2]).__name__,
        )
        for uses in found.values()
    )
