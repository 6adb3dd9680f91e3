"""The faults of other benchmarks: a few of them, so that the bench cannot rot."""

from __future__ import annotations

import ported_faults
import pytest
from ported_faults import FAULTS, TOOLS, Fault


def fault(name: str, what: str) -> Fault:
    return next(f for f in FAULTS if (f.name, f.what) == (name, what))


def test_the_published_figures_are_the_tables_own() -> None:
    """Counted in the published tables by hand, for these nine programs."""
    counts = [sum(tool in (f.found_by or ()) for f in FAULTS) for tool in TOOLS]
    assert counts == [5, 1, 3, 0, 2]
    assert sum(f.found_by is not None for f in FAULTS) == 9


@pytest.mark.parametrize(
    ("name", "what"),
    [("SO 65777704", "five sigmoids"), ("regrNN wrong_activation", "softmax over one output")],
)
def test_a_fault_that_a_gradient_shows_is_caught(name: str, what: str) -> None:
    assert ported_faults.caught(ported_faults.said(fault(name, what)))


@pytest.mark.parametrize("name", ["baseCNN", "regrNN"])
def test_a_clean_program_is_left_alone(name: str) -> None:
    assert ported_faults.said(fault(name, "clean")) == ((), (), ())
