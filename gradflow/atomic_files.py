"""Files that appear whole or not at all: written beside their place, then moved into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from gradflow.errors import TraceFileError


def write_text(path: str | Path, text: str | bytes) -> None:
    """Write UTF-8 text, or bytes as they are, to ``path`` in one step.

    A device or a pipe (``/dev/null``, ``/dev/stdout``) is written to as it is; a symbolic link is followed.

    Raises:
        TraceFileError: The folder is missing, or the file cannot be written.
    """
    place = Path(path).resolve()
    if place.exists() and not place.is_file() and not place.is_dir():
        try:
            place.write_bytes(_encoded(text))
        except OSError as error:
            raise _cannot_write(path, error) from error
        return
    check_place(path)
    _replace_all({place: text})


def write_folder(directory: str | Path, files: Mapping[str, str | bytes]) -> None:
    """Write several files into a folder, made if it is missing; none moves in before all are written.

    Args:
        directory: The folder.
        files: Text, or bytes, by file name.

    Raises:
        TraceFileError: The folder cannot be made or written to.
    """
    folder = Path(directory).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(directory, error) from error
    _replace_all({folder / name: text for name, text in files.items()})


def check_place(path: str | Path) -> None:
    """Raise where :func:`write_text` could not succeed; cheap, so that it can run before a long recording.

    Raises:
        TraceFileError: The folder is missing, is no folder, or ``path`` is a folder.
    """
    place = Path(path).resolve()
    if place.is_dir():
        raise TraceFileError(f"cannot write {path}: it is a folder; give a file name in it")
    if not place.parent.is_dir():
        raise TraceFileError(f"cannot write {path}: there is no folder {place.parent}; make it first")


def check_folder(directory: str | Path) -> None:
    """Raise where :func:`write_folder` could not succeed, as far as can be told without making the folder.

    Raises:
        TraceFileError: ``directory``, or what would hold it, is a file.
    """
    folder = Path(directory).resolve()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        raise TraceFileError(f"cannot write to {directory}: {nearest} is a file; name a folder")


def _replace_all(files: Mapping[Path, str | bytes]) -> None:
    for place in files:
        if place.is_dir():
            raise TraceFileError(f"cannot write {place}: it is a folder; choose another place")
    staged: dict[Path, Path] = {}
    try:
        for place, text in files.items():
            staged[place] = place.with_name(f".{place.name}.{os.getpid()}.tmp")
            staged[place].write_bytes(_encoded(text))
            if place.exists():
                shutil.copymode(place, staged[place])
        for place, temporary in staged.items():
            temporary.replace(place)
    except OSError as error:
        raise _cannot_write(place, error) from error
    finally:
        for temporary in staged.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _encoded(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "backslashreplace")


def _cannot_write(path: str | Path, error: OSError) -> TraceFileError:
    return TraceFileError(f"cannot write {path}: {error.strerror}; choose another place")
