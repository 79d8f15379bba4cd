"""The spectrum of F along training: what a network can still learn, and how stiff the problem is.

The eigenvalues λᵢ of the exact Fisher information are the squared speeds at which the predictions change with the
weights. Those above δ/N are directions that the data decides and not a prior of precision δ; Σ λᵢ/(λᵢ + δ/N), the
effective dimension, counts them. λ_max bounds the rate of gradient descent: 2/λ_max for F = the Gauss–Newton matrix.

    python examples/spectrum.py [--plot FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import natgrad
from natgrad.lab import data
from natgrad.lab.spectrum import spectrum_of

Optimiser = Callable[[nn.Module, nn.Module], torch.optim.Optimizer]
OPTIMISERS: dict[str, Optimiser] = {
    "natgrad": lambda model, loss_fn: natgrad.NaturalGradient(model, loss_fn),
    "Adam": lambda model, loss_fn: torch.optim.Adam(model.parameters(), lr=3e-3),
}


class Moment(NamedTuple):
    """F at one step of a run."""

    step: int
    loss: float
    values: Tensor  # eigenvalues, the largest first
    trace: float
    effective: float


def main(
    steps: Sequence[int] = (0, 1, 3, 10, 30, 100, 300), train: int = 1400, plot: Path | None = None
) -> dict[str, list[Moment]]:
    """Trains with two optimisers and returns F's spectrum at the given steps of each."""
    examples, _ = data.split(*data.small_digits(), train=train)
    runs = {name: run(make, steps, examples) for name, make in OPTIMISERS.items()}
    for name, moments in runs.items():
        print(f"{name}:\n{'step':>8}{'loss':>12}{'λ_max':>12}{'trace':>12}{'effective dimension':>22}")
        for m in moments:
            print(
                f"{m.step:>8}{m.loss:>12.2e}{float(m.values[0]):>12.3g}{m.trace:>12.3g}{m.effective:>22.1f}"
            )
    if plot:
        draw(runs, 1 / train, plot)
    return runs


def run(make: Optimiser, steps: Sequence[int], examples: tuple[Tensor, Tensor]) -> list[Moment]:
    """One run on the full batch in float64, with F measured at some of its steps."""
    inputs, targets = examples[0].double(), examples[1]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    loss_fn = nn.CrossEntropyLoss()
    optimizer = make(model, loss_fn)
    moments = []
    for step in range(max(steps) + 1):
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        if step in steps:
            F = natgrad.fisher(model, loss_fn, (inputs, targets), metric="dense")
            found = spectrum_of(F, damping=1 / len(inputs))
            moments.append(Moment(step, loss.item(), found.values, found.trace, found.effective))
        loss.backward()
        optimizer.step()
    return moments


def draw(runs: dict[str, list[Moment]], level: float, path: Path) -> None:
    """The spectra of each run, early ones light and late ones dark, λ as a line; and the effective dimension."""
    import matplotlib
    from matplotlib.figure import Figure

    from natgrad.lab.figures import FAINT, styled

    with styled():
        figure = Figure(figsize=(10.6, 3.7), layout="constrained")
        *panels, last = figure.subplots(1, len(runs) + 1)
        for axes, (name, moments) in zip(panels, runs.items(), strict=True):
            shades = matplotlib.colormaps["viridis_r"]
            for k, moment in enumerate(moments):
                values = moment.values[moment.values > 1e-9]
                axes.loglog(range(1, len(values) + 1), values, color=shades(0.1 + 0.9 * k / len(moments)),
                            linewidth=1.8, label=f"{moment.step}")  # fmt: skip
            axes.axhline(level, color=FAINT, linewidth=0.9, dashes=(4, 3))
            axes.set_ylim(1e-9, 5)
            axes.set_title(name)
            axes.set_xlabel("rank of the eigenvalue")
        panels[0].set_ylabel("eigenvalue of F, nats per parameter²")
        panels[-1].legend(title="step", loc="lower left", ncols=2)
        for (name, moments), colour in zip(runs.items(), ("#D55E00", "#0072B2"), strict=True):
            last.plot([m.step for m in moments], [m.effective for m in moments], "o-", color=colour, ms=4,
                      linewidth=2, label=name)  # fmt: skip
        last.set_xscale("symlog", linthresh=1)
        last.set_title("effective dimension")
        last.set_xlabel("step")
        last.set_ylim(bottom=0)
        last.legend()
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="the spectrum of F along training")
    parser.add_argument("--plot", type=Path, help="draw the spectra into this file")
    main(plot=parser.parse_args().plot)
