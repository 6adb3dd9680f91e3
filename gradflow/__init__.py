"""Gradient-flow diagnostics for PyTorch."""

from gradflow._version import __version__

__all__ = ["__version__"]
