"""What a target's code does to the whole process is undone, so that the next target finds none of it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType

import torch

from gradflow.recording.tracebacks import is_user_file

_PACKAGES = ("site-packages", "dist-packages")


@contextlib.contextmanager
def process_state_kept() -> Iterator[None]:
    """Forget the user's modules that the block imports, and put torch's global settings back.

    Without it a target would depend on those before it: a package that two targets share would be imported, and
    its model built, with the seed of the first only. Installed packages stay: they are slow to import, and not
    made to be imported twice.
    """
    loaded = set(sys.modules)
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        for name in sys.modules.keys() - loaded:
            if _is_users(sys.modules[name]):
                del sys.modules[name]
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)


def _is_users(module: ModuleType | None) -> bool:
    """A module from a file, or a folder without ``__init__.py``, that is nobody's installed package."""
    file = getattr(module, "__file__", None)
    places = [file] if file else list(getattr(module, "__path__", None) or ())
    return bool(places) and all(
        is_user_file(place) and not any(f"/{part}/" in place.replace("\\", "/") for part in _PACKAGES)
        for place in places
    )
