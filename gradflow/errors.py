"""One family of errors; each class carries the exit code of the command that meets it.

A message says what went wrong, where, and what to try, in that order. Anything raised that is not in this
family is a bug in gradflow (exit 4).
"""

from __future__ import annotations

from typing import ClassVar


class GradflowError(Exception):
    """Base of everything gradflow raises on purpose."""

    exit_code: ClassVar[int] = 4


class UsageError(GradflowError):
    """The command line, the target or the inputs could not be understood."""

    exit_code: ClassVar[int] = 2


class TargetError(UsageError):
    """The target does not name a model: no file, no model in it, or several."""


class InputError(UsageError):
    """The inputs are missing, cannot be inferred, or do not fit the model."""


class CheckpointError(UsageError):
    """A checkpoint cannot be read or does not belong to the model."""


class LossError(UsageError):
    """The loss is not a scalar tensor that a gradient can start from."""


class TraceFileError(UsageError):
    """A saved trace cannot be read, or cannot be written where it was asked to go."""


class ModelError(GradflowError):
    """The user's own code raised; the traceback shown is theirs.

    Attributes:
        trace_text: The user's traceback trimmed to the user's frames, ready to print; empty when there is none.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, trace_text: str = "") -> None:
        super().__init__(message)
        self.trace_text = trace_text
