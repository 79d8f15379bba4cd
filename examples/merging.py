"""Merging two models: not the mean of their weights, but the peak of the product of their posteriors.

Two copies of one network learn different digits. Each one's posterior is taken for a Gaussian with precision Nᵢ Fᵢ
about its weights θᵢ. The weights most probable under both, with a little prior λ about where both began, θ₀, are
(Matena & Raffel 2022, arXiv 2111.09832, for a diagonal F)

    θ = θ₀ + (Σ wᵢ Fᵢ + λ I)⁻¹ Σ wᵢ Fᵢ (θᵢ − θ₀),     wᵢ = Nᵢ / Σ N.

    python examples/merging.py [--plot FILE]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import natgrad
from natgrad.lab import data

Examples = tuple[Tensor, Tensor]
DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2)


def main(seeds: Sequence[int] = (0, 1, 2), steps: int = 60, plot: Path | None = None) -> dict[str, float]:
    """Trains pairs of models, merges them in several ways; returns the accuracy on all digits of each."""
    runs = [one_run(seed, steps) for seed in seeds]
    accuracy = {name: sum(r[name] for r in runs) / len(runs) for name in runs[0]}
    print(f"accuracy on held-out digits of all ten classes, mean of {len(runs)} runs:\n")
    for name, value in accuracy.items():
        print(f"{name:<34}{value:>7.1%}")
    if plot:
        draw(accuracy, plot)
    return accuracy


def one_run(seed: int, steps: int) -> dict[str, float]:
    """Two models with one start: one learns more of 0 to 4, the other of 5 to 9."""
    train, rest = data.split(*data.small_digits(), train=1000, seed=seed)
    choosing, test = data.split(*rest, train=200, seed=seed)
    torch.manual_seed(seed)
    start = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    fit(start, (train[0][:100], train[1][:100]), steps // 4)  # what both know: a hundred digits of all kinds
    low = train[1] < 5
    parts = [(train[0][rows], train[1][rows]) for rows in (low, ~low)]
    models = [copy.deepcopy(start) for _ in parts]
    for model, part in zip(models, parts, strict=True):
        fit(model, part, steps)

    result = {"before": accuracy(start, test)}
    result |= {
        f"trained on {n}": accuracy(m, test) for n, m in zip(("0 to 4", "5 to 9"), models, strict=True)
    }
    names = {"mean of the weights": "euclidean", "merged, diagonal": "diagonal", "merged, kfac": "kfac",
             "merged, block": "block", "merged, dense": "dense"}  # fmt: skip
    for name, metric in names.items():
        merged = [merge(start, models, parts, metric, damping) for damping in DAMPINGS]
        best = max(
            merged, key=lambda model: accuracy(model, choosing)
        )  # λ is chosen on digits that are not tested on
        result[name] = accuracy(best, test)
    return result


def merge(
    start: nn.Module, models: Sequence[nn.Module], parts: Sequence[Examples], metric: str, damping: float
) -> nn.Module:
    """The weights that are most probable under both posteriors."""
    origin = {name: p.detach() for name, p in start.named_parameters()}
    total = sum(len(part[0]) for part in parts)
    operators, pull = [], None
    for model, part in zip(models, parts, strict=True):
        F = (len(part[0]) / total) * natgrad.fisher(model, nn.CrossEntropyLoss(), part, metric=metric)
        pulled = F @ {name: p.detach() - origin[name] for name, p in model.named_parameters()}
        operators.append(F)
        pull = pulled if pull is None else {name: pull[name] + pulled[name] for name in pull}
    F = operators[0] + operators[1]
    move = F.solve(pull, damping=0.0 if metric == "euclidean" else damping)
    merged = copy.deepcopy(start)
    with torch.no_grad():
        for name, p in merged.named_parameters():
            p += move[name]
    return merged


def fit(model: nn.Module, examples: Examples, steps: int) -> None:
    """Trains by the natural gradient on all examples at once, with a weight decay of 1/N."""
    loss_fn = nn.CrossEntropyLoss()
    optimizer = natgrad.NaturalGradient(model, loss_fn, weight_decay=natgrad.L2(1.0 / len(examples[0])))
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(examples[0]), examples[1]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, examples: Examples) -> float:
    """The share of right answers."""
    return float((model(examples[0]).argmax(1) == examples[1]).double().mean())


def draw(accuracy: dict[str, float], path: Path) -> None:
    """A bar for each model."""
    from matplotlib.figure import Figure

    from natgrad.lab.figures import FAINT, styled

    with styled():
        figure = Figure(figsize=(6.0, 3.4), layout="constrained")
        axes = figure.subplots()
        colours = ["#D55E00" if "merged" in name else "#9aa4ae" for name in accuracy]
        bars = axes.barh(list(accuracy), list(accuracy.values()), color=colours, height=0.66)
        axes.bar_label(
            bars, [f"{value:.1%}" for value in accuracy.values()], padding=4, fontsize=9, color=FAINT
        )
        axes.invert_yaxis()
        axes.set_xlim(0, 1.08)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("accuracy on held-out digits of all classes")
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fisher-weighted merging of two models")
    parser.add_argument("--plot", type=Path, help="draw the accuracies into this file")
    main(plot=parser.parse_args().plot)
