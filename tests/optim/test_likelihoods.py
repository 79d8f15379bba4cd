"""Every loss of torch.nn that has a likelihood is trained by the ordinary loop, adaptively and with a fixed step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad

DTYPE = torch.float64


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().to(DTYPE)


def points(count: int, seed: int) -> Tensor:
    return torch.randn(count, 2, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 1, 4, 4, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


class Heads(nn.Module):
    """A mean and a variance."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.spread = nn.Linear(2, 8), nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.body(x))
        return self.mean(hidden), F.softplus(self.spread(hidden)) + 1e-3


def mlp(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, outputs))


def segmenter() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))


def surface(x: Tensor) -> Tensor:
    return torch.sin(2 * x[:, :1]) + torch.cos(x[:, 1:])


def regions(x: Tensor) -> Tensor:
    smooth = F.avg_pool2d(x, 3, 1, 1).squeeze(1)
    y = (smooth > -0.1).long() + (smooth > 0.2).long()
    y[:, 0, 0] = -100  # one pixel of each image has no label
    return y


CASES: dict[
    str, tuple[Callable[[], nn.Module], nn.Module, Callable[..., Tensor], Callable[[Tensor], Any]]
] = {
    "mse": (lambda: mlp(1), nn.MSELoss(), points, surface),
    "mse-sum": (lambda: mlp(1), nn.MSELoss(reduction="sum"), points, surface),
    "gaussian": (Heads, nn.GaussianNLLLoss(), points, surface),
    "gaussian-fixed-variance": (lambda: mlp(1), nn.GaussianNLLLoss(), points, lambda x: (surface(x), 0.25)),
    "poisson": (lambda: mlp(1), nn.PoissonNLLLoss(), points, lambda x: surface(x).exp().round()),
    "bernoulli": (lambda: mlp(1), nn.BCEWithLogitsLoss(), points, lambda x: (surface(x) > 0.5).to(DTYPE)),
    "bernoulli-weighted": (
        lambda: mlp(1),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0], dtype=DTYPE)),
        points,
        lambda x: (surface(x) > 0.5).to(DTYPE),
    ),
    "categorical": (lambda: mlp(2), nn.CrossEntropyLoss(), points, lambda x: (surface(x) > 0.5).long()[:, 0]),
    "categorical-smoothed": (
        lambda: mlp(2),
        nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 2.0], dtype=DTYPE)),
        points,
        lambda x: (surface(x) > 0.5).long()[:, 0],
    ),
    "categorical-probabilities": (
        lambda: mlp(2),
        nn.CrossEntropyLoss(),
        points,
        lambda x: torch.cat([torch.sigmoid(surface(x)), torch.sigmoid(-surface(x))], dim=1),
    ),
    "spatial": (segmenter, nn.CrossEntropyLoss(), images, regions),
    "spatial-sum": (segmenter, nn.CrossEntropyLoss(reduction="sum"), images, regions),
}


def value_of(loss: nn.Module, outputs: Any, targets: Any) -> Tensor:
    if isinstance(outputs, tuple):
        return loss(outputs[0], targets, outputs[1])
    if isinstance(targets, tuple):
        return loss(outputs, targets[0], var=targets[1])
    if isinstance(loss, nn.PoissonNLLLoss):
        return loss(log_input=outputs, target=targets)
    return loss(outputs, targets)


def train(name: str, steps: int, **options: Any) -> tuple[float, float, natgrad.NaturalGradient]:
    """Loss on fresh data before and after."""
    build, loss, draw, label = CASES[name]
    model, test = seeded(build), draw(300, 99)
    optimizer = natgrad.NaturalGradient(model, loss, **options)

    def tested() -> float:
        with torch.no_grad():
            return value_of(loss, model(test), label(test)).item()

    before = tested()
    for step in range(steps):
        x = draw(64, step)
        optimizer.zero_grad()
        value_of(loss, model(x), label(x)).backward()
        optimizer.step()
    return before, tested(), optimizer


@pytest.mark.parametrize("metric", ["kfac", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_the_adaptive_loop_brings_the_loss_down(name: str, metric: str) -> None:
    before, after, optimizer = train(name, 20, metric=metric)
    assert after < before - 0.1 * abs(before)
    assert optimizer.info.step == 20
    assert not optimizer.coverage().uncovered


@pytest.mark.parametrize("metric", ["kfac", "diagonal"])
@pytest.mark.parametrize("name", [n for n in CASES if not n.endswith("sum")])
def test_the_fixed_loop_brings_the_loss_down(name: str, metric: str) -> None:
    before, after, _ = train(name, 20, metric=metric, lr=0.2, damping=0.1)
    assert after < before


def test_a_sum_is_trained_like_the_mean_it_is_a_multiple_of() -> None:
    """The scale of F is the loss's: with λ scaled alike, every step is the same."""
    ends = []
    for name, damping in (("mse", 0.01), ("mse-sum", 0.64)):
        _, _, optimizer = train(name, 10, metric="dense", damping=damping)
        ends.append(torch.cat([p.detach().flatten() for p in optimizer.model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["mse", "categorical", "spatial"])
def test_float32_follows_float64(name: str) -> None:
    build, loss, draw, label = CASES[name]
    ends = []
    for dtype in (torch.float64, torch.float32):
        model = seeded(build).to(dtype)
        optimizer = natgrad.NaturalGradient(model, loss, metric="dense", damping=0.1)
        for step in range(5):
            x = draw(64, step)
            y = label(x)
            optimizer.zero_grad()
            loss(model(x.to(dtype)), y.to(dtype) if y.is_floating_point() else y).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().double().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-2, atol=1e-3)
