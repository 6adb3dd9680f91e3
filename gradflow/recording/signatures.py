"""What a model's forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradflow.recording.trial import unwrapped

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardSignature:
    """The arguments of a forward, by how they can be passed."""

    positional: tuple[str, ...]
    """In order; ("input",) for a forward that only says ``*args``."""
    keyword_only: tuple[str, ...]
    required: frozenset[str]
    any_positional: bool
    any_keyword: bool
    annotations: Mapping[str, str]
    """As written in the source: "int", "Tensor | None"."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every named argument, in order."""
        return self.positional + self.keyword_only

    def accepts(self, name: str) -> bool:
        """Tell whether a keyword of this name can be passed."""
        return self.any_keyword or name in self.names


def positional_count(function: Callable[..., Any]) -> int | None:
    """Count the positional arguments a function can take; None for any number, or where it does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in _POSITIONAL for p in parameters)


def forward_signature(module: nn.Module, method: str = "forward") -> ForwardSignature:
    """Read the signature of a module's forward, through compile and data-parallel wrappers."""
    try:
        parameters = list(inspect.signature(getattr(unwrapped(module), method)).parameters.values())
    except (TypeError, ValueError):  # a scripted or C-level forward has none to read
        parameters = []
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    keyword_only = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    any_positional = any(p.kind is p.VAR_POSITIONAL for p in parameters) or not parameters
    names = tuple(p.name for p in positional)
    if not names and not keyword_only and any_positional:
        names = ("input",)
    required = {p.name for p in (*positional, *keyword_only) if p.default is p.empty}
    return ForwardSignature(
        positional=names,
        keyword_only=tuple(p.name for p in keyword_only),
        required=frozenset(required or set(names[:1])) if not keyword_only else frozenset(required),
        any_positional=any_positional,
        any_keyword=any(p.kind is p.VAR_KEYWORD for p in parameters),
        annotations={p.name: _words(p.annotation) for p in (*positional, *keyword_only)},
    )


def _words(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
