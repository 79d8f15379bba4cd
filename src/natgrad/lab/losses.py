"""The losses of natgrad's steps beside those of the best peer of a grid: told in two lines, and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from natgrad.lab.extras import require
from natgrad.lab.figures import styled


def compare(
    ours: Sequence[float],
    theirs: Mapping[str, Sequence[float]],
    count: int,
    period: str,
    unit: str = "nats",
    plot: Path | None = None,
) -> tuple[dict[str, Sequence[float]], str]:
    """The losses of natgrad and of the peer whose last ones have the least mean.

    Args:
        ours: the loss of every step.
        theirs: the same of each peer, by its label.
        count: of how many steps the mean is taken.
        period: what these are called, such as ``"last epoch"``.
        unit: of the losses.
        plot: where to draw the losses of every step.

    Returns:
        The losses of both, by label; and a line for each, with the mean of the last ones.
    """

    def mean(losses: Sequence[float]) -> float:
        return sum(losses[-count:]) / len(losses[-count:])

    best = min(theirs, key=lambda label: mean(theirs[label]))
    found = {"natgrad, no learning rate": ours, best: theirs[best]}
    if plot is not None:
        _draw(found, unit, plot)
    lines = [f"{label:<28}loss of the {period}: {mean(losses):.4f}" for label, losses in found.items()]
    return found, "\n".join(lines)


def _draw(runs: Mapping[str, Sequence[float]], unit: str, path: Path) -> None:
    with styled():
        figure = require("matplotlib.figure", "figures").Figure(figsize=(5.2, 3.6), layout="constrained")
        axes = figure.subplots()
        for (label, losses), colour in zip(runs.items(), ("#0072B2", "#D55E00"), strict=True):
            axes.semilogy(range(1, len(losses) + 1), losses, color=colour, linewidth=1.6, label=label)
        axes.set_xlabel("step")
        axes.set_ylabel(f"training loss, {unit}")
        axes.legend()
        figure.savefig(path, dpi=150)
