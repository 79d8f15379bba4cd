"""Seeing the invariance: one model in two parametrisations, followed by gradient descent and the natural gradient.

The gradient ∂L/∂ξ is a covector; plain gradient descent takes it for a vector, so its path depends on how the
model was written down. F⁻¹ ∂L/∂ξ is a vector: the natural gradient's path is a fact about the model alone (Amari
1998). Here, a Gaussian fitted to data in (μ, σ) and in (μ, log σ). The change of coordinates is curved, so the paths
coincide along the *flow* ξ' = −F⁻¹∇L, which is followed by Runge–Kutta; finite steps of size h part by O(h). Linear
changes, under which every finite step stays the same, are in `natgrad.lab.whitening`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from natgrad.lab.runs import environment, write_json
from natgrad.lab.study import Chart, Paths, Point, Study, grid
from natgrad.lab.whitening import network_study, neuron_study

Field = Callable[[Point], Point]


@dataclass(frozen=True)
class GaussianFit:
    """The mean negative log-likelihood of N(μ, σ²) on data with the given mean and standard deviation."""

    mean: float = 1.0
    deviation: float = 0.6

    def loss(self, mu: float, sigma: float) -> float:
        """log σ + ((m − μ)² + s²) / 2σ², in nats per datum, the constant ½ log 2π left out."""
        return math.log(sigma) + ((self.mean - mu) ** 2 + self.deviation**2) / (2 * sigma**2)

    def gradient(self, mu: float, sigma: float) -> Point:
        """(∂L/∂μ, ∂L/∂σ)."""
        square = (self.mean - mu) ** 2 + self.deviation**2
        return (mu - self.mean) / sigma**2, 1 / sigma - square / sigma**3

    def descent_in_sigma(self, point: Point) -> Point:
        """Gradient descent's velocity in ξ = (μ, σ)."""
        g = self.gradient(*point)
        return -g[0], -g[1]

    def descent_in_log_sigma(self, point: Point) -> Point:
        """Gradient descent's velocity in ξ = (μ, log σ), where ∂L/∂log σ = σ ∂L/∂σ."""
        mu, sigma = point[0], math.exp(point[1])
        g = self.gradient(mu, sigma)
        return -g[0], -sigma * g[1]

    def natural_in_sigma(self, point: Point) -> Point:
        """The natural gradient's velocity in (μ, σ): F = diag(1/σ², 2/σ²)."""
        g, square = self.gradient(*point), point[1] ** 2
        return -square * g[0], -square / 2 * g[1]

    def natural_in_log_sigma(self, point: Point) -> Point:
        """The natural gradient's velocity in (μ, log σ): F = diag(1/σ², 2)."""
        mu, sigma = point[0], math.exp(point[1])
        g = self.gradient(mu, sigma)
        return -(sigma**2) * g[0], -sigma * g[1] / 2


def rao_distance(p: Point, q: Point) -> float:
    """The Fisher–Rao distance between two Gaussians (μ, σ), which no choice of coordinates changes.

    (μ/√2, σ) is the hyperbolic half-plane with its metric doubled, so the distance is
    2√2 asinh √( ((μ₁ − μ₂)²/2 + (σ₁ − σ₂)²) / 4 σ₁ σ₂ ). Source: Atkinson & Mitchell 1981.
    """
    square = (p[0] - q[0]) ** 2 / 2 + (p[1] - q[1]) ** 2
    return 2 * math.sqrt(2) * math.asinh(math.sqrt(square / (4 * p[1] * q[1])))


def follow(field: Field, start: Point, step: float, steps: int, order: int = 4) -> list[Point]:
    """Integrates ξ' = field(ξ): the classical Runge–Kutta method, or Euler's with ``order=1`` (plain finite steps)."""

    def moved(point: Point, velocity: Point, h: float) -> Point:
        return point[0] + h * velocity[0], point[1] + h * velocity[1]

    path = [start]
    for _ in range(steps):
        here = path[-1]
        a = field(here)
        if order == 1:
            path.append(moved(here, a, step))
            continue
        b = field(moved(here, a, step / 2))
        c = field(moved(here, b, step / 2))
        d = field(moved(here, c, step))
        mean = (a[0] + 2 * b[0] + 2 * c[0] + d[0]) / 6, (a[1] + 2 * b[1] + 2 * c[1] + d[1]) / 6
        path.append(moved(here, mean, step))
    return path


def gaussian_paths(
    fit: GaussianFit,
    method: str,
    start: Point = (-1.5, 1.6),
    step: float = 0.01,
    steps: int = 800,
    order: int = 4,
) -> Paths:
    """The paths of ``"gradient"`` or ``"natural"`` from (μ, σ) and from (μ, log σ), both told in (μ, σ)."""
    raw, logged = (
        (fit.descent_in_sigma, fit.descent_in_log_sigma)
        if method == "gradient"
        else (fit.natural_in_sigma, fit.natural_in_log_sigma)
    )
    first = follow(raw, start, step, steps, order)
    inside = follow(logged, (start[0], math.log(start[1])), step, steps, order)
    second = [(mu, math.exp(tau)) for mu, tau in inside]
    return Paths(first, second, max(rao_distance(p, q) for p, q in zip(first, second, strict=True)))


def gaussian_study() -> Study:
    """The Gaussian in (μ, σ) and in (μ, log σ), with the distances of finite steps in the note."""
    fit = GaussianFit()
    apart = {
        h: gaussian_paths(fit, "natural", step=h, steps=round(8 / h), order=1).distance for h in (0.1, 0.05)
    }
    x, y = grid(-2.0, 2.0, 121), grid(0.3, 2.6, 121)
    return Study(
        name="gaussian",
        title="A Gaussian fitted to data",
        coordinates=("(μ, σ)", "(μ, log σ)"),
        axes=("mean μ", "standard deviation σ"),
        chart=Chart(x, y, [[fit.loss(a, b) for a in x] for b in y]),
        optimum=(fit.mean, fit.deviation),
        gradient=gaussian_paths(fit, "gradient"),
        natural=gaussian_paths(fit, "natural"),
        distance_unit="(Fisher–Rao)",
        note="Both follow the flow. With finite steps a curved change of coordinates shows at first order: the natural "
        f"gradient’s paths are at most {apart[0.1]:.2g} apart with steps of 0.1, {apart[0.05]:.2g} with steps of 0.05.",
    )


def run_studies(folder: Path, say: Callable[[str], None] = lambda text: None) -> list[Study]:
    """Computes all three studies and writes them to ``coordinates.json``.

    Raises:
        RunError: the folder can't be written.
    """
    write_json(folder / "environment.json", environment())
    studies = []
    for make in (gaussian_study, neuron_study, network_study):
        study = make()
        studies.append(study)
        say(f"{study.title}: {study.coordinates[0]} and {study.coordinates[1]}; {study.sentence()}")
    write_json(folder / "coordinates.json", {"studies": [dataclasses.asdict(s) for s in studies]})
    return studies
