"""Every setting of ``[tool.gradflow]``: its name, what it takes, its default, and how three layers become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeAlias

from gradflow.findings import Severity

Value: TypeAlias = Any
"""What a reader returns: text, a number, a flag, a tuple of texts, or a tuple of pairs; None for "not set"."""

DEFAULT, FILE, COMMAND_LINE = "default", "pyproject.toml", "command line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One setting."""

    name: str
    """As it is written in the file; the option of the command line is ``--name``."""
    takes: str
    """What to write, for the error message: "a whole number of 1 or more"."""
    read: Callable[[object], Value]
    """The value as the program wants it; raises ValueError for anything else."""
    default: Value = None
    project: bool = True
    """It may stand in ``[tool.gradflow]``, for every target."""
    target: bool = True
    """It may stand in ``[tool.gradflow.targets.NAME]``, for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Settings that come from one place."""

    origin: str
    values: Mapping[str, Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting in force, and where it came from."""

    key: str
    value: Value
    origin: str
    """"default", "pyproject.toml" or "command line"."""


def merged(keys: Sequence[Key], layers: Sequence[Layer]) -> tuple[Setting, ...]:
    """For every key the value of the last layer that has one; nothing is joined, the nearest replaces."""
    found = {key.name: Setting(key=key.name, value=key.default, origin=DEFAULT) for key in keys}
    for layer in layers:
        for name, value in layer.values.items():
            if name in found:
                found[name] = Setting(key=name, value=value, origin=layer.origin)
    return tuple(found.values())


def near_miss(wanted: str, names: Sequence[str]) -> str:
    """ "; did you mean 'seed'?", or the whole list where nothing is near."""
    lowered = {name.lower(): name for name in names}
    near = get_close_matches(wanted.lower().replace("_", "-"), list(lowered), n=1)
    if near:
        return f"; did you mean {lowered[near[0]]!r}?"
    return f"; there is {', '.join(names)}" if names else ""


def codes_in(text: str) -> tuple[str, ...]:
    """ "GF1, GF3" -> ("GF1", "GF3")."""
    return tuple(code.strip() for code in text.split(",") if code.strip())


def percentage(text: object) -> float:
    """ "10%" -> 0.1. Raises ValueError for anything but a percentage above zero."""
    number = str(text).strip()
    share = float(number.removesuffix("%")) / 100
    if not number.endswith("%") or not 0 < share < float("inf"):
        raise ValueError(number)
    return share


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(value)
    return value


def _texts(value: object) -> tuple[str, ...]:
    return tuple(_text(item) for item in value) if isinstance(value, list | tuple) else (_text(value),)


def _codes(value: object) -> tuple[str, ...]:
    return tuple(code for text in _texts(value) for code in codes_in(text))


def _whole(least: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        if type(value) is not int or not least <= value < 2**32:
            raise ValueError(value)
        return value

    return read


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


def _one_of(*choices: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if value not in choices:
            raise ValueError(value)
        return str(value)

    return read


def _limits(value: object) -> tuple[tuple[str, float], ...]:
    from gradflow.metric_gates import METRICS

    if not isinstance(value, Mapping) or not all(name in METRICS for name in value):
        raise ValueError(value)
    return tuple((name, percentage(text)) for name, text in value.items())


def moved_thresholds(value: object) -> tuple[tuple[str, float], ...]:
    """{"GF101.gain.error": 1e-6}, nested or not, as pairs; raises ValueError for anything but numbers by name."""
    if not isinstance(value, Mapping):
        raise ValueError(value)
    pairs: list[tuple[str, float]] = []
    for name, given in value.items():
        if isinstance(given, Mapping):
            pairs += [(f"{name}.{rest}", limit) for rest, limit in moved_thresholds(given)]
        elif isinstance(given, int | float) and not isinstance(given, bool) and given == given:
            pairs.append((str(name), float(given)))
        else:
            raise ValueError(value)
    return tuple(pairs)


KEYS: tuple[Key, ...] = (
    Key(
        name="target",
        takes='"model.py", "model.py:NAME" or "package.module:NAME"',
        read=_text,
        project=False,
    ),
    Key(name="inputs", takes='a list of inputs like ["8x3x32x32"]', read=_texts, default=(), project=False),
    Key(name="loss", takes='"cross-entropy", "mse", "sum" or "probe"', read=_text),
    Key(name="checkpoint", takes="the path of a file of weights", read=_text, project=False),
    Key(name="trained", takes="true or false", read=_flag, default=False),
    Key(name="shattered", takes="true or false", read=_flag, default=False),
    Key(name="batch-size", takes="a whole number of 1 or more", read=_whole(1)),
    Key(name="device", takes='"cpu", "cuda", "cuda:1" or "mps"', read=_text),
    Key(name="dtype", takes='"float32", "float64", "bfloat16" or "float16"', read=_text),
    Key(name="mode", takes='"train" or "eval"', read=_one_of("train", "eval")),
    Key(name="seed", takes="a whole number of 0 or more", read=_whole(0), default=0),
    Key(name="steps", takes="a whole number of 1 or more", read=_whole(1), default=1),
    Key(name="seeds", takes="a whole number of 1 or more", read=_whole(1)),
    Key(name="select", takes='a list of rule codes like ["GF1", "GF303"]', read=_codes, default=("GF",)),
    Key(name="ignore", takes='a list of rule codes like ["GF106"]', read=_codes, default=()),
    Key(
        name="fail-on",
        takes='"error", "warning" or "info"',
        read=_one_of(*(severity.value for severity in Severity)),
        default="error",
    ),
    Key(
        name="thresholds",
        takes='a table of limits like { "GF101.gain.error" = 1e-6 }',
        read=moved_thresholds,
        default=(),
    ),
    Key(name="reference", takes="the path of a saved trace.json", read=_text, project=False),
    Key(name="max-regression", takes='a table of limits like { J = "10%" }', read=_limits, default=()),
    Key(name="baseline", takes="the path of a baseline file", read=_text, target=False),
    Key(name="strict-ignores", takes="true or false", read=_flag, default=False, target=False),
)
