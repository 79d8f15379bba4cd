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
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import natgrad
from natgrad.lab.extras import require
from natgrad.lab.fitting import Fit, Parameters, fits, regression, solution, tensor

DIGITS = 6
METRICS = ("rectangular", "gram", "dense")


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
    for name, fit in fits().items():
        if names is not None and name not in names:
            continue
        for k, start in enumerate(fit.starts):
            both = {"natgrad": by_natgrad(fit, start), "scipy": by_scipy(fit, start)}
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


def by_natgrad(fit: Fit, start: Sequence[float], most: int = 200) -> Run:
    """Steps until one lowers the loss no more."""
    model = Parameters(fit, start)
    optimizer = natgrad.NaturalGradient(model, metric="exact")
    evaluations = 0

    def residuals() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return model()

    errors, counts = [fit.error(model.b.detach())], [1]
    for _ in range(most):
        optimizer.step(residuals)
        if optimizer.info.stalled:
            break
        errors.append(fit.error(model.b.detach()))
        counts.append(evaluations)
    return Run(errors, counts, float(model().detach().square().sum()))


def by_scipy(fit: Fit, start: Sequence[float]) -> Run:
    """MINPACK's Levenberg–Marquardt; an iteration is a Jacobian. What is asked for twice at one point counts once."""
    evaluated: set[bytes] = set()
    seen: dict[bytes, tuple[float, int]] = {}

    def residuals(b):
        evaluated.add(b.tobytes())
        return fit.residuals(torch.as_tensor(b)).numpy()

    def jacobian(b):
        seen.setdefault(b.tobytes(), (fit.error(torch.as_tensor(b)), len(evaluated)))
        return torch.func.jacrev(fit.residuals)(torch.as_tensor(b)).numpy()

    least_squares = require("scipy.optimize", "the comparison").least_squares
    found = least_squares(
        residuals, list(start), jacobian, method="lm", xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=5000
    )
    last = fit.error(torch.as_tensor(found.x)), len(evaluated)
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
