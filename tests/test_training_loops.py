"""Inspecting between the steps of a training loop: the loop goes on bit for bit as it would have unwatched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fingerprint import bits, differences, fingerprint, process_state
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow
from gradflow.recording.updates import WARM_UP
from gradflow.trace_model import Coverage, ParameterRecord

Watch = Callable[[str], None]
SAMPLES, FEATURES, CLASSES = 6, 8, 3


class Network(nn.Module):
    """A residual net with what a step changes beside the parameters: running statistics, and random masks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encoder(x)
        return self.head(hidden + self.block(hidden))


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def loss_of(outputs: Tensor, inputs: Any) -> Tensor:
    return F.cross_entropy(outputs.float(), labels(inputs))


def labels(inputs: Any) -> Tensor:
    (x,) = inputs if isinstance(inputs, tuple) else (inputs,)
    return x.argmax(dim=1) % CLASSES


def batches(count: int) -> Iterator[Tensor]:
    """Drawn from the global generator as the loop goes: a disturbed generator changes every later batch."""
    for _ in range(count):
        yield torch.randn(SAMPLES, FEATURES)


class Loop:
    """A model in training, and everything that the next step depends on."""

    def __init__(self, optimizer: str = "adamw", scaler: torch.amp.GradScaler | None = None) -> None:
        self.model = network()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.scaler = scaler

    def state(self) -> dict[str, Any]:
        """Every value of the loop, bit for bit."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        found: dict[str, Any] = {name: bits(value) for name, value in named}
        found |= {f"grad {name}": bits(p.grad) for name, p in self.model.named_parameters()}
        for position, (name, parameter) in enumerate(self.model.named_parameters()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"state {position} {name} {key}"] = bits(torch.as_tensor(value))
        for position, group in enumerate(self.optimizer.param_groups):
            found |= {f"group {position} {key}": value for key, value in group.items() if key != "params"}
        found["schedule"] = repr(self.schedule.state_dict())
        if self.scaler is not None:
            found["scaler"] = repr(self.scaler.state_dict())
            found["scaler's stages"] = stages(self.scaler)
        return found | process_state()

    def identities(self) -> dict[str, Any]:
        """Which objects the loop holds: a loop may keep a gradient or a state's tensor in hand."""
        found = fingerprint(self.model)
        found["optimizer"] = {key: id(value) for key, value in vars(self.optimizer).items()}
        found["states"] = [
            (id(p), [(key, id(value)) for key, value in held.items()])
            for p, held in self.optimizer.state.items()
        ]
        return found


def stages(scaler: torch.amp.GradScaler) -> list[str]:
    """How far each optimizer's step has come, and the infinities found: what ``state_dict`` does not say."""
    return [repr(sorted(held.items())) for held in getattr(scaler, "_per_optimizer_states", {}).values()]


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
}


def accumulating(loop: Loop, watch: Watch) -> None:
    """Gradients of three backwards add up before each step."""
    for micro, x in enumerate(batches(9)):
        (loss_of(loop.model(x), x) / 3).backward()
        watch(f"micro-step {micro}")
        if micro % 3 == 2:
            loop.optimizer.step()
            loop.schedule.step()
            watch(f"after step {micro}")
            loop.optimizer.zero_grad()
            watch(f"cleared {micro}")


def kept_zeros(loop: Loop, watch: Watch) -> None:
    """Gradients are zeroed in place, so that the same tensors take the next ones."""
    for step, x in enumerate(batches(4)):
        loop.optimizer.zero_grad(set_to_none=False)
        watch(f"zeroed {step}")
        loss_of(loop.model(x), x).backward()
        watch(f"backward {step}")
        loop.optimizer.step()
        loop.schedule.step()


def clipping_norm(loop: Loop, watch: Watch) -> None:
    for step, x in enumerate(batches(4)):
        loop.optimizer.zero_grad()
        (100 * loss_of(loop.model(x), x)).backward()
        watch(f"before clipping {step}")
        norm = nn.utils.clip_grad_norm_(loop.model.parameters(), 0.5)
        assert norm > 0.5, "nothing was clipped"
        watch(f"after clipping {step}")
        loop.optimizer.step()
        loop.schedule.step()


def clipping_value(loop: Loop, watch: Watch) -> None:
    """By a hook on each parameter, which every backward runs, ours too."""
    for parameter in loop.model.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    for step, x in enumerate(batches(4)):
        loop.optimizer.zero_grad()
        loss_of(loop.model(x), x).backward()
        watch(f"backward {step}")
        loop.optimizer.step()
        loop.schedule.step()


def scaling(loop: Loop, watch: Watch) -> None:
    """The whole of mixed precision: scaled loss, unscaled and clipped gradients, one step that is skipped."""
    scaler = loop.scaler
    assert scaler is not None
    for step, x in enumerate(batches(5)):
        loop.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(loop.model(x), x)
        scaler.scale(loss).backward()
        watch(f"scaled {step}")
        if step == 2:
            assert loop.model.head.weight.grad is not None
            loop.model.head.weight.grad[0, 0] = torch.inf
        scaler.unscale_(loop.optimizer)
        watch(f"unscaled {step}")
        if step != 2:
            nn.utils.clip_grad_norm_(loop.model.parameters(), 0.5)
        scaler.step(loop.optimizer)
        watch(f"stepped {step}")
        scaler.update()
        watch(f"updated {step}")


def graph_held(loop: Loop, watch: Watch) -> None:
    """Watched between forward and backward, while a graph holds the tensors that the model is made of."""
    for step, x in enumerate(batches(4)):
        loop.optimizer.zero_grad()
        loss = loss_of(loop.model(x), x)
        watch(f"before backward {step}")
        loss.backward()
        loop.optimizer.step()
        loop.schedule.step()


def inside_autocast(loop: Loop, watch: Watch) -> None:
    """Watched where the weights cast to bfloat16 are kept for the rest of the block."""
    for step, x in enumerate(batches(4)):
        loop.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            watch(f"before forward {step}")
            loss = loss_of(loop.model(x), x)
            watch(f"before backward {step}")
            loss.backward()
        assert loop.model.head.weight.grad is not None
        loop.optimizer.step()
        loop.schedule.step()


def freezing(loop: Loop, watch: Watch) -> None:
    """The encoder is frozen for two steps, its batch norm with it, and then trained again."""
    for step, x in enumerate(batches(6)):
        frozen = step in (2, 3)
        loop.model.encoder.requires_grad_(not frozen).train(not frozen)
        watch(f"before forward {step}")
        loop.optimizer.zero_grad()
        loss_of(loop.model(x), x).backward()
        watch(f"backward {step}")
        loop.optimizer.step()
        loop.schedule.step()


def enabled() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)


def disabled() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


def trail(loop: Loop, run: Any, look: Callable[[Loop, str], None] | None) -> list[tuple[str, dict[str, Any]]]:
    """What the loop was at each place where it can be watched, and after its end."""
    seen: list[tuple[str, dict[str, Any]]] = []

    def watch(place: str) -> None:
        if look is not None:
            look(loop, place)
        seen.append((place, loop.state()))

    torch.manual_seed(1)
    run(loop, watch)
    return [*seen, ("end", loop.state())]


def agree(make: Callable[[], Loop], run: Any, look: Callable[[Loop, str], None]) -> None:
    """The loop, watched and not."""
    for (place, alone), (_, watched) in zip(trail(make(), run, None), trail(make(), run, look), strict=True):
        assert not differences(alone, watched), place


X = torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(7))


def looked_at(loop: Loop, place: str, **options: Any) -> gradflow.Report:
    """Inspect, and see that nothing was touched."""
    before = loop.identities()
    report = gradflow.inspect(loop.model, (X,), loss_of, optimizer=loop.optimizer, **options)
    assert not differences(before, loop.identities()), place
    return report


LOOPS = {
    "accumulation": accumulating,
    "zeros kept": kept_zeros,
    "clipping by norm": clipping_norm,
    "clipping by value": clipping_value,
    "graph held": graph_held,
    "autocast": inside_autocast,
    "freezing": freezing,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", LOOPS)
def test_a_watched_loop_trains_as_an_unwatched_one(name: str, optimizer: str) -> None:
    agree(lambda: Loop(optimizer), LOOPS[name], looked_at)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw fused"])
@pytest.mark.parametrize("scaler", [enabled, disabled])
def test_a_watched_scaler_scales_as_an_unwatched_one(scaler: Any, optimizer: str) -> None:
    agree(lambda: Loop(optimizer, scaler()), scaling, looked_at)


@pytest.mark.parametrize("run", [accumulating, inside_autocast, freezing])
def test_every_optional_pass_leaves_the_loop_alone(run: Any) -> None:
    def look(loop: Loop, place: str) -> None:
        options = {"try_fixes": True, "ablate": "each", "paths": True, "shattered": True}
        looked_at(loop, place, steps=WARM_UP, **options)

    agree(Loop, run, look)


def test_an_inspection_that_fails_leaves_the_loop_alone() -> None:
    def broken(_outputs: Tensor, _inputs: Any) -> Tensor:
        raise ValueError("no loss today")

    def look(loop: Loop, place: str) -> None:
        before = loop.identities()
        with pytest.raises(gradflow.GradflowError, match="no loss today"):
            gradflow.inspect(loop.model, (X,), broken, optimizer=loop.optimizer)
        assert not differences(before, loop.identities()), place

    agree(Loop, accumulating, look)


def rows(report: gradflow.Report) -> dict[str, ParameterRecord]:
    return {row.name: row for row in report.trace.parameters}


@pytest.mark.parametrize("steps", [1, WARM_UP])
def test_weights_that_autocast_keeps_are_not_measured_in_place_of_new_ones(steps: int) -> None:
    """Autocast keeps each cast weight until its block ends: after a step of the optimizer they are the old ones."""
    traces = []
    for kept in (True, False):
        loop = Loop("sgd")
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=kept):
            traces.append(looked_at(loop, "in the block", steps=steps).trace)
            assert torch.is_autocast_cache_enabled() is kept
    assert traces[0] == traces[1]


@pytest.mark.parametrize("run", [accumulating, clipping_norm])
def test_gradients_that_the_loop_holds_are_not_counted(run: Any) -> None:
    """A copy whose gradients are all None is the witness: of those that add up, or were clipped, nothing is seen."""

    def look(loop: Loop, place: str) -> None:
        fresh = copy.deepcopy(loop)
        for parameter in fresh.model.parameters():
            parameter.grad = None
        assert looked_at(loop, place).trace == looked_at(fresh, place).trace

    agree(Loop, run, look)


def test_a_scaled_loss_scales_its_gradients_and_not_the_gains() -> None:
    loop = Loop(scaler=enabled())
    plain = looked_at(loop, "plain")
    assert loop.scaler is not None
    scaler = loop.scaler

    def scaled(outputs: Tensor, inputs: Any) -> Tensor:
        return scaler.scale(loss_of(outputs, inputs))

    report = gradflow.inspect(loop.model, (X,), scaled, optimizer=loop.optimizer)
    for name, row in rows(plain).items():
        assert row.gradient_norm is not None
        assert rows(report)[name].gradient_norm == pytest.approx(row.gradient_norm * 2.0**10, rel=1e-6)
    assert {f.rule for f in report.findings} == {f.rule for f in plain.findings}


def reference(model: Network) -> dict[str, float]:
    """Norm of each parameter's gradient in float64 on a copy, with the masks that a recording of seed 0 draws."""
    slow = copy.deepcopy(model)
    for parameter in slow.parameters():
        parameter.grad = None
    kept = torch.get_rng_state()
    torch.manual_seed(0)
    loss_of(slow(X), X).backward()
    torch.set_rng_state(kept)
    found = {}
    for name, parameter in slow.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.double().square().sum().sqrt().item()
    return found


def test_coverage_follows_freezing_and_unfreezing() -> None:
    """Frozen parameters keep a stale gradient and a state of the optimizer: neither makes them measured."""
    seen: dict[str, set[str]] = {}

    def look(loop: Loop, place: str) -> None:
        report = looked_at(loop, place)
        frozen = not loop.model.head.weight.requires_grad or not loop.model.encoder[0].weight.requires_grad
        expected = reference(loop.model)
        for name, row in rows(report).items():
            held_back = frozen and name.startswith("encoder.")
            assert row.coverage is (Coverage.FROZEN if held_back else Coverage.MEASURED), (place, name)
            assert row.requires_grad is not held_back
            assert row.in_optimizer is True
            assert (row.update_ratio is None) == (held_back or row.norm == 0), (place, name)
            if held_back:
                assert row.gradient_norm is None
            else:
                assert row.gradient_norm == pytest.approx(expected[name], rel=1e-4, abs=1e-9)
        layers = {row.name: row.coverage for row in report.trace.layers}
        assert layers["encoder.0"] is (Coverage.FROZEN if frozen else Coverage.MEASURED)
        assert layers["head"] is Coverage.MEASURED
        assert report.trace.run.trainable == sum(
            p.numel() for p in loop.model.parameters() if p.requires_grad
        )
        seen.setdefault(place, set()).add("frozen" if frozen else "trained")

    agree(Loop, freezing, look)
    assert seen["backward 2"] == {"frozen"}
    assert seen["before forward 4"] == {"trained"}


def test_what_the_optimizer_was_not_told_of_after_unfreezing_is_said() -> None:
    """Built while the encoder was frozen, the optimizer never updates it, until it is given the parameters."""
    model = network()
    model.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def accused() -> list[str]:
        report = gradflow.inspect(model, (X,), loss_of, optimizer=optimizer)
        return [f.message for f in report.findings if f.rule == "GF103" and f.severity.value != "info"]

    assert accused() == []
    model.encoder.requires_grad_(True)
    (message,) = accused()
    assert "optimizer" in message
    optimizer.add_param_group({"params": list(model.encoder.parameters())})
    assert accused() == []
