"""CartPole by natural policy gradient with a trust region, against the plain policy gradient with Adam.

All learners are given the same: 4,000 steps of CartPole-v1 from the present policy at a time, eight copies of 500, and
the advantages of the actions in them (generalised advantage estimation, Schulman et al. 2016, arXiv 1506.02438, with
values that are linear in products of the observation). One takes the step of `natgrad.TrustRegion`; the others take a
step of Adam, at each learning rate of a grid. Each is run with λ = 0.95, which leans on the values, and with λ = 1,
which leans on the rewards alone. The task is solved when 100 episodes that nobody trains on bring 475 of 500 on
average.

    python examples/policy.py [--plot FILE]

`natgrad race cartpole` runs the same problem.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import natgrad
from natgrad.lab.cartpole import LONGEST, SOLVED, CartPole, cartpole

LAMBDAS = (0.95, 1.0)
RATES = (0.01, 0.02, 0.05, 0.1)
OURS = "natural gradient"

Update = Callable[[Any], Any]  # what a policy's own steps in the environment are drawn with
Learner = Callable[[nn.Module, CartPole], Update]


class Run(NamedTuple):
    """What one learner did on one seed."""

    samples: list[int]  # steps of the environment, after each batch
    returns: list[float]  # the mean return of 100 episodes
    solved: float  # how many samples it took; infinite where it never was


def main(
    seeds: Sequence[int] = (4, 5, 6, 7, 8),
    samples: int = 150_000,
    rates: Sequence[float] = RATES,
    lambdas: Sequence[float] = LAMBDAS,
    plot: Path | None = None,
) -> dict[tuple[str, float], list[Run]]:
    """Trains both and prints the table; returns the runs by learner and λ."""
    problem = cartpole()
    learners: dict[str, Learner] = {OURS: trust_region} | {f"Adam, {rate:g}": adam(rate) for rate in rates}
    print(f"samples until {SOLVED:.0f} of {LONGEST} on average over 100 episodes, of at most {samples:,}\n")
    print(f"{'':<18}{'λ':>6}{'median':>10}   {'each seed':<42}{'return at the end':>18}")
    runs: dict[tuple[str, float], list[Run]] = {}
    for name, learner in learners.items():
        for weight in lambdas:
            variant = replace(problem, weight=weight)
            found = runs[name, weight] = [run(variant, learner, seed, samples) for seed in seeds]
            each = ", ".join(count(r.solved) for r in found)
            last = statistics.median(r.returns[-1] for r in found)
            print(f"{name:<18}{weight:>6g}{count(median(found)):>10}   {each:<42}{last:>18.1f}", flush=True)
    if plot:
        draw(runs, samples, plot)
    return runs


def median(runs: Sequence[Run]) -> float:
    """Of the samples that it took to solve the task."""
    return statistics.median(run.solved for run in runs)


def trust_region(model: nn.Module, problem: CartPole) -> Update:
    """The natural policy gradient."""
    optimizer = natgrad.NaturalGradient(
        model, natgrad.Categorical(), metric="exact", lr=natgrad.TrustRegion(kl=0.02), damping=1e-2
    )
    return lambda batch: optimizer.step(problem.residuals_of(model, batch))


def adam(rate: float) -> Learner:
    """The plain policy gradient."""

    def learner(model: nn.Module, problem: CartPole) -> Update:
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)

        def update(batch: Any) -> None:
            optimizer.zero_grad()
            problem.loss(model, None, batch).backward()
            optimizer.step()

        return update

    return learner


def run(problem: CartPole, learner: Learner, seed: int, samples: int) -> Run:
    """One learner on one seed, until so many samples are used up."""
    model = problem.build(seed)
    update, curve = learner(model, problem), Run([], [], float("inf"))
    each = problem.examples_a_step
    for used, batch in zip(range(each, samples + 1, each), problem.batches(each, seed), strict=False):
        update(batch)
        curve.samples.append(used)
        curve.returns.append(LONGEST - problem.judge(model)["excess"])
        if curve.returns[-1] >= SOLVED:
            curve = curve._replace(solved=min(curve.solved, used))
    return curve


def count(samples: float) -> str:
    """A number of samples, or a dash."""
    return f"{samples:,}" if samples < float("inf") else "–"


def draw(runs: dict[tuple[str, float], list[Run]], samples: int, path: Path) -> None:
    """Returns against samples: ours and Adam at every rate, each at its better λ; the median runs, and all of ours."""
    from matplotlib.figure import Figure

    from natgrad.lab.figures import FAINT, styled

    def score(key: tuple[str, float]) -> tuple[float, float]:
        return median(runs[key]), -statistics.median(r.returns[-1] for r in runs[key])

    best = [
        min((key for key in runs if key[0] == name), key=score) for name in dict.fromkeys(n for n, _ in runs)
    ]
    shades = iter(("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#7A7A7A"))
    with styled():
        figure = Figure(figsize=(7.2, 4.7), layout="constrained")
        axes = figure.subplots()
        for key in reversed(best):
            ours = key[0] == OURS
            colour = "#D55E00" if ours else next(shades)
            ordered = sorted(runs[key], key=lambda r: (r.solved, -r.returns[-1]))
            for run_ in ordered:
                if ours:
                    axes.plot(run_.samples, run_.returns, color=colour, linewidth=0.9, alpha=0.45)
            middle = ordered[len(ordered) // 2]
            axes.plot(middle.samples, middle.returns, color=colour, linewidth=2.8 if ours else 1.7,
                      label=f"{key[0]} (λ = {key[1]:g})")  # fmt: skip
        axes.axhline(SOLVED, color=FAINT, linewidth=0.9, dashes=(4, 3), zorder=0)
        axes.set_xlim(0, samples)
        axes.set_ylim(0, 1.02 * LONGEST)
        axes.set_xlabel("steps of the environment")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylabel("return, mean of 100 episodes")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=3)
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="CartPole by natural policy gradient")
    parser.add_argument("--plot", type=Path, help="draw the learning curves into this file")
    main(plot=parser.parse_args().plot)
