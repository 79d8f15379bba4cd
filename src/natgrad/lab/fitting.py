"""Curves and lines to fit: NIST's nonlinear problems, two of Moré, Garbow & Hillstrom's, and linear regression.

Five problems of NIST's StRD (https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml), each from both its starts, and
two of Moré, Garbow & Hillstrom 1981. An error is the largest relative one of any parameter, absolute where the solution
is 0. Linear regression has Gaussian noise; its error is taken against a solution in 60 digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from natgrad.lab.extras import require
from natgrad.lab.problem import ResidualProblem

N, P, NOISE = 200, 20, 0.1


class Fit(NamedTuple):
    """Residuals of parameters b [k], starts, and the solution to the digits that are certified."""

    residuals: Callable[[Tensor], Tensor]
    starts: Sequence[Sequence[float]]
    solution: Sequence[float]

    def error(self, b: Tensor) -> float:
        """The largest relative error; absolute where the solution is 0."""
        exact = tensor(self.solution)
        return float(((b - exact).abs() / torch.where(exact == 0, 1.0, exact.abs())).max())

    def in_logarithms(self) -> Fit:
        """The same with b = exp c, for positive parameters."""
        starts = [[math.log(v) for v in start] for start in self.starts]
        return Fit(lambda c: self.residuals(c.exp()), starts, [math.log(v) for v in self.solution])


class Parameters(nn.Module):
    """B, and the residuals that it leaves."""

    def __init__(self, fit: Fit, start: Sequence[float]) -> None:
        super().__init__()
        self.b = nn.Parameter(tensor(start))
        self.fit = fit

    def forward(self) -> Tensor:
        """The residuals [N]."""
        return self.fit.residuals(self.b)


def regression(condition: float, seed: int) -> tuple[Tensor, Tensor]:
    """X [N, P] with singular values evenly spread in the logarithm, and y = Xθ + 0.1 ε."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left, right = torch.linalg.qr(normal(N, P)).Q, torch.linalg.qr(normal(P, P)).Q
    values = torch.logspace(0, -math.log10(condition), P, dtype=torch.float64)
    X = math.sqrt(N) * (left * values) @ right.mT
    return X, X @ normal(P, 1) + NOISE * normal(N, 1)


def solution(X: Tensor, y: Tensor) -> Tensor:
    """The least-squares solution of these very numbers, from the normal equations in 60 digits."""
    mpmath = require("mpmath", "the exact solution")
    with mpmath.workdps(60):
        A, b = mpmath.matrix(X.tolist()), mpmath.matrix(y.tolist())
        exact = mpmath.cholesky_solve(A.T * A, A.T * b)
        return tensor([float(v) for v in exact])[:, None]


def tensor(values: Sequence[float]) -> Tensor:
    """In float64."""
    return torch.tensor(values, dtype=torch.float64)


def numbers(text: str) -> Tensor:
    """The numbers of a text."""
    return tensor([float(word) for word in text.split()])


def fits() -> dict[str, Fit]:
    """By name. Data, starts and certified values: NIST StRD; the last two: Moré, Garbow & Hillstrom 1981."""
    mgh09, mgh10 = kowalik_osborne(), thermistor()
    return {
        "Misra1a": misra1a(),
        "BoxBOD": boxbod(),
        "Thurber": thurber(),
        "MGH09": mgh09,
        "MGH10": mgh10,
        "MGH09, log b": mgh09.in_logarithms(),
        "MGH10, log b": mgh10.in_logarithms(),
        "Rosenbrock": Fit(
            lambda b: torch.stack([10 * (b[1] - b[0] ** 2), 1 - b[0]]), [[-1.2, 1.0]], [1.0, 1.0]
        ),
        "Powell, singular": Fit(powell, [[3.0, -1.0, 0.0, 1.0]], [0.0] * 4),
    }


def powell(b: Tensor) -> Tensor:
    """J has rank 2 at the solution."""
    rest = [(b[1] - 2 * b[2]) ** 2, math.sqrt(10) * (b[0] - b[3]) ** 2]
    return torch.stack([b[0] + 10 * b[1], math.sqrt(5) * (b[2] - b[3]), *rest])


def misra1a() -> Fit:
    """Y = b₁ (1 − exp(−b₂ x)): monomolecular adsorption."""
    x = numbers("77.6 114.9 141.1 190.8 239.9 289.0 332.8 378.4 434.8 477.3 536.8 593.1 689.1 760.0")
    y = numbers("10.07 14.73 17.94 23.93 29.61 35.18 40.02 44.82 50.76 55.05 61.01 66.40 75.47 81.78")
    return Fit(
        lambda b: b[0] * (1 - torch.exp(-b[1] * x)) - y,
        [[500.0, 0.0001], [250.0, 0.0005]],
        [2.3894212918e02, 5.5015643181e-04],
    )


def boxbod() -> Fit:
    """The same curve of biochemical oxygen demand, six points."""
    x, y = numbers("1 2 3 5 7 10"), numbers("109 149 149 191 213 224")
    return Fit(
        lambda b: b[0] * (1 - torch.exp(-b[1] * x)) - y,
        [[1.0, 1.0], [100.0, 0.75]],
        [2.1380940889e02, 5.4723748542e-01],
    )


def thurber() -> Fit:
    """A quotient of cubics: electron mobility in semiconductors."""
    x = numbers("""-3.067 -2.981 -2.921 -2.912 -2.840 -2.797 -2.702 -2.699 -2.633 -2.481 -2.363 -2.322 -1.501 -1.460
        -1.274 -1.212 -1.100 -1.046 -0.915 -0.714 -0.566 -0.545 -0.400 -0.309 -0.109 -0.103 0.010 0.119 0.377 0.790
        0.963 1.006 1.115 1.572 1.841 2.047 2.200""")
    y = numbers("""80.574 84.248 87.264 87.195 89.076 89.608 89.868 90.101 92.405 95.854 100.696 101.060 401.672
        390.724 567.534 635.316 733.054 759.087 894.206 990.785 1090.109 1080.914 1122.643 1178.351 1260.531 1273.514
        1288.339 1327.543 1353.863 1414.509 1425.208 1421.384 1442.962 1464.350 1468.705 1447.894 1457.628""")

    def residuals(b: Tensor) -> Tensor:
        above = b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3
        return above / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3) - y

    return Fit(
        residuals,
        [[1000.0, 1000.0, 400.0, 40.0, 0.7, 0.3, 0.03], [1300.0, 1500.0, 500.0, 75.0, 1.0, 0.4, 0.05]],
        [1.2881396800e03, 1.4910792535e03, 5.8323836877e02, 7.5416644291e01, 9.6629502864e-01, 3.9797285797e-01,
         4.9727297349e-02],
    )  # fmt: skip


def kowalik_osborne() -> Fit:
    """Y = b₁ (x² + b₂ x) / (x² + b₃ x + b₄): an enzyme's reaction."""
    x = numbers("4 2 1 0.5 0.25 0.167 0.125 0.1 0.0833 0.0714 0.0625")
    y = numbers("0.1957 0.1947 0.1735 0.16 0.0844 0.0627 0.0456 0.0342 0.0323 0.0235 0.0246")
    return Fit(
        lambda b: b[0] * (x**2 + b[1] * x) / (x**2 + b[2] * x + b[3]) - y,
        [[25.0, 39.0, 41.5, 39.0], [0.25, 0.39, 0.415, 0.39]],
        [1.9280693458e-01, 1.9128232873e-01, 1.2305650693e-01, 1.3606233068e-01],
    )


def thermistor() -> Fit:
    """Y = b₁ exp(b₂ / (x + b₃)): resistance by temperature."""
    x = torch.arange(50, 130, 5, dtype=torch.float64)
    y = numbers("34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820 3307 2872")
    return Fit(
        lambda b: b[0] * torch.exp(b[1] / (x + b[2])) - y,
        [[2.0, 400000.0, 25000.0], [0.02, 4000.0, 250.0]],
        [5.6096364710e-03, 6.1813463463e03, 3.4522363462e02],
    )


# ------------------------------------------------------------------------------------------------ problems


def fit_problem(name: str, title: str, fit: Fit) -> ResidualProblem:
    """The problem that a fit is in a race: seeds 0 and 1 are its starts, others start within 10 % of the last."""

    def make_model(seed: int) -> nn.Module:
        start = tensor(fit.starts[min(seed, len(fit.starts) - 1)])
        if seed >= len(fit.starts):
            generator = torch.Generator().manual_seed(seed)
            start = start * (0.9 + 0.2 * torch.rand(len(start), generator=generator, dtype=start.dtype))
        return Parameters(fit, start.tolist())

    def error(model: nn.Module) -> float:
        return fit.error(next(model.parameters()).detach())

    return ResidualProblem(
        name=name, title=title, make_model=make_model,
        residuals=lambda model, points: {"fit": model()}, error=error,
        target=1e-6, seconds=2.0, evaluate_every=5, rates={"adam": 1.0, "adamw": 1.0},
    )  # fmt: skip


def nist_misra1a() -> ResidualProblem:
    """NIST's Misra1a: an exponential, two parameters six decades apart."""
    return fit_problem("misra1a", "b₁ (1 − exp(−b₂ x)) is fitted to NIST’s Misra1a", misra1a())


def nist_boxbod() -> ResidualProblem:
    """NIST's BoxBOD: the same curve through six scattered points, from a start on a plateau."""
    return fit_problem("boxbod", "b₁ (1 − exp(−b₂ x)) is fitted to NIST’s BoxBOD", boxbod())


def nist_thurber() -> ResidualProblem:
    """NIST's Thurber: a quotient of cubics, seven parameters."""
    return fit_problem("thurber", "a quotient of cubics is fitted to NIST’s Thurber", thurber())


def nist_mgh09() -> ResidualProblem:
    """NIST's MGH09: an enzyme's reaction, four positive parameters, in their logarithms."""
    fit = kowalik_osborne().in_logarithms()
    return fit_problem("mgh09", "a quotient of quadratics is fitted to NIST’s MGH09", fit)


def nist_mgh10() -> ResidualProblem:
    """NIST's MGH10: a thermistor, three positive parameters, in their logarithms."""
    fit = thermistor().in_logarithms()
    return fit_problem("mgh10", "b₁ exp(b₂ / (x + b₃)) is fitted to NIST’s MGH10", fit)


def linear_gaussian() -> ResidualProblem:
    """Linear regression with Gaussian noise, 20 weights, J of condition number 10⁴: one natural step solves it."""
    X, y = regression(1e4, 0)
    exact = solution(X, y)

    def error(model: nn.Module) -> float:
        return float((next(model.parameters()).detach().mT - exact).norm() / exact.norm())

    return ResidualProblem(
        name="linear-gaussian", title="linear regression with 20 weights and a condition number of 10⁴",
        make_model=lambda seed: nn.Linear(P, 1, bias=False, dtype=X.dtype),
        residuals=lambda model, points: {"data": model(X) - y}, error=error,
        target=1e-5, seconds=2.0, evaluate_every=5, rates={"adam": 0.1, "adamw": 0.1},
    )  # fmt: skip
