"""Four differential equations with known solutions.

    Poisson in two dimensions    −Δu = f                        u = sin πx sin πy
    Poisson in five              −Δu = f                        u = Σ cos πx_k; points drawn anew in each step
    heat                         u_t = ¼ u_xx                   u = exp(−π²t/4) sin πx; x and t from 0 to 1
    Helmholtz                    Δu + k² u = 0, with k = 20     u = Y₀(k r): a wave from a source outside the square

Residuals are the equation's at points inside and the error at points of the boundary, so that the loss is a sum of
squares and its Gauss–Newton matrix a Fisher information. The error is measured at points that nobody trains on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad import pde
from natgrad.lab.problem import ResidualProblem, Residuals

K = 20.0  # Helmholtz's wave number, 3.2 waves to the side of the square
SIDE = 30  # points to the side of the square


class Equation(NamedTuple):
    """An equation, its solution, and the network that looks for it."""

    net: Callable[[], nn.Module]
    solution: Callable[[Tensor], Tensor]  # [N, d] to [N, 1]
    points: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # inside and on the boundary
    residuals: Callable[[nn.Module, Tensor, Tensor], Residuals]
    dimensions: int
    seconds: float  # of each method
    fresh: bool = False  # points are drawn anew in each step

    def error(self, net: nn.Module) -> float:
        """The relative L2 error at 10,000 points that are always the same."""
        unseen, truth = _unseen(self.solution, self.dimensions)
        with torch.no_grad():
            return float((net(unseen) - truth).norm() / truth.norm())


@functools.lru_cache(maxsize=8)
def _unseen(solution: Callable[[Tensor], Tensor], dimensions: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(99)
    unseen = torch.rand(10_000, dimensions, generator=generator, dtype=torch.float64)
    return unseen, solution(unseen)


class Sine(nn.Module):
    """Sin z."""

    def forward(self, z: Tensor) -> Tensor:
        """Elementwise."""
        return torch.sin(z)


def mlp(*widths: int) -> nn.Sequential:
    """A multilayer perceptron with tanh, in float64."""
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def waves(features: int) -> nn.Sequential:
    """One layer of sines, whose wave vectors start in a disc of radius about k."""
    first = nn.Linear(2, features)
    net = nn.Sequential(first, Sine(), nn.Linear(features, 1)).double()
    with torch.no_grad():
        first.weight.normal_(0, K / math.sqrt(2))
        first.bias.uniform_(-math.pi, math.pi)
    return net


def grid(n: int, generator: torch.Generator) -> tuple[Float[Tensor, "i 2"], Float[Tensor, "b 2"]]:
    """n² points inside the unit square, and n on each side."""
    t = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    sides = [torch.stack(side, 1) for side in ((t, zero), (t, one), (zero, t), (one, t))]
    return torch.cartesian_prod(t, t), torch.cat(sides)


def initial_and_ends(n: int, generator: torch.Generator) -> tuple[Float[Tensor, "i 2"], Float[Tensor, "b 2"]]:
    """As `grid`, without the side t = 1."""
    inside, boundary = grid(n, generator)
    return inside, boundary[boundary[:, 1] < 1]


def cube(n: int, generator: torch.Generator) -> tuple[Float[Tensor, "i 5"], Float[Tensor, "b 5"]]:
    """8n²/9 random points in the unit cube of five dimensions, and 2n²/9 on its faces."""
    count = 2 * n * n // 9
    inside = torch.rand(4 * count, 5, generator=generator, dtype=torch.float64)
    boundary = torch.rand(count, 5, generator=generator, dtype=torch.float64)
    face = torch.randint(0, 5, (count,), generator=generator)
    boundary[torch.arange(count), face] = torch.randint(0, 2, (count,), generator=generator).double()
    return inside, boundary


def product_of_sines(x: Float[Tensor, "n 2"]) -> Float[Tensor, "n 1"]:
    """Sin πx sin πy."""
    return torch.sin(math.pi * x).prod(1, keepdim=True)


def sum_of_cosines(x: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
    """Σ cos πx_k."""
    return torch.cos(math.pi * x).sum(1, keepdim=True)


def cooling(x: Float[Tensor, "n 2"]) -> Float[Tensor, "n 1"]:
    """Exp(−π²t/4) sin πx, of points (x, t)."""
    return torch.exp(-(math.pi**2) / 4 * x[:, 1:]) * torch.sin(math.pi * x[:, :1])


def cylindrical_wave(x: Float[Tensor, "n 2"]) -> Float[Tensor, "n 1"]:
    """Y₀(k r), r the distance from (−¼, −¼)."""
    return torch.special.bessel_y0(K * (x + 0.25).norm(dim=1, keepdim=True))


EQUATIONS = {
    "Poisson, 2-D": Equation(
        lambda: mlp(2, 64, 1),
        product_of_sines,
        grid,
        lambda net, x, b: {
            "interior": pde.laplacian(net, x) + 2 * math.pi**2 * product_of_sines(x),
            "boundary": net(b) - product_of_sines(b),
        },
        dimensions=2,
        seconds=6.0,
    ),
    "Poisson, 5-D": Equation(
        lambda: mlp(5, 64, 64, 48, 48, 1),
        sum_of_cosines,
        cube,
        lambda net, x, b: {
            "interior": pde.laplacian(net, x) + math.pi**2 * sum_of_cosines(x),
            "boundary": net(b) - sum_of_cosines(b),
        },
        dimensions=5,
        seconds=12.0,
        fresh=True,
    ),
    "heat": Equation(
        lambda: mlp(2, 64, 1),
        cooling,
        initial_and_ends,
        lambda net, x, b: {
            "interior": pde.heat(net, x, diffusivity=0.25),
            "boundary": net(b) - cooling(b),
        },
        dimensions=2,
        seconds=6.0,
    ),
    "Helmholtz, k = 20": Equation(
        lambda: waves(128),
        cylindrical_wave,
        grid,
        lambda net, x, b: {
            "interior": pde.helmholtz(net, x, K) / K**2,
            "boundary": net(b) - cylindrical_wave(b),
        },
        dimensions=2,
        seconds=6.0,
    ),
}


def equation_problem(name: str, key: str, title: str, target: float, side: int = SIDE) -> ResidualProblem:
    """The problem that an equation of `EQUATIONS` is in a race."""
    equation = EQUATIONS[key]
    return ResidualProblem(
        name=name, title=title, make_model=lambda seed: equation.net(), measure="relative L2 error",
        residuals=lambda net, points: equation.residuals(net, *points), error=equation.error,
        points=lambda generator: equation.points(side, generator), fresh=equation.fresh,
        target=target, seconds=2 * equation.seconds, rates={"adam": 1e-2, "adamw": 1e-2},
    )  # fmt: skip


def poisson_2d() -> ResidualProblem:
    """Poisson's equation on a square, by a network 2-64-1 in float64."""
    return equation_problem(
        "poisson-2d", "Poisson, 2-D", "a 2-64-1 network solves Poisson’s equation on a square", 1e-5
    )


def poisson_5d() -> ResidualProblem:
    """Poisson's equation in five dimensions, on points that are drawn anew in each step."""
    return equation_problem(
        "poisson-5d",
        "Poisson, 5-D",
        "a 5-64-64-48-48-1 network solves Poisson’s equation in five dimensions",
        1e-3,
    )


def heat() -> ResidualProblem:
    """The heat equation in one dimension and time."""
    return equation_problem("heat", "heat", "a 2-64-1 network solves the heat equation", 1e-5)


def helmholtz() -> ResidualProblem:
    """Helmholtz's equation with three waves to the side of the square."""
    return equation_problem(
        "helmholtz", "Helmholtz, k = 20", "128 sines solve Helmholtz’s equation with wave number 20", 1e-5
    )
