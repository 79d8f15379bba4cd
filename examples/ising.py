"""The ground state of the transverse-field Ising chain, by variational Monte Carlo.

    H = −J Σ σᶻᵢσᶻᵢ₊₁ − h Σ σˣᵢ    on a ring of n spins, J = 1; critical at h = 1

A network gives log ψ(s) of a configuration s ∈ {−1, 1}ⁿ. Samples of |ψ|² give the energy, which is never below the
ground state's, and natural gradient descent on it is imaginary-time evolution, projected on what the network can say:
stochastic reconfiguration (Sorella 1998), with momentum SPRING (Goldshlager et al. 2024). The nearer ψ is to an
eigenstate, the less the local energy varies from sample to sample, so that the noise goes away with the error.

What is reported is the energy of ψ itself, summed over all 2ⁿ configurations, against exact diagonalisation.

    python examples/ising.py [--all] [--plot FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import natgrad
from natgrad.lab.ising import LogPsi, energy, ground_energy, local_energies

LR, DAMPING = 0.1, 1e-3  # of natgrad's runs at every size: set by hand, with SPRING
RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # Adam's, tried with another seed than those that are reported


class Run(NamedTuple):
    """One training: relative errors of the energy along it."""

    steps: list[int]
    errors: list[float]
    seconds: list[float]
    variance: float  # of the local energy at the end, over |ψ|²


class Metropolis:
    """Chains that walk through configurations with |ψ|² as their equilibrium, all side by side.

    They go on from step to step, as |ψ|² changes little in one.
    """

    def __init__(self, chains: int, n: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.states = torch.randint(0, 2, (chains, n), generator=self.generator).double() * 2 - 1

    @torch.no_grad()
    def sample(self, log_psi: nn.Module, flips: int) -> Tensor:
        """Each chain's state [N, n] after so many trials to flip one spin."""
        states, rows = self.states, torch.arange(len(self.states))
        value = log_psi(states)
        for _ in range(flips):
            site = torch.randint(0, states.shape[1], (len(states),), generator=self.generator)
            tried = states.clone()
            tried[rows, site] *= -1
            there = log_psi(tried)
            uniform = torch.rand(len(states), dtype=states.dtype, generator=self.generator)
            taken = uniform.log() < 2 * (there - value)
            states = torch.where(taken[:, None], tried, states)
            value = torch.where(taken, there, value)
        self.states = states
        return states


Step = Callable[
    [Tensor, Tensor, Tensor], Any
]  # states [N, n], local energies [N], how often each was drawn [N]


def by_natgrad(log_psi: nn.Module, momentum: float, lr: float, damping: float) -> Step:
    """Stochastic reconfiguration; with momentum SPRING."""
    optimizer = natgrad.NaturalGradient(log_psi, metric="gram", lr=lr, damping=damping, momentum=momentum)
    return lambda s, energies, counts: optimizer.step(natgrad.reconfigure(log_psi, s, energies, counts))


def by_adam(log_psi: nn.Module, lr: float) -> Step:
    """Adam on the energy's gradient, 2⟨(E − ⟨E⟩) ∂ log ψ⟩."""
    optimizer = torch.optim.Adam(log_psi.parameters(), lr=lr)

    def step(s: Tensor, energies: Tensor, counts: Tensor) -> None:
        share = counts / counts.sum()
        optimizer.zero_grad()
        (2 * share * (energies - share @ energies) * log_psi(s)).sum().backward()
        optimizer.step()

    return step


def train(
    n: int, h: float, seed: int, chains: int, steps: int, exact: float, stepper: Callable[[nn.Module], Step]
) -> Run:
    """Variational Monte Carlo: sample, measure, step."""
    torch.manual_seed(seed)
    log_psi = LogPsi(n)
    step, walkers = stepper(log_psi), Metropolis(chains, n, seed)
    seconds, begun = 0.0, time.perf_counter()
    run = Run([], [], [], float("nan"))
    walkers.sample(log_psi, 5 * n)
    for k in range(steps + 1):
        if k % max(1, steps // 20) == 0 or k == steps:
            seconds += time.perf_counter() - begun
            mean, variance = energy(log_psi, n, h)  # for the report alone, so that its time is not counted
            run.steps.append(k)
            run.errors.append((mean - exact) / abs(exact))
            run.seconds.append(seconds)
            begun = time.perf_counter()
        if k < steps:
            # Chains that stand in one configuration are one row that counts for several.
            s, counts = walkers.sample(log_psi, n).unique(dim=0, return_counts=True)
            step(s, local_energies(log_psi, s, h), counts.double())
    return run._replace(variance=variance)


def tuned_adam(n: int, h: float, chains: int, steps: int, exact: float) -> float:
    """The learning rate after which the energy is least."""
    ends = {lr: train(n, h, 100, chains, steps, exact, lambda m, lr=lr: by_adam(m, lr)) for lr in RATES}
    return min(ends, key=lambda lr: ends[lr].errors[-1] if ends[lr].errors[-1] >= 0 else float("inf"))


def main(
    sizes: Sequence[int] = (10, 12),
    fields: Sequence[float] = (1.0,),
    seeds: Sequence[int] = (0, 1, 2),
    chains: int = 1000,
    steps: int = 80,
    plot: Path | None = None,
) -> dict[tuple[int, float, str], list[Run]]:
    """Trains by each method on each chain; returns the runs."""
    runs: dict[tuple[int, float, str], list[Run]] = {}
    print(f"{chains:,} samples a step, {steps} steps; medians of {len(seeds)} runs\n")
    print(
        f"{'n':>3}{'h':>6}{'exact energy':>16}   {'':<34}{'relative error':>15}{'variance':>11}{'seconds':>9}"
    )
    for n in sizes:
        for h in fields:
            exact = ground_energy(n, h)
            rate = tuned_adam(n, h, chains, steps, exact)
            methods: dict[str, Callable[[nn.Module], Step]] = {
                "SPRING": lambda m: by_natgrad(m, momentum=0.9, lr=LR, damping=DAMPING),
                "stochastic reconfiguration": lambda m: by_natgrad(m, momentum=0.0, lr=LR, damping=DAMPING),
                "Adam": lambda m, rate=rate: by_adam(m, rate),
            }
            for name, stepper in methods.items():
                found = [train(n, h, seed, chains, steps, exact, stepper) for seed in seeds]
                runs[n, h, name] = found
                error, variance, seconds = (
                    statistics.median(values)
                    for values in zip(
                        *((r.errors[-1], r.variance, r.seconds[-1]) for r in found), strict=True
                    )
                )
                label = f"{name} @ {rate:g}" if name == "Adam" else name
                print(
                    f"{n:>3}{h:>6}{exact:>16.10f}   {label:<34}{error:>15.1e}{variance:>11.1e}{seconds:>9.1f}"
                )
    if plot:
        draw(runs, plot)
    return runs


def draw(runs: dict[tuple[int, float, str], list[Run]], path: Path) -> None:
    """The error along training: medians over seeds, with their range as a band."""
    from matplotlib.figure import Figure

    from natgrad.lab.figures import styled

    chains = sorted({(n, h) for n, h, _ in runs})
    looks = {"SPRING": ("#D55E00", "-"), "stochastic reconfiguration": ("#E69F00", (0, (5, 1.6))),
             "Adam": ("#0072B2", (0, (1.2, 1.4)))}  # fmt: skip
    with styled():
        figure = Figure(figsize=(max(4.4, 3.1 * len(chains)), 3.8), layout="constrained")
        for axes, (n, h) in zip(
            figure.subplots(1, len(chains), squeeze=False, sharey=True)[0], chains, strict=True
        ):
            for name, (colour, dash) in looks.items():
                found = runs[n, h, name]
                errors = torch.tensor([r.errors for r in found], dtype=torch.float64)
                low, middle, high = errors.amin(0), errors.median(0).values, errors.amax(0)
                axes.fill_between(found[0].steps, low, high, color=colour, alpha=0.15, linewidth=0)
                axes.plot(found[0].steps, middle, color=colour, linestyle=dash, linewidth=2, label=name)
            axes.set_yscale("log")
            axes.set_title(f"{n} spins, h = {h:g}")
            axes.set_xlabel("step")
        figure.axes[0].set_ylabel("relative error of the energy")
        figure.axes[0].legend(loc="lower left")
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="the transverse-field Ising chain by variational Monte Carlo"
    )
    parser.add_argument("--all", action="store_true", help="10, 12, 14 and 16 spins, and not 10 and 12 alone")
    parser.add_argument("--fields", type=float, nargs="+", default=[1.0], help="h, where J = 1")
    parser.add_argument("--plot", type=Path, help="draw the errors into this file")
    arguments = parser.parse_args()
    main((10, 12, 14, 16) if arguments.all else (10, 12), arguments.fields, plot=arguments.plot)
