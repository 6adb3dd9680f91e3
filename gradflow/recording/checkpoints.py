"""``--checkpoint FILE``: trained weights into a model, or a list of what does not fit."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.errors import CheckpointError

_NESTED_UNDER = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_MOST_LISTED = 5


def load_checkpoint(module: nn.Module, path: str) -> None:
    """Load a safetensors file, or a torch file with ``weights_only``, into a model, strictly.

    The state dict may lie under "state_dict", "model_state_dict" or "model", and its keys may start with
    "module." or "_orig_mod." (data-parallel and compiled models).

    Raises:
        CheckpointError: The file cannot be read, or its keys or shapes are not the model's.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"--checkpoint {path}: no such file")
    own = {_clean(key): key for key in module.state_dict()}
    given = {_clean(key): value for key, value in _state_dict(_read(file), path).items()}
    _compare(module, own, given, path)
    try:
        module.load_state_dict({own[key]: value for key, value in given.items()})
    except RuntimeError as error:
        raise CheckpointError(f"--checkpoint {path} does not fit the model: {error}") from error


def _clean(key: str) -> str:
    """Drop wrappers' prefixes wherever they stand: a compiled child has one in the middle."""
    while key.startswith(_PREFIXES):
        key = key.partition(".")[2]
    return key.replace("._orig_mod.", ".")


def _read(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken pickle raises depends on its bytes
        if isinstance(error, pickle.UnpicklingError) and "nsupported global" in str(error):
            raise CheckpointError(
                f"--checkpoint {file} holds more than tensors, and running its code is not safe: save "
                "model.state_dict() alone"
            ) from error
        raise CheckpointError(
            f"--checkpoint {file} is not a torch file, or is damaged: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """Pick the line of torch's message that says what is wrong, out of its advice on ``weights_only``."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("Unsupported")] or lines
    if not said or isinstance(error, LookupError):  # its message is a key, which says nothing by itself
        return "its bytes cannot be read"
    return said[0]


def _read_safetensors(file: Path) -> Any:
    try:
        safetensors = importlib.import_module("safetensors.torch")
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"--checkpoint {file} needs the safetensors package: pip install 'torch-gradflow[safetensors]'"
        ) from error
    try:
        return safetensors.load_file(str(file))
    except Exception as error:  # SafetensorError derives from Exception directly
        raise CheckpointError(f"--checkpoint {file} is not a safetensors file: {error}") from error


def _state_dict(loaded: Any, path: str) -> Mapping[str, Any]:
    for key in _NESTED_UNDER:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not any(isinstance(value, Tensor) for value in loaded.values()):
        kind = f"a dict of {', '.join(map(str, list(loaded)[:4]))}" if isinstance(loaded, Mapping) else "none"
        raise CheckpointError(f"--checkpoint {path} holds no state dict ({kind}): save model.state_dict()")
    return {str(key): value for key, value in loaded.items()}


def _compare(module: nn.Module, own: dict[str, str], given: dict[str, Any], path: str) -> None:
    state = module.state_dict()
    # A tied weight may be stored under one of its names only.
    tied = _names_of_tied(state, own, given)
    missing = [key for key in own if key not in given and key not in tied]
    unexpected = [key for key in given if key not in own]
    shapes = [
        f"{key} is {_shape(given[key])}, the model's {_shape(state[name])}"
        for key, name in own.items()
        if key in given and _shape(given[key]) != _shape(state[name])
    ]
    problems = [
        _listed("missing", missing),
        _listed("unexpected", unexpected),
        _listed("of another shape", shapes),
    ]
    if any(problems):
        raise CheckpointError(
            f"--checkpoint {path} does not fit the model: " + "; ".join(filter(None, problems))
        )
    given.update({key: given[other] for key, other in tied.items()})


def _names_of_tied(state: Mapping[str, Any], own: dict[str, str], given: dict[str, Any]) -> dict[str, str]:
    stored = {
        state[name].data_ptr(): key
        for key, name in own.items()
        if key in given and isinstance(state[name], Tensor) and state[name].numel()
    }
    return {
        key: stored[state[name].data_ptr()]
        for key, name in own.items()
        if key not in given and isinstance(state[name], Tensor) and state[name].data_ptr() in stored
    }


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor) or isinstance(
        value, (nn.UninitializedParameter, nn.UninitializedBuffer)
    ):
        return "not a tensor"
    return "×".join(map(str, value.shape)) or "a scalar"


def _listed(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - _MOST_LISTED} more" if len(keys) > _MOST_LISTED else ""
    return f"{len(keys)} {what} ({', '.join(keys[:_MOST_LISTED])}{more})"
