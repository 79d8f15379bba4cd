"""SPRING without a rate, on least-squares problems of a few numbers: how it begins, and its second step in a step."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from natgrad import AdaptiveSPRING, GridSearch, NoiseFloor
from natgrad.steps import LeastSquares, half_square

DTYPE = torch.float64


class Small(LeastSquares):
    """r(θ + δ) = r + Jδ + bend(δ), with J of full rank."""

    def __init__(self, bend: Callable[[Tensor], Tensor | float], repeats: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        self.J = torch.randn(4, 6, dtype=DTYPE, generator=generator)
        self.residuals = torch.randn(4, dtype=DTYPE, generator=generator)
        self.bend, self.repeats = bend, repeats

    @property
    def largest(self) -> float:
        return float(torch.linalg.svdvals(self.J)[0]) ** 2

    def gradient(self) -> Tensor:
        return self.J.T @ self.residuals

    def image(self, delta: Tensor) -> Tensor:
        return self.J @ delta

    def solve(self, target: Tensor, damping: float, order: float = 1.0) -> Tensor:
        return torch.linalg.solve(
            self.J.T @ self.J + damping * torch.eye(6, dtype=self.J.dtype), self.J.T @ target
        )

    def at(self, delta: Tensor) -> Tensor:
        return self.residuals + self.J @ delta + self.bend(delta)


def straight(delta: Tensor) -> float:
    return 0.0


@pytest.mark.parametrize("previous", [None, torch.full((6,), 0.01, dtype=DTYPE)])
def test_the_second_step_is_from_where_the_first_ends(previous: Tensor | None) -> None:
    """On straight residuals both leave (λ(JJᵀ + λI)⁻¹)² of what the momentum left; momentum keeps the first alone."""
    problem, damping, mu = Small(straight), 3.0, 0.8
    found = AdaptiveSPRING(momentum=mu, searching=False).decide(problem, damping, previous)
    carried = torch.zeros(6, dtype=DTYPE) if previous is None else mu * previous
    left = damping * torch.linalg.inv(problem.J @ problem.J.T + damping * torch.eye(4, dtype=DTYPE))
    assert found.update is not None
    torch.testing.assert_close(problem.at(found.update), left @ left @ problem.at(carried))
    first = carried + problem.solve(-problem.at(carried), damping)
    torch.testing.assert_close(found.direction, first)
    assert found.loss == pytest.approx(half_square(problem.at(found.update)))
    assert found.predicted == pytest.approx(found.loss - half_square(problem.residuals))


def test_a_bend_is_made_up_for() -> None:
    """Where residuals bend by a little, the second step takes the most of it away."""
    problem = Small(lambda delta: 0.05 * delta.square().sum())
    both, one = (
        AdaptiveSPRING(corrected=c).decide(problem, 1e-6, torch.zeros(6, dtype=DTYPE)) for c in (True, False)
    )
    assert both.loss is not None
    assert one.loss is not None
    assert both.loss < 0.05 * one.loss


def test_the_second_step_is_left_out_where_it_does_not_help_or_is_dear() -> None:
    def beyond(delta: Tensor) -> float:
        return 10.0 if float((delta - first).norm()) > 1e-12 else 0.0

    rest = torch.zeros(6, dtype=DTYPE)
    first = AdaptiveSPRING(corrected=False).decide(Small(straight), 3.0, rest).update
    assert first is not None
    for problem in (Small(beyond), Small(straight, repeats=False)):
        found = AdaptiveSPRING().decide(problem, 3.0, rest)
        torch.testing.assert_close(found.update, first, rtol=0, atol=0)
        assert found.loss == pytest.approx(half_square(Small(straight).at(first)))


# ------------------------------------------------------------------------------------------- how a run begins


def curled(delta: Tensor) -> Tensor:
    """So strongly bent that no whole step of a small λ lowers the loss."""
    return 30.0 * delta.square().sum() * torch.ones(4, dtype=DTYPE)


def test_a_run_begins_with_the_best_length_of_a_small_damping() -> None:
    """It is `GridSearch`'s step with λ at 10⁴ noise floors, and momentum waits."""
    problem = Small(curled)
    found = AdaptiveSPRING().decide(problem, None, None)
    least = NoiseFloor(1e4).of(problem.largest, 4, DTYPE)
    expected = GridSearch(finest=12).decide(problem, least, None, 0)
    assert 0 < found.alpha < 1
    assert (found.alpha, found.damping) == (expected.alpha, least)
    assert found.direction is None
    torch.testing.assert_close(found.update, expected.update, rtol=0, atol=0)


def test_momentum_begins_with_the_first_whole_step() -> None:
    found = AdaptiveSPRING().decide(Small(straight), None, None)
    assert found.alpha == 1
    torch.testing.assert_close(found.direction, found.update)


def test_a_whole_step_comes_from_any_start() -> None:
    """However the residuals bend, short steps raise λ until a whole one is the best."""
    problem, damping, alpha = Small(curled), None, 0.0
    for _ in range(100):
        found = AdaptiveSPRING().decide(problem, damping, None)
        assert (found.direction is None) == (found.alpha < 1)
        damping, alpha = found.following, found.alpha
        if alpha == 1:
            return
    pytest.fail(f"α was {alpha} after 100 steps, with λ = {damping}")


def test_where_no_length_helps_damping_rises_within_the_step() -> None:
    class Steep(Small):
        def at(self, delta: Tensor) -> Tensor:
            return self.residuals * (1.0 + (math.inf if float(delta.norm()) > 1e-5 else -delta.norm()))

    found = AdaptiveSPRING(trials=40).decide(Steep(straight), None, None)
    assert found.update is not None
    assert found.damping > NoiseFloor(1e4).of(Small(straight).largest, 4, DTYPE)
    nothing = AdaptiveSPRING(trials=2).decide(Steep(straight), None, None)
    assert nothing.update is None
    assert nothing.following > nothing.damping


def test_single_precision_begins_with_the_larger_damping() -> None:
    """10⁴ noise floors would be 4e-3 of the largest eigenvalue: the first λ is `initial` there."""
    problem = Small(straight)
    problem.J, problem.residuals = problem.J.float(), problem.residuals.float()
    found = AdaptiveSPRING().decide(problem, None, None)
    assert found.damping == pytest.approx(1e-3 * problem.largest)


def test_a_given_damping_is_the_first() -> None:
    assert AdaptiveSPRING().decide(Small(straight), 3.0, None).damping == 3.0
