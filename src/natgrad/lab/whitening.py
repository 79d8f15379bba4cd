"""A tanh neuron and a small network, trained on raw and on whitened inputs: a linear change of the weights.

W x + b = (W C^½)(C^-½ (x − m)) + (b + W m), so the same functions are written in other weights. Every finite step of
the exact natural gradient is then the same step; gradient descent's is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import natgrad
from natgrad.lab.study import Chart, Paths, Point, Study, grid


@dataclass(frozen=True)
class Whitened:
    """Inputs before and after whitening: x̃ = C^-½ (x − m)."""

    raw: Float[Tensor, "n d"]
    mean: Float[Tensor, " d"]
    root: Float[Tensor, "d d"]  # C^½

    @staticmethod
    def of(inputs: Float[Tensor, "n d"], centre: bool) -> Whitened:
        """Whitens by the second moment, about the mean if `centre` (a model without bias can't absorb a shift)."""
        mean = inputs.mean(0) if centre else torch.zeros_like(inputs[0])
        values, vectors = torch.linalg.eigh((inputs - mean).T @ (inputs - mean) / len(inputs))
        return Whitened(inputs, mean, vectors @ torch.diag(values.sqrt()) @ vectors.T)

    @property
    def white(self) -> Float[Tensor, "n d"]:
        """The whitened inputs."""
        white: Tensor = torch.linalg.solve(self.root, (self.raw - self.mean).T).T
        return white

    def carried(self, weight: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """The weights on whitened inputs that compute the same as `weight` on raw ones."""
        return weight @ self.root

    def back(self, weight: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """The inverse of `carried`."""
        raw: Tensor = torch.linalg.solve(self.root, weight.T).T
        return raw


def _inputs(count: int, seed: int) -> Float[Tensor, "n 2"]:
    """Correlated inputs of unequal scale, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.tensor([[1.6, 0.0], [0.75, 0.45]], dtype=torch.float64)
    return torch.randn(count, 2, generator=generator, dtype=torch.float64) @ mixing.T


MakeOptimizer = Callable[[nn.Module, nn.Module], torch.optim.Optimizer]


def gradient_descent(rate: float) -> MakeOptimizer:
    """Plain gradient descent."""
    return lambda model, loss_fn: torch.optim.SGD(model.parameters(), lr=rate)


def natural_gradient(rate: float) -> MakeOptimizer:
    """The exact natural gradient: dense Fisher of all outputs, a damping that only guards against rounding."""

    def make(model: nn.Module, loss_fn: nn.Module) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = natgrad.NaturalGradient(
            model, loss_fn, metric=natgrad.Dense(kind="exact"), lr=rate, momentum=0.0, damping=1e-12
        )
        return made

    return make


def descend(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    make: MakeOptimizer,
    steps: int,
    seen: Callable[[], Any],
) -> list[Any]:
    """What `seen()` returns before the first and after every full-batch step."""
    loss_fn = nn.MSELoss()
    optimizer = make(model, loss_fn)
    history = [seen()]
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
        history.append(seen())
    return history


class Neuron(nn.Module):
    """ŷ = tanh(w · x)."""

    def __init__(self, weight: Float[Tensor, "1 d"]) -> None:
        super().__init__()
        self.map = nn.Linear(weight.shape[1], 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.map.weight.copy_(weight)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
        """Predictions."""
        return torch.tanh(self.map(x))


class TanhNetwork(nn.Module):
    """A 2-`hidden`-1 tanh network around fixed weights, at a distance `spread` from them."""

    def __init__(self, hidden: int, spread: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(2, hidden, dtype=torch.float64)
        self.last = nn.Linear(hidden, 1, dtype=torch.float64)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                generator = torch.Generator().manual_seed(40 + index)
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise, alpha=spread)

    def forward(self, x: Float[Tensor, "n 2"]) -> Float[Tensor, "n 1"]:
        """Predictions."""
        return self.last(torch.tanh(self.first(x)))

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "n 2"]) -> Float[Tensor, "n 1"]:
        """The same, unseen by an optimiser that listens to calls of the model."""
        return self.forward(x)

    @torch.no_grad()
    def move_to(self, white: Whitened) -> None:
        """Rewrites the first layer for whitened inputs: W̃ = W C^½, b̃ = b + W m. The function stays the same."""
        self.first.bias.add_(self.first.weight @ white.mean)
        self.first.weight.copy_(white.carried(self.first.weight))


def neuron_study(steps: int = 60) -> Study:
    """ŷ = tanh(w · x) on raw and on whitened inputs: two weights, so the loss can be drawn."""
    inputs = _inputs(200, seed=1)
    generator = torch.Generator().manual_seed(2)
    truth = torch.tensor([[1.2, -0.9]], dtype=torch.float64)
    targets = torch.tanh(inputs @ truth.T) + 0.1 * torch.randn(
        200, 1, generator=generator, dtype=torch.float64
    )
    white = Whitened.of(inputs, centre=False)
    start = torch.tensor([[-0.6, 1.5]], dtype=torch.float64)

    def paths(make: MakeOptimizer) -> Paths:
        both = []
        for x, weight, back in (
            (white.raw, start, lambda weight: weight),
            (white.white, white.carried(start), white.back),
        ):
            model = Neuron(weight)
            both.append(descend(model, x, targets, make, steps, functools.partial(_point, model, back)))
        predicted = [[torch.tanh(inputs @ _row(point).T) for point in path] for path in both]
        return Paths(both[0], both[1], max(_rms(p - q) for p, q in zip(*predicted, strict=True)))

    x, y = grid(-2.0, 2.6, 121), grid(-2.4, 2.4, 121)
    plane = torch.stack(torch.meshgrid(torch.tensor(x), torch.tensor(y), indexing="xy"), dim=-1).double()
    loss = (torch.tanh(plane @ inputs.T) - targets.T).square().mean(-1)
    least = int(loss.argmin())
    return Study(
        name="neuron",
        title="One tanh neuron",
        coordinates=("raw inputs", "whitened inputs"),
        axes=("weight w₁ on the raw inputs", "weight w₂ on the raw inputs"),
        chart=Chart(x, y, loss.tolist()),
        optimum=(x[least % len(x)], y[least // len(x)]),
        gradient=paths(gradient_descent(0.4)),
        natural=paths(natural_gradient(0.1)),
        distance_unit="(RMS of predictions)",
        note=f"{steps} full-batch steps with natgrad’s exact metric: "
        "a linear change of the weights leaves every one as it is.",
    )


def network_study(steps: int = 40, hidden: int = 2) -> Study:
    """A small tanh network learns from a teacher of its own shape, on raw and on whitened inputs.

    It has too many weights to draw, so only the distances count. It starts near the teacher, because far from any
    optimum an exact Fisher of a few hundred points is so ill-conditioned that rounding alone parts the paths.
    """
    inputs = _inputs(200, seed=3) + torch.tensor([0.8, -0.5], dtype=torch.float64)
    white = Whitened.of(inputs, centre=True)

    targets = TanhNetwork(hidden).predict(inputs)

    def paths(make: MakeOptimizer) -> Paths:
        both = []
        for x, whitened in ((white.raw, False), (white.white, True)):
            model = TanhNetwork(hidden, spread=0.4)
            if whitened:
                model.move_to(white)
            both.append(descend(model, x, targets, make, steps, functools.partial(model.predict, x)))
        return Paths([], [], max(_rms(p - q) for p, q in zip(*both, strict=True)))

    return Study(
        name="network",
        title=f"A 2-{hidden}-1 tanh network",
        coordinates=("raw inputs", "whitened inputs"),
        axes=("", ""),
        chart=None,
        optimum=None,
        gradient=paths(gradient_descent(0.3)),
        natural=paths(natural_gradient(0.1)),
        distance_unit="(RMS of predictions)",
        note=f"{4 * hidden + 1} parameters, {steps} full-batch steps.",
    )


def _point(model: Neuron, back: Callable[[Tensor], Tensor]) -> Point:
    first, second = back(model.map.weight.detach())[0].tolist()
    return first, second


def _row(point: Point) -> Tensor:
    return torch.tensor([point], dtype=torch.float64)


def _rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())
