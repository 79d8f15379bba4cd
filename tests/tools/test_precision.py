"""Autocast and loss scaling: the curvature is that of the float32 run, and a step that overflowed did not happen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad import ConfigError, FixedStep
from tests.optim.runs import METRICS, MODES, Run, batches, for_every, net, parameters

HALVES = [torch.bfloat16, torch.float16]


def data(count: int, size: int = 40) -> list:
    return batches(count, size, dtype=torch.float32)


def backward(run: Run, batch: tuple[Tensor, Tensor], dtype: torch.dtype, scaler: object = None) -> None:
    run.optimizer.zero_grad()
    with torch.autocast("cpu", dtype):
        value = run.value(batch)
    (value if scaler is None else scaler.scale(value)).backward()


def moved(run: Run, start: Tensor) -> Tensor:
    return parameters(run.model) - start


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@for_every
def test_a_step_under_autocast_is_close_to_the_one_in_float32(
    metric: str, mode: str, dtype: torch.dtype
) -> None:
    # A constant added to all logits has no Fisher information, but bfloat16's rounding has a gradient there.
    options = {"damping": 1e-4} if (metric, mode) == ("tempered", "adaptive") else {}
    whole, half = (Run.of(metric, mode, net(torch.float32), **options) for _ in range(2))
    start, (batch,) = parameters(whole.model), data(1)
    whole.step(batch)
    backward(half, batch, dtype)
    half.optimizer.step()
    expected, found = moved(whole, start), moved(half, start)
    assert torch.cosine_similarity(expected, found, dim=0) > 0.99
    assert float(found.norm() / expected.norm()) == pytest.approx(1, abs=0.1)
    assert all(p.dtype == torch.float32 for p in half.model.parameters())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_the_loss_falls_under_autocast(metric: str, dtype: torch.dtype) -> None:
    run, (test,) = Run.of(metric, "adaptive", net(torch.float32)), data(1, 500)
    with torch.no_grad():
        before = run.value(test)
    for batch in data(20):
        backward(run, batch, dtype)
        run.optimizer.step()
    with torch.no_grad():
        assert run.value(test) < 0.95 * before


@pytest.mark.parametrize("unscale", [False, True], ids=["", "clipped"])
@for_every
def test_a_scaled_loss_gives_the_same_steps(metric: str, mode: str, unscale: bool) -> None:
    """Powers of two are exact, so that nothing is lost on the way there and back."""
    plain, scaled = (Run.of(metric, mode, net(torch.float32)) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for batch in data(6):
        backward(plain, batch, torch.bfloat16)
        backward(scaled, batch, torch.bfloat16, scaler)
        if unscale:
            scaler.unscale_(scaled.optimizer)
        for run in (plain, scaled):
            if unscale:
                nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        plain.optimizer.step()
        scaler.step(scaled.optimizer)
        scaler.update()
    assert torch.equal(parameters(plain.model), parameters(scaled.model))
    assert plain.optimizer.info.loss == scaled.optimizer.info.loss


# Without chance, so that runs can be compared.
EXACT = {
    "euclidean": "euclidean",
    "diagonal": natgrad.Diagonal(kind="exact"),
    "kfac": natgrad.KFAC(kind="exact"),
    "ekfac": natgrad.EKFAC(kind="exact"),
    "exact": "exact",
}


@pytest.mark.parametrize("zero", ["optimizer", "model"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", EXACT)
def test_a_step_that_overflowed_did_not_happen(metric: str, mode: str, zero: str) -> None:
    quiet, run = (Run.of("kfac", mode, net(), metric=EXACT[metric]) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for k, batch in enumerate(batches(8)):
        for overflows in [True, False] if k in (0, 3, 4) else [False]:
            (run.optimizer if zero == "optimizer" else run.model).zero_grad()
            scaler.scale(run.value(batch)).backward()
            start = parameters(run.model)
            if overflows:  # as where the scale is too large
                run.model[0].weight.grad[0, 0] = torch.inf
            scaler.step(run.optimizer)
            scaler.update(2.0**10)
            assert torch.equal(parameters(run.model), start) == overflows
        quiet.step(batch)
    # An average has seen the batch twice, so that it weighs a little more.
    close = {"rtol": 1e-6, "atol": 1e-9} if metric in ("euclidean", "exact") else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(parameters(run.model), parameters(quiet.model), **close)
    assert run.optimizer.info.step == 8


class Multiplied(torch.autograd.Function):
    """The identity, of which signals come back multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.factor, None


class Faint(nn.Module):
    """Signals grow or shrink by a factor on their way back."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = net(torch.float32), factor

    def forward(self, x: Tensor) -> Tensor:
        return Multiplied.apply(self.inner(x), self.factor)


@pytest.mark.parametrize(
    "metric", ["diagonal", "kfac", "ekfac", "dense", "exact", "matrixfree", "lowrank", "block"]
)
def test_signals_do_not_vanish_in_float16(metric: str) -> None:
    """Of a large batch they are small, as is what a layer's weights make of them."""
    whole, half = (
        Run.of(metric, "fixed", Faint(1e-6), damping=1e-13, lr=FixedStep(1.0), momentum=None)
        for _ in range(2)
    )
    start, (batch,) = parameters(whole.model), data(1, 400)
    whole.step(batch)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    backward(half, batch, torch.float16, scaler)
    scaler.step(half.optimizer)
    expected, found = moved(whole, start), moved(half, start)
    assert torch.cosine_similarity(expected, found, dim=0) > 0.95
    assert float(found.norm() / expected.norm()) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    "metric", ["diagonal", "kfac", "ekfac", "dense", "exact", "matrixfree", "lowrank", "block"]
)
def test_a_signal_that_overflows_in_float16_is_named_and_nothing_moves(metric: str) -> None:
    run, (batch,) = Run.of(metric, "fixed", Faint(1e7)), data(1)
    start = parameters(run.model)
    backward(run, batch, torch.float16)
    for p in run.model.parameters():  # as if the scale had been small enough for these
        p.grad.nan_to_num_(0.0, 0.0, 0.0)
    with pytest.raises(natgrad.NonFiniteError, match=r"signal.*0\.weight|0\.weight.*signal"):
        run.optimizer.step()
    assert torch.equal(parameters(run.model), start)
    run.model.factor = 1.0
    backward(run, batch, torch.float16)
    run.optimizer.step()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_inputs_may_be_of_a_half_type_under_autocast(mode: str, dtype: torch.dtype) -> None:
    run = Run.of("kfac", mode, net(torch.float32))
    for x, y in data(3):
        backward(run, (x.to(dtype), y), dtype)
        run.optimizer.step()


@pytest.mark.parametrize("metric", METRICS)
def test_parameters_of_a_half_type_are_refused(metric: str) -> None:
    """Factors of eight bits can't be inverted."""
    with pytest.raises(ConfigError, match=r"0\.weight is torch\.bfloat16.*autocast"):
        Run.of(metric, "fixed", net(torch.bfloat16))
