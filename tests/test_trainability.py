"""The benchmark of verdicts against training: its grid, its labels, its scoring, and one net really trained."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import trainability
import trainability_labels as labels
import trainability_nets as nets
from scoring import Score
from trainability import Verdict
from trainability_labels import Run

from gradflow.findings import Severity


def net(name: str) -> nets.Net:
    return next(net for net in nets.grid() if net.name == name)


def verdict(name: str, worst: str, seed: int = 0, variant: str = "mean", gain: float = 1.0) -> Verdict:
    alarms = (("TorchLens", ("vanishing",) if worst == "error" else ()),)
    return Verdict(net=name, seed=seed, variant=variant, worst=worst, rules=(), gain=gain, alarms=alarms)


def run(name: str, seed: int, optimizer: str, trained: int) -> Run:
    return Run(name, seed, optimizer, 0.1, 20, 0.9, trained)


def test_the_grid_is_large_and_does_not_move() -> None:
    """At least 150 nets of three families in two halves; the names of a few, so that no edit moves them unseen."""
    grid = nets.grid()
    assert len(grid) == len({net.name for net in grid}) >= 150
    assert Counter(net.family for net in grid) == nets.COUNTS
    assert min(Counter(net.half for net in grid).values()) > 60
    assert [net.name for net in grid[:2]] == [
        "dense-digits-12-relu-default-none-residual",
        "dense-digits-3-sigmoid-orthogonal-layer-plain",
    ]
    assert [net.half for net in grid[:6]] == HALVES


HALVES = ["untouched", "untouched", "tuned", "tuned", "untouched", "untouched"]


@pytest.mark.parametrize("family", nets.COUNTS)
def test_every_family_builds_and_learns_from_its_data(family: str) -> None:
    """Outputs fit the targets, the seed alone says what the weights are, and every parameter is in the loss."""
    for chosen in [net for net in nets.grid() if net.family == family][:6]:
        x, y = nets.batch(chosen.data, 0, 8)
        module = nets.build(chosen, 1)
        nets.loss_of(module(x), y).backward()
        assert all(p.grad is not None for p in module.parameters())
        again = dict(nets.build(chosen, 1).named_parameters())
        assert all(torch.equal(value, again[name]) for name, value in module.named_parameters())


def test_initialisations_are_what_they_are_called() -> None:
    torch.manual_seed(0)
    for how, std in (("he", 2**0.5), ("small", 0.5 * 2**0.5), ("large", 2 * 2**0.5), ("xavier", 1.0)):
        linear = torch.nn.Linear(256, 256)
        nets.initialise(linear, how)
        assert float(linear.weight.detach().std()) * 16 == pytest.approx(std, rel=0.02)
        assert not linear.bias.any()


def test_the_text_holds_only_known_characters() -> None:
    x, y = nets.samples("text")
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert int(x.max()) < len(nets.ALPHABET) == 64
    assert 0.1 < nets.chance("text") < 0.3
    assert nets.chance("digits") == pytest.approx(0.1, abs=0.01)


def test_training_a_net_that_trains() -> None:
    """Three layers at PyTorch's defaults learn the digits; the same run again gives the same row."""
    shallow = next(n for n in nets.grid() if (n.family, n.depth, n.initialisation) == ("dense", 3, "default"))
    first = labels.train(shallow, 0, "adam", 0.003)
    assert first.trained == 1
    assert first.steps <= labels.STEPS
    assert first == labels.train(shallow, 0, "adam", 0.003)


def test_a_later_seed_tries_what_did_best_before() -> None:
    first = [
        Run("a", 0, "sgd", rate, 120, score, 0) for rate, score in ((0.1, 0.1), (0.03, 0.3), (0.002, 0.2))
    ]
    assert labels.rates("sgd", first) == [0.03, 0.002]
    assert labels.rates("sgd", []) == labels.RATES["sgd"]


def test_the_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = tmp_path / "deep" / "labels.csv"
    rows = [run("a", 0, "sgd", 0), run("a", 0, "adam", 1)]
    labels.append(table, rows[:1])
    labels.append(table, rows[1:])
    assert labels.read(table) == rows
    grid = nets.grid()
    assert labels.todo([])[0] == (grid[0], 0)
    assert len(labels.todo([])) == 3 * len(grid)


def test_a_third_seed_goes_first_where_two_do_not_agree() -> None:
    one, two = nets.grid()[:2]
    known = [run(n.name, seed, "sgd", int(n is one)) for n in nets.grid() for seed in (0, 1)]
    known[3] = run(two.name, 1, "sgd", 1)
    assert labels.todo(known)[0] == (two, 2)


def test_labels_are_majorities() -> None:
    rows = [
        *(run("broken", seed, optimizer, 0) for seed in range(3) for optimizer in ("sgd", "adam")),
        *(run("fragile", seed, "sgd", int(seed == 0)) for seed in range(3)),
        *(run("fragile", seed, "adam", 1) for seed in range(3)),
        *(run("fine", seed, optimizer, int(seed < 2)) for seed in range(3) for optimizer in ("sgd", "adam")),
        run("once", 0, "sgd", 0),
    ]
    assert trainability.happened(rows) == {
        "broken": {"broken": True, "fragile": True},
        "fragile": {"broken": False, "fragile": True},
        "fine": {"broken": False, "fragile": False},
    }


def test_a_verdict_is_the_middle_one_of_three() -> None:
    said = [verdict("a", worst, seed) for seed, worst in enumerate(("error", "warning", "none"))]
    said += [verdict("b", worst, seed) for seed, worst in enumerate(("error", "error", "none"))]
    assert trainability.said_by_gradflow(said, "broken") == {"a": False, "b": True}
    assert trainability.said_by_gradflow(said, "fragile") == {"a": True, "b": True}
    assert trainability.said_by_rival(said, "TorchLens", "mean") == {"a": False, "b": True}
    did = {"a": True, "b": True, "not asked": True}
    assert trainability.score(trainability.said_by_gradflow(said, "broken"), did) == Score(
        hits=1, misses=1, false=0
    )


def test_the_bare_gain_gets_the_limit_that_suits_it_best() -> None:
    gains = {"a": 1.0, "b": 1e-3, "c": 1e4, "d": 0.0}
    said = [verdict(name, "none", seed, gain=gain) for name, gain in gains.items() for seed in range(3)]
    did = {"a": False, "b": False, "c": True, "d": True}
    limit = trainability.best_limit(said, did)
    assert trainability.said_by_gain(said, limit) == did


def test_only_another_severity_counts_as_moved() -> None:
    said = [verdict("a", "info"), verdict("a", "none", variant="summed")]
    said += [verdict("b", "error"), verdict("b", "warning", variant="summed")]
    assert trainability.moved(said, "summed") == (1, 2)


def test_a_quick_run_of_the_bench(tmp_path: Path) -> None:
    """One net that vanishes and one that does not, asked in four ways; the verdict is the same each time."""
    results = tmp_path / "results.jsonl"
    few = [
        net(f"dense-digits-{name}") for name in ("24-sigmoid-he-none-plain", "6-relu-default-batch-residual")
    ]
    said = list(trainability.judge_all(few, results))
    assert len(said) == 2 * (4 + 1 + 1)
    assert [severities(said, n, v) for n in few for v in trainability.VARIANTS] == [{"error"}] * 4 + [
        {"none"}
    ] * 4
    assert [repr(v) for v in trainability.read(results)] == [repr(v) for v in said]


def severities(said: list[Verdict], chosen: nets.Net, variant: str) -> set[str]:
    loud = (Severity.WARNING, Severity.ERROR)
    mine = [v for v in said if (v.net, v.variant) == (chosen.name, variant)]
    return {v.worst if v.worst in loud else "none" for v in mine}
