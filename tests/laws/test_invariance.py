"""The natural gradient does not depend on coordinates; gradient descent does, and fails the same tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import natgrad
from natgrad import KFAC, AdaptiveStep, FixedStep

DTYPE = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


def well_conditioned(size: int, seed: int) -> Tensor:
    """Invertible, far from orthogonal."""
    Q, _ = torch.linalg.qr(random(size, size, seed=seed))
    P, _ = torch.linalg.qr(random(size, size, seed=seed + 1))
    return Q @ torch.diag(torch.linspace(0.3, 3.0, size, dtype=DTYPE)) @ P


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).to(DTYPE)


class Reparametrised(nn.Module):
    """The same functions in other coordinates: θ = T φ + t, and φ is what is trained."""

    def __init__(self, model: nn.Module, T: Tensor, t: Tensor) -> None:
        super().__init__()
        theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        self.shapes = {n: p.shape for n, p in model.named_parameters()}
        self.held = [model]  # not a submodule: its parameters are not trained
        self.T, self.t = T, t
        self.phi = nn.Parameter(torch.linalg.solve(T, theta - t))

    def theta(self) -> Tensor:
        return self.T @ self.phi + self.t

    def forward(self, x: Tensor) -> Tensor:
        parts = self.theta().split([s.numel() for s in self.shapes.values()])
        named = {n: part.view(s) for (n, s), part in zip(self.shapes.items(), parts)}
        return functional_call(self.held[0], named, (x,))


def data(step: int) -> tuple[Tensor, Tensor]:
    x = random(60, 2, seed=100 + step)
    y = torch.stack([torch.sin(x[:, 0]), x[:, 0] * x[:, 1]], dim=1)
    return x, torch.sigmoid(y)  # numbers to regress on, and soft labels


def train(model: nn.Module, steps: int, loss: nn.Module | None = None, **options: Any) -> nn.Module:
    loss = loss or nn.MSELoss()
    optimizer = natgrad.NaturalGradient(model, loss, **options)
    for step in range(steps):
        x, y = data(step)
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model


def glm() -> nn.Module:
    """A logistic regression: convex, so that it may go far without damping."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 2)).to(DTYPE)


EXACT = {
    "fixed": (net, {"metric": "dense", "lr": FixedStep(0.02, kl_clip=None), "damping": 1e-14}),
    "fixed-far": (glm, {"metric": "dense", "lr": FixedStep(0.5, kl_clip=None), "damping": 1e-14}),
    "momentum": (
        net,
        {"metric": "dense", "lr": FixedStep(0.02, momentum=0.5, kl_clip=None), "damping": 1e-14},
    ),
    "kl-clipped": (net, {"metric": "dense", "lr": FixedStep(1.0, kl_clip=1e-3), "damping": 1e-14}),
    "adaptive": (glm, {"metric": "dense", "lr": AdaptiveStep(coarse=0), "damping": 1e-14}),
}
GRADIENT = {"metric": "euclidean", "lr": 0.05}


def moved(build: Callable[[], nn.Module], options: dict[str, Any], steps: int = 5) -> tuple[Tensor, Tensor]:
    """θ after training in θ's coordinates, and after training in φ's."""
    model, loss = build(), nn.MSELoss() if build is net else nn.BCEWithLogitsLoss()
    size = sum(p.numel() for p in model.parameters())
    other = Reparametrised(build(), well_conditioned(size, 1), random(size, seed=3))
    train(model, steps, loss, **options)
    train(other, steps, loss, **options)
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return theta, other.theta().detach()


@pytest.mark.parametrize("name", EXACT)
def test_the_exact_step_is_unchanged_by_linear_coordinates(name: str) -> None:
    build, options = EXACT[name]
    here, there = moved(build, options)
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)
    start = torch.cat([p.detach().reshape(-1) for p in build().parameters()])
    assert (here - start).abs().max() > 0.05  # it went somewhere


def test_gradient_descent_is_not() -> None:
    here, there = moved(net, GRADIENT)
    assert (here - there).abs().max() > 0.1


def test_damping_breaks_the_invariance() -> None:
    """(F + λI) has a preferred coordinate system: the law is one of λ → 0."""
    here, there = moved(net, EXACT["fixed"][1] | {"damping": 1.0, "lr": 0.5})
    assert (here - there).abs().max() > 0.01


# ---- K-FAC: affine maps of a layer's inputs and outputs ------------------------------------------------------


class Affine(nn.Module):
    """A fixed map, with no parameter."""

    def __init__(self, matrix: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T + self.shift


def transformed(model: nn.Sequential) -> nn.Sequential:
    """The same function, with every linear layer between fixed affine maps.

    s = W a + b becomes s = C (W' (B a + c) + b') + d, which holds for W' = C⁻¹ W B⁻¹, b' = C⁻¹ (b − d) − W' c.
    """
    layers: list[nn.Module] = []
    for k, layer in enumerate(model):
        if not isinstance(layer, nn.Linear):
            layers.append(layer)
            continue
        B, c = well_conditioned(layer.in_features, 10 + k), random(layer.in_features, seed=20 + k)
        C, d = well_conditioned(layer.out_features, 30 + k), random(layer.out_features, seed=40 + k)
        inner = nn.Linear(layer.in_features, layer.out_features, dtype=DTYPE)
        with torch.no_grad():
            inner.weight.copy_(torch.linalg.solve(C, layer.weight) @ torch.linalg.inv(B))
            inner.bias.copy_(torch.linalg.solve(C, layer.bias - d) - inner.weight @ c)
        layers += [Affine(B, c), inner, Affine(C, d)]
    return nn.Sequential(*layers)


def functions_after(options: dict[str, Any], steps: int = 5) -> tuple[Tensor, Tensor]:
    model, other = net(), transformed(net())
    x = random(50, 2, seed=7)
    torch.testing.assert_close(model(x), other(x))
    return train(model, steps, **options)(x).detach(), train(other, steps, **options)(x).detach()


FACTORED = {
    "exact": {
        "metric": KFAC(kind="exact", factors=1, inverses=1),
        "lr": FixedStep(0.3, kl_clip=None),
        "damping": 1e-20,
    },
    "empirical": {
        "metric": KFAC(kind="empirical", factors=1, inverses=1),
        "lr": FixedStep(0.1, kl_clip=None),
        "damping": 1e-20,
    },
    "kl-clipped": {
        "metric": KFAC(kind="exact", factors=1, inverses=1),
        "lr": FixedStep(1.0, kl_clip=1e-3),
        "damping": 1e-20,
    },
    "adaptive": {
        "metric": KFAC(kind="exact", factors=1, inverses=1),
        "lr": AdaptiveStep(),
        "damping": 1e-20,
    },
}


@pytest.mark.parametrize("name", FACTORED)
def test_kfacs_step_is_unchanged_by_affine_maps_around_its_layers(name: str) -> None:
    """Martens & Grosse 2015, theorem 1."""
    here, there = functions_after(FACTORED[name])
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options", [GRADIENT, {"metric": "diagonal", "lr": 0.05, "damping": 1e-6}], ids=["gradient", "diagonal"]
)
def test_gradient_descent_and_the_diagonal_are_changed(options: dict[str, Any]) -> None:
    here, there = functions_after(options)
    assert (here - there).abs().max() > 0.05


# ---- smooth coordinates: along the flow ----------------------------------------------------------------------


class Normal(nn.Module):
    """A Gaussian whose spread is σ = link(s)."""

    def __init__(self, s: float, link: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([0.0], dtype=DTYPE))
        self.s = nn.Parameter(torch.tensor([s], dtype=DTYPE))
        self.link = link

    def spread(self) -> Tensor:
        return self.link(self.s)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean.expand(len(x), 1), (self.spread() ** 2).expand(len(x), 1)


def flow(model: Normal, step: float, options: dict[str, Any]) -> Tensor:
    """Where (mean, spread) is after time 1."""
    loss, y = nn.GaussianNLLLoss(), 2.0 + 0.5 * random(200, 1, seed=4)
    optimizer = natgrad.NaturalGradient(model, loss, lr=FixedStep(step, kl_clip=None), **options)
    for _ in range(round(1 / step)):
        optimizer.zero_grad()
        mean, variance = model(y)
        loss(mean, y, variance).backward()
        optimizer.step()
    return torch.cat([model.mean, model.spread()]).detach()


def gap(step: float, options: dict[str, Any]) -> float:
    ends = [
        flow(Normal(2.0, lambda s: s), step, options),
        flow(Normal(float(torch.tensor(2.0).log()), torch.exp), step, options),
    ]
    return float((ends[0] - ends[1]).abs().max())


def test_along_the_flow_smooth_coordinates_do_not_matter() -> None:
    """(μ, σ) and (μ, log σ): the difference of two Euler paths falls with the step."""
    exact = {"metric": "dense", "damping": 1e-12}
    coarse, fine = gap(0.1, exact), gap(0.025, exact)
    assert fine < 0.3 * coarse
    assert fine < 0.02
    gradient = {"metric": "euclidean"}
    assert gap(0.025, gradient) > 5 * fine
    assert gap(0.025, gradient) > 0.7 * gap(0.1, gradient)  # does not vanish
