"""The benchmark of verdicts: its scoring, its halves, and a few of its models, so that it cannot rot."""

from __future__ import annotations

from pathlib import Path

import detectors
import pytest
from detectors import CASES, Judged, Said
from scoring import Score, half_of

ALARMS = (("AutoTrainer", ("vanishing",)), ("TorchLens", ()))


def judged(case: str, *findings: Said, depth: int = 12) -> Judged:
    return Judged(case=case, width=128, depth=depth, seed=3, findings=findings, alarms=ALARMS)


def said(rule: str, severity: str = "warning", first: str = "layers.0", last: str = "layers.6") -> Said:
    return Said(rule=rule, severity=severity, first=first, last=last)


@pytest.mark.parametrize(
    ("verdict", "is_hit", "extras"),
    [
        (judged("V1a", said("GF101")), True, 0),
        (judged("V1a", said("GF101", "error")), True, 0),
        (judged("V1b", said("GF101")), False, 0),  # asked for as an error
        (judged("V1a"), False, 0),
        (judged("V1a", said("GF304"), said("GF101")), False, 1),  # not first
        (judged("V1a", said("GF101"), said("GF304")), True, 1),
        (judged("V1a", said("GF101", first="head")), False, 0),  # not there
        (
            judged(
                "G1b",
                said("GF102", "error", "blocks.0", "blocks.7"),
                said("GF202", "error", "blocks.0", "blocks.7"),
            ),
            True,
            0,
        ),
        (judged("I1a", said("GF201", first="blocks.4", last="blocks.6.mlp")), True, 0),
        (judged("I1a", said("GF201", first="blocks.3", last="blocks.6")), False, 0),
        (judged("I1b", said("GF201", first="blocks.6", last="blocks.11")), True, 0),
        (judged("I1b", said("GF201", first="blocks.6", last="blocks.9")), False, 0),
        (judged("S1a", said("GF302", first="1", last="1")), True, 0),
        (judged("R1a", said("GF304", "info")), True, 0),
        (judged("R1a", said("GF304", "warning")), True, 1),
    ],
)
def test_scoring(verdict: Judged, is_hit: bool, extras: int) -> None:
    assert (detectors.hit(verdict), len(detectors.extra(verdict))) == (is_hit, extras)


def test_scores_add_up() -> None:
    models = [
        judged("V1a", said("GF101")),
        judged("V1a"),
        judged("H1"),
        judged("H1", said("GF102")),
        judged("R1a", said("GF304", "info")),
    ]
    score = detectors.overall(models)
    assert (score.hits, score.misses, score.false) == (2, 1, 1)
    assert score.precision == score.recall == score.f1 == pytest.approx(2 / 3)
    assert detectors.of_rule(models, "GF102") == Score(hits=0, misses=0, false=1)
    # R1a asks for no alarm, and is not counted.
    rival = detectors.alarms_of("AutoTrainer")
    assert detectors.detects(models, rival) == Score(hits=2, misses=0, false=2)
    assert detectors.names(models, rival) == Score(hits=2, misses=0, false=2)
    silent = detectors.alarms_of("TorchLens")
    assert detectors.detects(models, silent) == Score(hits=0, misses=2, false=0)


def test_the_grid_is_forty_models_and_holds_the_recipes() -> None:
    """Forty names, three widths and depths of each; what the tests build is in the tuned half, at any seed."""
    assert len(detectors.AXES) == len(CASES) == 40
    assert all(len(set(widths)) == len(set(depths)) == 3 for widths, depths in detectors.AXES.values())
    for name, (widths, depths) in detectors.AXES.items():
        width, depth = CASES[name].build.__defaults__[-2:]
        assert width in widths, name
        assert depth in depths, name
        recipe = Judged(case=name, width=width, depth=depth, seed=4, findings=(), alarms=())
        assert recipe.half == "tuned"


def test_three_seeds_meet_every_size() -> None:
    """600 models in all; with each seed every width and every depth once."""
    models = list(detectors.grid(5))
    assert len(models) == len(set(models)) == 600
    for seed in range(5):
        mine = [(width, depth) for case, width, depth, s in models if (case.name, s) == ("H1", seed)]
        assert [sorted(column) for column in zip(*mine, strict=True)] == [[128, 256, 512], [4, 6, 8]]
    assert len({(width, depth) for case, width, depth, s in models if case.name == "H1" and s < 3}) == 9
    assert len(list(detectors.grid(5, full=True))) == 1800


def test_the_halves_do_not_move() -> None:
    """A half that changes with a release could be chosen; this one is given by a hash."""
    names = [f"V1a/{width}/5/{seed}" for width in (128, 512) for seed in range(3)]
    assert [half_of(name) for name in names] == HALVES


HALVES = ["untouched", "untouched", "tuned", "untouched", "tuned", "tuned"]


@pytest.mark.parametrize(("name", "width", "depth"), [("V1b", 128, 12), ("U1b", 128, 2), ("Z1b", 128, 6)])
def test_faulty_models_of_other_sizes_are_hits(name: str, width: int, depth: int) -> None:
    verdict = detectors.judge(CASES[name], width, depth, 4)
    assert detectors.hit(verdict), verdict.findings
    assert detectors.extra(verdict) == ()
    assert len(verdict.alarms) == 5


@pytest.mark.parametrize(("name", "width", "depth"), [("H1", 128, 8), ("H6", 8, 2)])
def test_healthy_models_of_other_sizes_are_left_alone(name: str, width: int, depth: int) -> None:
    verdict = detectors.judge(CASES[name], width, depth, 4)
    assert verdict.findings == ()
    # Exact zeros behind a zero gamma are the usual false alarm.
    assert name != "H6" or any(kinds for _, kinds in verdict.alarms)


def test_verdicts_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    known = [judged("V1a", said("GF101")), judged("H1")]
    for verdict in known:
        detectors.append(path, verdict)
    assert detectors.read(path) == known
