"""Import torch once, for a process that ends soon after."""

from __future__ import annotations

import gc


def import_torch() -> None:
    """Import torch with the garbage collector waiting, and leave what it made out of later collections.

    An import makes hundreds of thousands of objects that live as long as the process; walking them again and
    again takes a third of the time of a small inspection. Only the command line does this: a process of the
    user's own keeps its collector as it is.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
