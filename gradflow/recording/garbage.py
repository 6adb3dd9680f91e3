"""Keeping Python's garbage collector out of the way."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Collect no garbage inside.

    A step makes thousands of small objects, most of which die with it: looking through them, or through a heap
    that holds torch and the user's libraries, would cost more than the step.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def collect_young() -> None:
    """Collect what has been made since collection was paused, between runs of a model.

    A run can leave cycles that hold its tensors, and a pause around several would keep them all.
    """
    gc.collect(0)
