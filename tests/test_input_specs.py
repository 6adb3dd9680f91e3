"""The --input grammar: what it reads, what it draws, what it refuses."""

from __future__ import annotations

import pytest
import torch

from gradflow.errors import InputError, UsageError
from gradflow.recording.input_specs import GRAMMAR, InputSpec, parse_float_dtype, parse_input, parse_inputs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8x3x32x32", InputSpec(name=None, shape=(8, 3, 32, 32))),
        ("8", InputSpec(name=None, shape=(8,))),
        ("8×3", InputSpec(name=None, shape=(8, 3))),
        ("scalar", InputSpec(name=None, shape=())),
        ("t=scalar:int64:0..9", InputSpec(name="t", shape=(), dtype=torch.int64, low=0, high=9)),
        (
            "ids=4x128:int64:0..999",
            InputSpec(name="ids", shape=(4, 128), dtype=torch.int64, low=0, high=999),
        ),
        ("ids=4x128:0..999", InputSpec(name="ids", shape=(4, 128), dtype=torch.int64, low=0, high=999)),
        ("x=2x2:float32:-1..1", InputSpec(name="x", shape=(2, 2), dtype=torch.float32, low=-1, high=1)),
        ("x=2x2:-0.5..1e1", InputSpec(name="x", shape=(2, 2), low=-0.5, high=10)),
        ("mask=4x128:bool", InputSpec(name="mask", shape=(4, 128), dtype=torch.bool)),
        ("x=0x3:torch.bf16", InputSpec(name="x", shape=(0, 3), dtype=torch.bfloat16)),
    ],
)
def test_read(text: str, expected: InputSpec) -> None:
    assert parse_input(text) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a shape"),
        ("8,3,32", "not a shape"),
        ("8x-1", "not a shape"),
        ("8xx3", "not a shape"),
        ("8x3:int6", "'int6' is not a dtype"),
        ("8x3:int64:9", "too many parts"),
        ("8x3:int64:..9", "not a range"),
        ("8x3:int64:a..b", "not a range"),
        ("8x3:int64:9..0", "ends before it begins"),
        ("my ids=4x4", "'my ids' is not the name"),
        ("a=b=4", "not the name"),
    ],
)
def test_refused_with_the_grammar(text: str, why: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_input(text)
    assert why in str(caught.value)
    assert GRAMMAR in str(caught.value)


def test_a_name_comes_once() -> None:
    with pytest.raises(InputError, match="given twice"):
        parse_inputs(("x=2", "x=3"))


@pytest.mark.parametrize("name", ["float32", "bf16", "half", "double"])
def test_floats_follow_the_dtype(name: str) -> None:
    dtype = parse_float_dtype(name)
    assert parse_input("4x4").draw(torch.Generator(), dtype).dtype == dtype
    assert parse_input("4x4:float32").draw(torch.Generator(), dtype).dtype == torch.float32


@pytest.mark.parametrize("name", ["int64", "complex64", "float33", ""])
def test_dtype_refused(name: str) -> None:
    with pytest.raises(UsageError, match="one of float32"):
        parse_float_dtype(name)


def test_draws_stay_in_range_and_repeat() -> None:
    spec = parse_input("64x64:int64:3..5")
    first, second = (spec.draw(torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert set(first.unique().tolist()) == {3, 4, 5}
    floats = parse_input("64x64:float32:-2..-1").draw(torch.Generator())
    assert -2 <= floats.min() < floats.max() <= -1


def test_too_large_to_draw() -> None:
    with pytest.raises(InputError, match="cannot be made"):
        parse_input("99999999x9999999").draw(torch.Generator())
