"""The user's part of a traceback: what is left without gradflow, torch and the import machinery."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

import gradflow
from gradflow.errors import ModelError

_HIDDEN_FOLDERS = (
    str(Path(gradflow.__file__).parent),
    str(Path(torch.__file__).parent),
    "<frozen ",
    "<string>",
)
_HIDDEN_PARTS = ("/site-packages/lightning/", "/site-packages/pytorch_lightning/")
_STANDARD_LIBRARY = tuple(sysconfig.get_path(key) for key in ("stdlib", "platstdlib"))
_PACKAGES = ("site-packages", "dist-packages")
INFERRED = "the inputs were inferred ("
"""How gradflow's own note on an exception starts; notes of the user's are their traceback's."""
_OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|CUBLAS_STATUS_ALLOC", re.I
)


def is_user_file(filename: str) -> bool:
    """Tell whether a frame of this file is worth showing: not gradflow's, torch's or Python's own."""
    hidden = filename.startswith(_HIDDEN_FOLDERS) or _is_standard_library(filename)
    return not hidden and not any(part in filename for part in _HIDDEN_PARTS)


def _is_standard_library(filename: str) -> bool:
    """Packages lie inside the standard library's folder, in one of their own."""
    return filename.startswith(_STANDARD_LIBRARY) and not any(part in filename for part in _PACKAGES)


def user_traceback(error: BaseException) -> str:
    """Format an exception, with its causes, as Python prints it but with the user's frames and notes only."""
    shown = traceback.TracebackException.from_exception(error)
    if shown.__notes__:
        shown.__notes__ = [note for note in shown.__notes__ if not note.startswith(INFERRED)]
    _keep_user_frames(shown)
    return "".join(shown.format())


def _keep_user_frames(shown: traceback.TracebackException | None) -> None:
    while shown is not None:
        shown.stack = traceback.StackSummary.from_list(
            [frame for frame in shown.stack if is_user_file(frame.filename)]
        )
        _keep_user_frames(shown.__cause__)
        shown = shown.__context__


def frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """Walk an exception's frames with the line each was at, the outermost first."""
    yield from traceback.walk_tb(error.__traceback__)


def where(error: BaseException) -> str:
    """Return the innermost line of the user's, as "model.py:31"; "" where none is on the way."""
    places = [
        (frame.f_code.co_filename, line)
        for frame, line in frames(error)
        if is_user_file(frame.f_code.co_filename)
    ]
    return f"{Path(places[-1][0]).name}:{places[-1][1]}" if places else ""


def one_line(error: BaseException) -> str:
    """Return "ValueError: the message", its first line only and no longer than a terminal's few rows."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an exception that says memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def doubts(error: BaseException) -> str:
    """What gradflow noted on an exception, to go after its sentence; "" for nothing."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()) if note.startswith(INFERRED))


def model_error(error: BaseException, doing: str) -> ModelError:
    """Say that the user's own code raised while it was ``doing`` something ("importing model.py")."""
    place = where(error)
    at = f" at {place}" if place else ""
    if is_out_of_memory(error):
        return ModelError(
            f"{doing} ran out of memory{at}: try a smaller model, a smaller --batch-size, or --device cpu",
            trace_text=user_traceback(error),
        )
    return ModelError(
        f"{doing} raised{at}: {one_line(error)}{doubts(error)}", trace_text=user_traceback(error)
    )
