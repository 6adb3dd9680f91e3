"""Gradient-flow diagnostics for PyTorch: where the gradient goes, which layers lose it, what to change.

Names that need torch are resolved on first use, so that ``import gradflow`` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradflow._version import __version__
from gradflow.errors import GradflowError
from gradflow.findings import Finding, Location, Severity

if TYPE_CHECKING:
    from gradflow.inspection import inspect
    from gradflow.report import Report

__all__ = ["Finding", "GradflowError", "Location", "Report", "Severity", "__version__", "inspect"]

_HOMES = {"inspect": "gradflow.inspection", "Report": "gradflow.report"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradflow' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
