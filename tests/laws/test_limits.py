"""Where natural gradient descent becomes something else, or its answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad import KFAC, L2, AdaptiveStep, Dense, Diagonal, FixedStep
from oracle import fisher as oracle

DTYPE = torch.float64


def net(dtype: torch.dtype = DTYPE) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype)


def batch(step: int, dtype: torch.dtype = DTYPE) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(step)
    x = torch.randn(32, 3, dtype=DTYPE, generator=source)
    return x.to(dtype), torch.randint(4, (32,), generator=source)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loss: nn.Module, steps: int) -> list[Tensor]:
    path = []
    for step in range(steps):
        x, y = batch(step, next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        path.append(torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"momentum": 0.9}, {"momentum": 0.9}),
        ({"weight_decay": L2(0.01)}, {"weight_decay": 0.01}),
        ({"momentum": 0.8, "weight_decay": L2(0.1)}, {"momentum": 0.8, "weight_decay": 0.1}),
    ],
    ids=["plain", "momentum", "decay", "both"],
)
def test_the_euclidean_metric_is_sgd_to_the_bit(dtype: torch.dtype, ours: dict, theirs: dict) -> None:
    loss, first, second = nn.CrossEntropyLoss(), net(dtype), net(dtype)
    mine = natgrad.NaturalGradient(first, loss, metric="euclidean", lr=0.1, **ours)
    sgd = torch.optim.SGD(second.parameters(), lr=0.1, **theirs)
    for a, b in zip(train(first, mine, loss, 50), train(second, sgd, nn.CrossEntropyLoss(), 50)):
        assert torch.equal(a, b)


def test_so_it_is_with_groups_and_a_scheduler() -> None:
    paths = []
    for kind in (natgrad.NaturalGradient, torch.optim.SGD):
        model, loss = net(torch.float32), nn.CrossEntropyLoss()
        groups = [{"params": model[0].parameters(), "lr": 0.03}, {"params": model[2].parameters()}]
        if kind is torch.optim.SGD:
            optimizer = kind(groups, lr=0.1, momentum=0.9)
        else:
            optimizer = kind(model, loss, groups, metric="euclidean", lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        for step in range(30):
            x, y = batch(step, torch.float32)
            optimizer.zero_grad()
            loss(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
        paths.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*paths)


@pytest.mark.parametrize(
    "metric", [Dense(), KFAC(kind="exact"), Diagonal(kind="exact")], ids=lambda m: type(m).__name__
)
def test_a_large_damping_gives_gradient_descent(metric: natgrad.Metric) -> None:
    """(F + λI)⁻¹ → I/λ: with lr = 0.1 λ the path is that of lr = 0.1."""
    loss, first, second = nn.CrossEntropyLoss(), net(), net()
    damping = 1e12
    size = FixedStep(0.1 * damping, kl_clip=None)
    natural = natgrad.NaturalGradient(first, loss, metric=metric, lr=size, damping=damping)
    sgd = torch.optim.SGD(second.parameters(), lr=0.1)
    ends = [train(first, natural, loss, 10)[-1], train(second, sgd, nn.CrossEntropyLoss(), 10)[-1]]
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", ["dense", "kfac", "diagonal"])
def test_so_it_does_where_steps_are_adaptive(metric: str) -> None:
    """Δ points along −∇h. M then promises half of what the slope does, λ being all of its curvature: ρ → 2."""
    model, loss = net(), nn.CrossEntropyLoss()
    rule = natgrad.LevenbergMarquardt(initial=1e8, period=1, greatest=1e12)  # a hundredth of it is large too
    optimizer = natgrad.NaturalGradient(
        model, loss, metric=metric, damping=rule, lr=AdaptiveStep(fraction=1.0, coarse=0)
    )
    x, y = batch(0)
    start = oracle.parameters(model)
    loss(model(x), y).backward()
    g = oracle.gradient(model)
    optimizer.step()
    step = oracle.parameters(model) - start
    assert float(step @ -g / (step.norm() * g.norm())) > 1 - 1e-4
    assert optimizer.info.rho == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize("size", [FixedStep(1e-4, kl_clip=None), FixedStep(1e-5, kl_clip=None)])
def test_rho_tends_to_one_for_small_steps(size: FixedStep) -> None:
    model, loss = net(), nn.CrossEntropyLoss()
    rule = natgrad.LevenbergMarquardt(initial=0.1, period=1)
    optimizer = natgrad.NaturalGradient(model, loss, metric="dense", lr=size, damping=rule)
    train(model, optimizer, loss, 1)
    assert optimizer.info.rho == pytest.approx(1.0, abs=2 * size.lr)


# ---- answers that are known ----------------------------------------------------------------------------------


class Regression(nn.Module):
    """Linear in its parameters, with Gaussian noise: the loss is its quadratic model."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 2, dtype=DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("metric", ["dense", KFAC(kind="exact")], ids=["dense", "kfac"])
@pytest.mark.parametrize("mode", ["adaptive", "fixed"])
def test_a_linear_gaussian_model_is_solved_in_one_step(mode: str, metric: Any, reduction: str) -> None:
    source = torch.Generator().manual_seed(1)
    x = torch.randn(50, 4, dtype=DTYPE, generator=source) * torch.tensor([1.0, 5.0, 0.2, 3.0], dtype=DTYPE)
    y = torch.randn(50, 2, dtype=DTYPE, generator=source)
    model, loss = Regression(), nn.MSELoss(reduction=reduction)
    size = FixedStep(1.0, kl_clip=None) if mode == "fixed" else AdaptiveStep(fraction=1.0)
    damping = 1e-13 if metric == "dense" else 1e-24  # K-FAC damps each factor by its root
    optimizer = natgrad.NaturalGradient(model, loss, metric=metric, lr=size, damping=damping)
    loss(model(x), y).backward()
    optimizer.step()
    homogeneous = torch.cat([x, torch.ones(50, 1, dtype=DTYPE)], dim=1)
    answer = torch.linalg.lstsq(homogeneous, y).solution.T
    found = torch.cat([model.linear.weight, model.linear.bias[:, None]], dim=1).detach()
    torch.testing.assert_close(found, answer, rtol=1e-5, atol=1e-6)
    if mode == "adaptive":
        assert optimizer.info.alpha == pytest.approx(1.0, abs=1e-5)


class Family(nn.Module):
    """An exponential family: every example has the same natural parameters η."""

    def __init__(self, eta: Tensor, fill: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.eta, self.fill = nn.Parameter(eta), fill

    def forward(self, x: Tensor) -> Tensor:
        return self.fill(self.eta).expand(len(x), -1)


def counts(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DTYPE)[:, None]


FAMILIES = {
    # η, the model's outputs from η, the loss, targets, the natural parameters of a mean parameter
    "poisson": (
        torch.tensor([0.3], dtype=DTYPE),
        lambda eta: eta,
        nn.PoissonNLLLoss(),
        counts(2.0, 0.0, 5.0, 1.0),
        lambda m: m.log(),
    ),
    "bernoulli": (
        torch.tensor([-0.4], dtype=DTYPE),
        lambda eta: eta,
        nn.BCEWithLogitsLoss(),
        counts(1.0, 0.0, 1.0, 1.0),
        lambda m: (m / (1 - m)).log(),
    ),
    "categorical": (  # the last class is the base measure: its natural parameter is 0
        torch.tensor([0.2, -0.7], dtype=DTYPE),
        lambda eta: torch.cat([eta, eta.new_zeros(1)]),
        nn.CrossEntropyLoss(),
        torch.tensor([0, 2, 1, 1, 2]),
        lambda m: (m / (1 - m.sum())).log(),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_in_natural_parameters_it_is_the_gradient_in_mean_parameters(name: str) -> None:
    """F = ∂m/∂η, so that F⁻¹ ∇_η h = ∇_m h (Amari 1998)."""
    eta, fill, loss, y, natural = FAMILIES[name]
    model = Family(eta.clone(), fill)
    size = FixedStep(1.0, kl_clip=None)
    optimizer = natgrad.NaturalGradient(model, loss, metric="dense", lr=size, damping=1e-14)
    loss(model(y), y).backward()
    optimizer.step()
    step = model.eta.detach() - eta

    inverse = torch.linalg.inv(torch.func.jacrev(natural)(_mean(eta, natural)))
    mean = _mean(eta, natural).requires_grad_()
    loss(fill(natural(mean)).expand(len(y), -1), y).backward()
    torch.testing.assert_close(step, -mean.grad, rtol=1e-8, atol=1e-10)
    F = oracle.fisher(Family(eta.clone(), fill), loss, y, y)
    torch.testing.assert_close(F, inverse, rtol=1e-8, atol=1e-10)


def _mean(eta: Tensor, natural: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean parameter of η, by Newton's method on its inverse."""
    m = torch.full_like(eta, 0.3)
    for _ in range(100):
        step = torch.linalg.solve(torch.func.jacrev(natural)(m), natural(m) - eta)
        while not torch.isfinite(natural(m - step)).all():
            step = step / 2
        m = m - step
    torch.testing.assert_close(natural(m), eta)
    return m.detach()


def test_the_divergence_is_half_the_squared_length() -> None:
    """KL(θ‖θ+δ) = ½ δᵀFδ + O(δ³), by enumerating the classes."""
    model, loss = net(), nn.CrossEntropyLoss()
    x, y = batch(0)
    optimizer = natgrad.NaturalGradient(model, loss, metric="dense", lr=0.1)
    loss(model(x), y).backward()
    F = optimizer._curvature.estimates[0][1].operator()
    theta, delta = oracle.parameters(model), torch.randn(oracle.parameters(model).shape, dtype=DTYPE)
    log_p = model(x).log_softmax(1).detach()
    errors = []
    for length in (1e-2, 1e-3):
        torch.nn.utils.vector_to_parameters(theta + length * delta, model.parameters())
        log_q = model(x).log_softmax(1).detach()
        divergence = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
        predicted = 0.5 * length**2 * float(delta @ (F @ delta))
        errors.append(abs(divergence - predicted) / predicted)
    assert errors[0] < 0.1
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.3)  # O(δ³) beside δ²
    assert not math.isnan(errors[1])
