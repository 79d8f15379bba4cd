"""Four differential equations, solved by networks: exact natural gradients against K-FAC, Adam and L-BFGS.

    Poisson in two dimensions    −Δu = f                        u = sin πx sin πy
    Poisson in five              −Δu = f                        u = Σ cos πx_k; points drawn anew in each step
    heat                         u_t = ¼ u_xx                   u = exp(−π²t/4) sin πx; x and t from 0 to 1
    Helmholtz                    Δu + k² u = 0, with k = 20     u = Y₀(k r): a wave from a source outside the square

Residuals are the equation's at points inside and the error at points of the boundary, so that the loss is a sum of
squares and its Gauss–Newton matrix a Fisher information. Along the exact natural gradient the length of a step is
natgrad's own, that of energy natural gradient descent (ENGD, Müller & Zeinhofer 2023) with its line search, or SPRING's
(Goldshlager et al. 2024) with momentum; K-FAC has ENGD's line search, as Dangel et al. 2024 have it. All methods start
from the same network, take the same residuals, and have equally long. What is reported is the relative L2 error of u at
points that none of them is trained on.

    python examples/equations.py [--seconds S] [--plot FILE]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import natgrad
from natgrad.lab.equations import EQUATIONS, SIDE, Equation
from natgrad.lab.problem import sum_of_squares

RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # Adam's, each tried for a part of the seconds from another network
PART = 0.25
# The paper's lengths go down to 2⁻³⁰; each costs a loss, and below 2⁻¹² nothing was won but a little in 5-D.
LINE = natgrad.GridSearch(finest=12)
# All points, no sampled signals, and half of the last step's factors: with the default, 0.95, it was slower.
FACTORS = natgrad.KFAC(kind="exact", examples=None, decay=0.5, factors=1, inverses=1)
Residuals = dict[str, Tensor]


class Run(NamedTuple):
    """One training: relative L2 errors along it."""

    seconds: list[float]
    errors: list[float]
    steps: int


Closure = Callable[[], Residuals]
Step = Callable[[Closure, float], Any]  # the residuals, and which share of the time is over


def by_natgrad(net: nn.Module, **settings: Any) -> Step:
    """A natural gradient method; with no settings but the metric it has no learning rate."""
    optimizer = natgrad.NaturalGradient(net, **settings)
    return lambda closure, share: optimizer.step(closure)


def by_adam(net: nn.Module, lr: float) -> Step:
    """Adam; its rate falls to zero along a cosine."""
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)

    def step(closure: Closure, share: float) -> None:
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        optimizer.zero_grad()
        sum_of_squares(closure()).backward()
        optimizer.step()

    return step


def by_lbfgs(net: nn.Module) -> Step:
    """L-BFGS with 20 iterations a step, so that points that are drawn anew stay for 20."""
    optimizer = torch.optim.LBFGS(
        net.parameters(),
        history_size=100,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def step(closure: Closure, share: float) -> None:
        def value() -> Tensor:
            optimizer.zero_grad()
            found = sum_of_squares(closure())
            found.backward()
            return found

        optimizer.step(value)

    return step


def train(
    equation: Equation,
    stepper: Callable[[nn.Module], Step],
    seconds: float,
    seed: int,
    n: int,
    most: float = math.inf,
) -> Run:
    """Steps until the seconds are over, or `most` steps; the seconds of measuring the error don't count."""
    torch.manual_seed(seed)
    net, generator = equation.net(), torch.Generator().manual_seed(seed)
    x, b = equation.points(n, generator)
    step, spent, steps = stepper(net), 0.0, 0
    run = Run([0.0], [equation.error(net)], 0)
    while spent < seconds and steps < most:
        begun = time.perf_counter()
        if equation.fresh:
            x, b = equation.points(n, generator)
        step(lambda x=x, b=b: equation.residuals(net, x, b), spent / seconds)
        spent, steps = spent + time.perf_counter() - begun, steps + 1
        if spent - run.seconds[-1] > seconds / 200 or spent >= seconds or steps == most:
            run.seconds.append(spent)
            run.errors.append(equation.error(net))
    return run._replace(steps=steps)


def tuned_adam(equation: Equation, seconds: float, n: int, rates: Sequence[float]) -> float:
    """The rate after which the error is least."""
    ends = {
        lr: train(equation, lambda net, lr=lr: by_adam(net, lr), seconds, 100, n).errors[-1] for lr in rates
    }
    return min(ends, key=lambda lr: ends[lr] if math.isfinite(ends[lr]) else math.inf)


def main(
    names: Sequence[str] = tuple(EQUATIONS),
    seconds: float | None = None,
    seed: int = 0,
    n: int = SIDE,
    rates: Sequence[float] = RATES,
    plot: Path | None = None,
) -> dict[tuple[str, str], Run]:
    """Solves each equation by each method; returns the runs by equation and method."""
    runs: dict[tuple[str, str], Run] = {}
    print(f"{'':<20}{'':<28}{'seconds':>8}{'relative L2 error':>20}{'steps':>8}")
    for name in names:
        equation = EQUATIONS[name]
        allowed = equation.seconds if seconds is None else seconds
        rate = tuned_adam(equation, PART * allowed, n, rates)
        # Where points are drawn anew, SPRING is the default.
        plain = {"lr": natgrad.AdaptiveSPRING(momentum=0.0)} if equation.fresh else {}
        methods: dict[str, Callable[[nn.Module], Step]] = {
            "exact natural gradient": lambda net, plain=plain: by_natgrad(net, metric="exact", **plain),
            "ENGD": lambda net: by_natgrad(net, metric="exact", lr=LINE, damping=natgrad.NoiseFloor(1e4)),
            "SPRING": lambda net: by_natgrad(net, metric="exact", lr=natgrad.AdaptiveSPRING()),
            "K-FAC": lambda net: by_natgrad(net, metric=FACTORS, lr=LINE, damping=1e-4),
            "Adam": lambda net, rate=rate: by_adam(net, rate),
            "L-BFGS": by_lbfgs,
        }
        for method, stepper in methods.items():
            run = runs[name, method] = train(equation, stepper, allowed, seed, n)
            label = f"{method} @ {rate:g}" if method == "Adam" else method
            print(
                f"{name:<20}{label:<28}{run.seconds[-1]:>8.1f}{run.errors[-1]:>20.1e}{run.steps:>8}",
                flush=True,
            )
    if plot:
        draw(runs, plot)
    return runs


def draw(runs: dict[tuple[str, str], Run], path: Path) -> None:
    """The error against seconds, a panel for each equation."""
    from matplotlib.figure import Figure

    from natgrad.lab.figures import styled

    names = list(dict.fromkeys(name for name, _ in runs))
    looks = {"exact natural gradient": ("#D55E00", "-"), "ENGD": ("#CC79A7", (0, (8, 1.4))),
             "SPRING": ("#E69F00", (0, (5, 1.6))),
             "K-FAC": ("#009E73", (0, (3, 1.4, 1, 1.4))), "Adam": ("#0072B2", (0, (1.2, 1.4))),
             "L-BFGS": ("#555555", (0, (7, 1.4, 1, 1.4)))}  # fmt: skip
    with styled():
        rows = math.ceil(len(names) / 2)
        figure = Figure(figsize=(7.6, 0.8 + 2.8 * rows), layout="constrained")
        panels = figure.subplots(rows, 2, squeeze=False)
        for axes in panels.flat[len(names) :]:
            axes.set_visible(False)
        for axes, name in zip(panels.flat, names, strict=False):
            for method, (colour, dash) in looks.items():
                run = runs[name, method]
                axes.plot(run.seconds, run.errors, color=colour, linestyle=dash, linewidth=1.8, label=method)
            axes.set_yscale("log")
            axes.set_title(name)
            axes.set_xlabel("seconds")
        for axes in panels[:, 0]:
            axes.set_ylabel("relative L2 error")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="four differential equations by natural gradients")
    parser.add_argument("--seconds", type=float, help="of each method; by default 6, in 5-D 12")
    parser.add_argument("--plot", type=Path, help="draw the errors into this file")
    arguments = parser.parse_args()
    main(seconds=arguments.seconds, plot=arguments.plot)
