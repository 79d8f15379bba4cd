"""SPRING without a rate, on least-squares problems of a few numbers: what its second step within a step does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from natgrad import AdaptiveSPRING
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
        return torch.linalg.solve(self.J.T @ self.J + damping * torch.eye(6, dtype=DTYPE), self.J.T @ target)

    def at(self, delta: Tensor) -> Tensor:
        return self.residuals + self.J @ delta + self.bend(delta)


def straight(delta: Tensor) -> float:
    return 0.0


@pytest.mark.parametrize("previous", [None, torch.full((6,), 0.01, dtype=DTYPE)])
def test_the_second_step_is_from_where_the_first_ends(previous: Tensor | None) -> None:
    """On straight residuals both leave (λ(JJᵀ + λI)⁻¹)² of what the momentum left; momentum keeps the first alone."""
    problem, damping, mu = Small(straight), 3.0, 0.8
    found = AdaptiveSPRING(momentum=mu).decide(problem, damping, previous)
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
    both, one = (AdaptiveSPRING(corrected=c).decide(problem, 1e-6, None) for c in (True, False))
    assert both.loss is not None
    assert one.loss is not None
    assert both.loss < 0.05 * one.loss


def test_the_second_step_is_left_out_where_it_does_not_help_or_is_dear() -> None:
    def beyond(delta: Tensor) -> float:
        return 10.0 if float((delta - first).norm()) > 1e-12 else 0.0

    first = AdaptiveSPRING(corrected=False).decide(Small(straight), 3.0, None).update
    assert first is not None
    for problem in (Small(beyond), Small(straight, repeats=False)):
        found = AdaptiveSPRING().decide(problem, 3.0, None)
        torch.testing.assert_close(found.update, first, rtol=0, atol=0)
        assert found.loss == pytest.approx(half_square(Small(straight).at(first)))
