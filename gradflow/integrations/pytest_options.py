"""What a ``gradflow_check`` is judged by: defaults, then the markers of the test, then the call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any

import pytest

from gradflow.errors import UsageError
from gradflow.findings import Severity


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """The options of one check."""

    select: tuple[str, ...] = ("GF",)
    """Rule codes or prefixes that may speak."""
    ignore: tuple[str, ...] = ()
    """Rule codes or prefixes that may not; they win over ``select``."""
    fail_on: Severity = Severity.ERROR
    """A finding at or above this fails the test."""
    seed: int = 0
    steps: int = 1
    trained: bool = False
    """The parameters come from training, so rules about initialisation step back."""


def merged(markers: Iterable[pytest.Mark], call: Mapping[str, Any]) -> CheckOptions:
    """The options in force; what is said later wins.

    Args:
        markers: Those of the test, the farthest first.
        call: Keyword arguments of the call.

    Raises:
        UsageError: An option does not exist, or its value is of the wrong kind.
    """
    said: dict[str, Any] = asdict(CheckOptions())
    for marker in markers:
        if marker.args:
            raise UsageError(f"the gradflow marker takes keywords only, not {marker.args[0]!r}; try select=…")
        said |= _read(marker.kwargs, "the gradflow marker")
    return CheckOptions(**said | _read(call, "gradflow_check"))


def _read(options: Mapping[str, Any], whose: str) -> dict[str, Any]:
    known = [field.name for field in fields(CheckOptions)]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"{whose} has no option {name!r}; {meant}It takes {', '.join(known)}")
    return {name: _value(name, value, whose) for name, value in options.items()}


def _value(name: str, value: Any, whose: str) -> Any:
    if name in ("select", "ignore"):
        return _codes(name, value, whose)
    if name == "fail_on":
        return _severity(value, whose)
    kind = bool if name == "trained" else int
    if type(value) is not kind:
        raise UsageError(f"{whose}: {name}={value!r} is no {kind.__name__}")
    return value


def _codes(name: str, value: Any, whose: str) -> tuple[str, ...]:
    """ "GF1,GF201" or a list of such -> codes."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple | set | frozenset) or not all(isinstance(t, str) for t in texts):
        raise UsageError(f"{whose}: {name}={value!r} is no rule code and no list of them; try {name}='GF1'")
    return tuple(code.strip() for text in texts for code in text.split(",") if code.strip())


def _severity(value: Any, whose: str) -> Severity:
    try:
        return Severity(value)
    except ValueError:
        raise UsageError(f"{whose}: fail_on={value!r} is none of {', '.join(Severity)}") from None
