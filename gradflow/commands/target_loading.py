"""From the options about the target to a target that can be run; shared by the commands that run one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from gradflow.commands.torch_import import import_torch

if TYPE_CHECKING:
    from gradflow.recording.target import Target, TargetOptions

_AS_GIVEN = ("loss", "batch_size", "device", "dtype", "seed")
_MODES = {True: "train", False: "eval", None: None}


def loaded(parameters: Mapping[str, Any], show: Callable[[str], None]) -> tuple[Target, TargetOptions]:
    """Import torch, then the target, and build its model.

    Args:
        parameters: The command's, by the names of its arguments.
        show: Told in a few words what is going on.

    Raises:
        UsageError: The target, its inputs, its checkpoint or an option is not understood.
        ModelError: The file's own code raised.
    """
    show("importing torch")
    import_torch()
    from gradflow.recording.target import TargetOptions, load_target

    checkpoint = parameters["checkpoint"]
    wanted = TargetOptions(
        inputs=tuple(parameters["inputs"] or ()),
        checkpoint=None if checkpoint is None else str(checkpoint),
        mode=_MODES[parameters["train"]],
        **{name: parameters[name] for name in _AS_GIVEN},
    )
    show(f"building {parameters['target']}")
    return load_target(parameters["target"], wanted), wanted
