"""Nonlinear least squares on NIST's and Moré's test problems, and linear regression in one step.

Five problems of NIST's StRD (https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml), each from both its starts, and
two of Moré, Garbow & Hillstrom 1981. natgrad's exact step, with nothing set, against MINPACK's Levenberg–Marquardt with
scipy's defaults: it scales the columns of J, which natgrad does not. An error is the largest relative one of any
parameter, absolute where the solution is 0; digits are −log₁₀ of it.

Linear regression with Gaussian noise is solved in one step of length 1 without damping. Its error is taken against a
solution in 60 digits, for condition numbers of J from 1 to 10¹².

    python examples/fitting.py [--plot FILE]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import natgrad
from natgrad.lab.extras import require

DIGITS = 6
METRICS = ("rectangular", "gram", "dense")
N, P, NOISE = 200, 20, 0.1


class Problem(NamedTuple):
    """Residuals of parameters b [k], starts, and the solution to the digits that are certified."""

    residuals: Callable[[Tensor], Tensor]
    starts: Sequence[Sequence[float]]
    solution: Sequence[float]

    def error(self, b: Tensor) -> float:
        """The largest relative error; absolute where the solution is 0."""
        exact = tensor(self.solution)
        return float(((b - exact).abs() / torch.where(exact == 0, 1.0, exact.abs())).max())

    def in_logarithms(self) -> Problem:
        """The same with b = exp c, for positive parameters."""
        starts = [[math.log(v) for v in start] for start in self.starts]
        return Problem(lambda c: self.residuals(c.exp()), starts, [math.log(v) for v in self.solution])


class Run(NamedTuple):
    """The error at the start and after each iteration, and how often the residuals had been evaluated by then."""

    errors: list[float]
    evaluations: list[int]
    squares: float  # Σ r² at the end

    @property
    def digits(self) -> float:
        """Of the parameter with the fewest, at the end."""
        return -math.log10(max(self.errors[-1], 1e-16))

    def reached(self) -> tuple[int, int] | None:
        """Iterations and evaluations until there are 6 digits."""
        for k, error in enumerate(self.errors):
            if error < 10**-DIGITS:
                return k, self.evaluations[k]
        return None


class Parameters(nn.Module):
    """B, and the residuals that it leaves."""

    def __init__(self, problem: Problem, start: Sequence[float]) -> None:
        super().__init__()
        self.b = nn.Parameter(tensor(start))
        self.problem = problem

    def forward(self) -> Tensor:
        """The residuals [N]."""
        return self.problem.residuals(self.b)


def main(
    names: Sequence[str] | None = None,
    conditions: Sequence[float] = tuple(10.0**k for k in range(13)),
    seeds: Sequence[int] = (0, 1, 2),
    plot: Path | None = None,
) -> tuple[dict[tuple[str, int], dict[str, Run]], dict[str, list[float]]]:
    """Runs both parts; returns runs by problem and start, and errors of one linear step by solver."""
    runs = {}
    print(f"{'':<26}{'natgrad':^32}{'scipy, lm':^32}")
    print(f"{'problem':<18}{'start':>6}  " + 2 * f"{'steps':>10}{'evaluations':>13}{'digits':>9}")
    for name, problem in problems().items():
        if names is not None and name not in names:
            continue
        for k, start in enumerate(problem.starts):
            both = {"natgrad": by_natgrad(problem, start), "scipy": by_scipy(problem, start)}
            runs[name, k + 1] = both
            print(f"{name:<18}{k + 1:>6}  " + "".join(map(row, both.values())))
    errors = regress(conditions, seeds)
    print(f"\nerror of θ after one step\n{'condition':<12}" + "".join(f"{name:>14}" for name in errors))
    for i, condition in enumerate(conditions):
        print(f"{condition:<12.0e}" + "".join(f"{column[i]:>14.1e}" for column in errors.values()))
    if plot:
        draw(runs, conditions, errors, plot)
    return runs, errors


def row(run: Run) -> str:
    """What the table says of a run."""
    reached = run.reached()
    if reached is None:
        return f"  not reached: Σ r² = {run.squares:.3e}".ljust(32)
    return f"{reached[0]:>10}{reached[1]:>13}{run.digits:>9.1f}"


def by_natgrad(problem: Problem, start: Sequence[float], most: int = 200) -> Run:
    """Steps until one lowers the loss no more."""
    model = Parameters(problem, start)
    optimizer = natgrad.NaturalGradient(model, metric="exact")
    evaluations = 0

    def residuals() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return model()

    errors, counts = [problem.error(model.b.detach())], [1]
    for _ in range(most):
        optimizer.step(residuals)
        if optimizer.info.stalled:
            break
        errors.append(problem.error(model.b.detach()))
        counts.append(evaluations)
    return Run(errors, counts, float(model().detach().square().sum()))


def by_scipy(problem: Problem, start: Sequence[float]) -> Run:
    """MINPACK's Levenberg–Marquardt; an iteration is a Jacobian. What is asked for twice at one point counts once."""
    evaluated: set[bytes] = set()
    seen: dict[bytes, tuple[float, int]] = {}

    def residuals(b):
        evaluated.add(b.tobytes())
        return problem.residuals(torch.as_tensor(b)).numpy()

    def jacobian(b):
        seen.setdefault(b.tobytes(), (problem.error(torch.as_tensor(b)), len(evaluated)))
        return torch.func.jacrev(problem.residuals)(torch.as_tensor(b)).numpy()

    least_squares = require("scipy.optimize", "the comparison").least_squares
    found = least_squares(
        residuals, list(start), jacobian, method="lm", xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=5000
    )
    last = problem.error(torch.as_tensor(found.x)), len(evaluated)
    errors, counts = zip(*seen.values(), last, strict=True)
    return Run(list(errors), list(counts), 2 * float(found.cost))


def regress(conditions: Sequence[float], seeds: Sequence[int]) -> dict[str, list[float]]:
    """‖θ − θ*‖ / ‖θ*‖ by solver and condition number, the median over seeds; NaN where a solver refuses."""
    errors: dict[str, list[float]] = {name: [] for name in (*METRICS, "lstsq")}
    for condition in conditions:
        found: dict[str, list[float]] = {name: [] for name in errors}
        for seed in seeds:
            X, y = regression(condition, seed)
            exact = solution(X, y)
            estimates = {name: one_step(X, y, name) for name in METRICS}
            estimates["lstsq"] = torch.linalg.lstsq(X, y).solution
            for name, estimate in estimates.items():
                found[name].append(float((estimate - exact).norm() / exact.norm()))
        for name, values in found.items():
            errors[name].append(float(tensor(values).median()))
    return errors


def one_step(X: Tensor, y: Tensor, metric: str) -> Tensor:
    """θ [P, 1] after one step from PyTorch's start; NaN where F is singular to rounding."""
    torch.manual_seed(0)
    model = nn.Linear(X.shape[1], 1, bias=False, dtype=X.dtype)
    optimizer = natgrad.NaturalGradient(model, metric=metric, lr=1.0, damping=0.0)
    try:
        optimizer.step(lambda: model(X) - y)
    except natgrad.NotPositiveDefiniteError:
        return torch.full_like(model.weight.detach().mT, math.nan)
    return model.weight.detach().mT


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


def problems() -> dict[str, Problem]:
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
        "Rosenbrock": Problem(
            lambda b: torch.stack([10 * (b[1] - b[0] ** 2), 1 - b[0]]), [[-1.2, 1.0]], [1.0, 1.0]
        ),
        "Powell, singular": Problem(powell, [[3.0, -1.0, 0.0, 1.0]], [0.0] * 4),
    }


def powell(b: Tensor) -> Tensor:
    """J has rank 2 at the solution."""
    rest = [(b[1] - 2 * b[2]) ** 2, math.sqrt(10) * (b[0] - b[3]) ** 2]
    return torch.stack([b[0] + 10 * b[1], math.sqrt(5) * (b[2] - b[3]), *rest])


def misra1a() -> Problem:
    """Y = b₁ (1 − exp(−b₂ x)): monomolecular adsorption."""
    x = numbers("77.6 114.9 141.1 190.8 239.9 289.0 332.8 378.4 434.8 477.3 536.8 593.1 689.1 760.0")
    y = numbers("10.07 14.73 17.94 23.93 29.61 35.18 40.02 44.82 50.76 55.05 61.01 66.40 75.47 81.78")
    return Problem(
        lambda b: b[0] * (1 - torch.exp(-b[1] * x)) - y,
        [[500.0, 0.0001], [250.0, 0.0005]],
        [2.3894212918e02, 5.5015643181e-04],
    )


def boxbod() -> Problem:
    """The same curve of biochemical oxygen demand, six points."""
    x, y = numbers("1 2 3 5 7 10"), numbers("109 149 149 191 213 224")
    return Problem(
        lambda b: b[0] * (1 - torch.exp(-b[1] * x)) - y,
        [[1.0, 1.0], [100.0, 0.75]],
        [2.1380940889e02, 5.4723748542e-01],
    )


def thurber() -> Problem:
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

    return Problem(
        residuals,
        [[1000.0, 1000.0, 400.0, 40.0, 0.7, 0.3, 0.03], [1300.0, 1500.0, 500.0, 75.0, 1.0, 0.4, 0.05]],
        [1.2881396800e03, 1.4910792535e03, 5.8323836877e02, 7.5416644291e01, 9.6629502864e-01, 3.9797285797e-01,
         4.9727297349e-02],
    )  # fmt: skip


def kowalik_osborne() -> Problem:
    """Y = b₁ (x² + b₂ x) / (x² + b₃ x + b₄): an enzyme's reaction."""
    x = numbers("4 2 1 0.5 0.25 0.167 0.125 0.1 0.0833 0.0714 0.0625")
    y = numbers("0.1957 0.1947 0.1735 0.16 0.0844 0.0627 0.0456 0.0342 0.0323 0.0235 0.0246")
    return Problem(
        lambda b: b[0] * (x**2 + b[1] * x) / (x**2 + b[2] * x + b[3]) - y,
        [[25.0, 39.0, 41.5, 39.0], [0.25, 0.39, 0.415, 0.39]],
        [1.9280693458e-01, 1.9128232873e-01, 1.2305650693e-01, 1.3606233068e-01],
    )


def thermistor() -> Problem:
    """Y = b₁ exp(b₂ / (x + b₃)): resistance by temperature."""
    x = torch.arange(50, 130, 5, dtype=torch.float64)
    y = numbers("34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820 3307 2872")
    return Problem(
        lambda b: b[0] * torch.exp(b[1] / (x + b[2])) - y,
        [[2.0, 400000.0, 25000.0], [0.02, 4000.0, 250.0]],
        [5.6096364710e-03, 6.1813463463e03, 3.4522363462e02],
    )


def draw(
    runs: dict[tuple[str, int], dict[str, Run]],
    conditions: Sequence[float],
    errors: dict[str, list[float]],
    path: Path,
) -> None:
    """Errors of three fits from the first start, by iterations and by evaluations; and of one linear step."""
    from matplotlib.figure import Figure

    from natgrad.lab.figures import styled

    colours = {"natgrad": "#D55E00", "scipy": "#0072B2"}
    shown = [name for name in ("Misra1a", "BoxBOD", "Thurber") if (name, 1) in runs]
    with styled():
        figure = Figure(figsize=(10.6, 3.9), layout="constrained")
        *panels, last = figure.subplots(1, 3)
        for axes, label in zip(panels, ("iterations", "evaluations of the residuals"), strict=True):
            for name, mark in zip(shown, ("o-", "s--", "^:"), strict=False):
                for method, colour in colours.items():
                    run = runs[name, 1][method]
                    along = range(len(run.errors)) if label == "iterations" else run.evaluations
                    axes.semilogy(along, run.errors, mark, color=colour, ms=3, linewidth=1.3,
                                  label=f"{name}, {method}")  # fmt: skip
            axes.set_xlabel(label)
            axes.set_ylim(1e-12, 1e5)
        panels[0].set_ylabel("largest relative error of a parameter")
        panels[1].legend(fontsize=7.5)
        styles = {"rectangular": ("#D55E00", "o"), "gram": ("#009E73", "s"), "dense": ("#CC79A7", "^"),
                  "lstsq": ("#0072B2", "x")}  # fmt: skip
        for name, (colour, mark) in styles.items():
            last.loglog(conditions, errors[name], mark + "-", color=colour, ms=4, linewidth=1.5,
                        label="torch.linalg.lstsq" if name == "lstsq" else f'metric="{name}"')  # fmt: skip
        last.set_ylim(1e-16, 1e5)
        last.set_xlabel("condition number of J")
        last.set_ylabel("relative error of θ after one step")
        last.legend(fontsize=7.5, loc="upper left")
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="least squares, nonlinear and linear")
    parser.add_argument("--plot", type=Path, help="draw errors into this file")
    main(plot=parser.parse_args().plot)
