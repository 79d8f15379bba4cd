"""Laplace's approximation on digits: a network that knows when it does not know.

The posterior of the weights is taken for a Gaussian about the trained ones (MAP), θ*, whose precision is what the data
says of θ plus what the prior says: N·F + δ·I. natgrad's F belongs to the loss's *mean*, so that N·F is the data's
part, and with λ = δ/N

    (N F + δ I)⁻¹ = (F + λ I)⁻¹ / N,

so a draw of the weights is θ* + F.sample(1, damping=δ/N) / √N.

    python examples/laplace.py [--plot FILE]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

import natgrad
from natgrad.lab import data

PRECISIONS = tuple(
    10.0**e for e in (-1, -0.5, 0, 0.5, 1, 1.5, 2)
)  # δ, tried on digits that are not tested on


class Scores(NamedTuple):
    """What predictions are worth on held-out digits."""

    accuracy: float
    loglik: float  # mean log p(y | x), nats
    ece: float  # expected calibration error: how far confidence and accuracy are apart


def main(
    train: int = 1000, draws: int = 100, epochs: int = 30, seed: int = 0, plot: Path | None = None
) -> dict[str, Scores]:
    """Trains, approximates, and compares predictions; returns the scores of each kind of prediction."""
    inputs, targets = data.mnist_digits()
    ours, others = data.split(inputs, targets, train, seed)
    choosing, testing = data.split(*others, train=1000, seed=seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 50), nn.Tanh(), nn.Linear(50, 10))
    loss_fn = nn.CrossEntropyLoss()
    fit(model, loss_fn, ours, epochs)

    F = natgrad.fisher(model, loss_fn, ours, metric="kfac")
    generator = torch.Generator().manual_seed(seed)

    def posterior(precision: float, count: int = draws) -> Tensor:
        return F.sample(count, damping=precision / train, generator=generator) / math.sqrt(train)

    tried = {p: score(linearised(model, F, posterior(p, 30), choosing[0]), choosing[1]) for p in PRECISIONS}
    precision = max(tried, key=lambda p: tried[p].loglik)
    moves = posterior(precision)
    torch.manual_seed(seed)
    shrunk = nn.Sequential(nn.Linear(784, 50), nn.Tanh(), nn.Linear(50, 10))
    fit(shrunk, loss_fn, ours, epochs, natgrad.L2(precision / train))
    predictions = {
        "MAP (the network itself)": model(testing[0]).detach().softmax(1),
        "MAP, trained with that prior": shrunk(testing[0]).detach().softmax(1),
        "Laplace, sampled networks": sampled(model, F, moves, testing[0]),
        "Laplace, linearised": linearised(model, F, moves, testing[0]),
    }
    scores = {name: score(p, testing[1]) for name, p in predictions.items()}
    print(
        f"{train:,} digits to learn from, {len(testing[1]):,} to test on; prior precision δ = {precision:.3g}\n"
    )
    print(f"{'':<30}{'accuracy':>10}{'log-likelihood':>17}{'ECE':>9}")
    for name, s in scores.items():
        print(f"{name:<30}{s.accuracy:>10.1%}{s.loglik:>12.3f} nats{s.ece:>9.1%}")
    if plot:
        draw(
            {n: predictions[n] for n in ("MAP (the network itself)", "Laplace, linearised")}, testing[1], plot
        )
    return scores


def fit(
    model: nn.Module,
    loss_fn: nn.Module,
    examples: tuple[Tensor, Tensor],
    epochs: int,
    decay: natgrad.L2 | float = 0.0,
) -> None:
    """Trains by the natural gradient, on batches of 200."""
    optimizer = natgrad.NaturalGradient(model, loss_fn, weight_decay=decay)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(examples[0]), generator=order).split(200):
            x, y = examples[0][rows], examples[1][rows]
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()


@torch.no_grad()
def sampled(model: nn.Module, F: natgrad.LinearOperator, moves: Tensor, x: Tensor) -> Tensor:
    """The mean prediction of networks whose weights are drawn from the posterior."""
    centre = F.space.flatten(dict(model.named_parameters()))
    draws = (F.space.unflatten(centre + move) for move in moves)
    return torch.stack([functional_call(model, draw, x).softmax(1) for draw in draws]).mean(0)


@torch.no_grad()
def linearised(model: nn.Module, F: natgrad.LinearOperator, moves: Tensor, x: Tensor) -> Tensor:
    """The same for the network's tangent at θ*, which is the model that F belongs to (Immer et al. 2021)."""
    centre = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(model, weights, x)

    total = torch.zeros(len(x), 10)
    for move in moves:
        z, slope = jvp(outputs, (centre,), (F.space.unflatten(move),))
        total += (z + slope).softmax(1)
    return total / len(moves)


def score(probabilities: Tensor, targets: Tensor) -> Scores:
    """Accuracy, log-likelihood and calibration."""
    confidence, guess = probabilities.max(1)
    right = (guess == targets).double()
    loglik = probabilities.gather(1, targets[:, None]).clamp_min(1e-12).log().mean()
    gaps = [abs(a - c) * n for c, a, n in bins(confidence, right)]
    return Scores(float(right.mean()), float(loglik), sum(gaps) / len(targets))


def bins(confidence: Tensor, right: Tensor, count: int = 15) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and size of each bin of equal width."""
    which = (confidence * count).long().clamp_max(count - 1)
    groups = [which == b for b in range(count) if bool((which == b).any())]
    return [(float(confidence[g].mean()), float(right[g].mean()), int(g.sum())) for g in groups]


def draw(predictions: dict[str, Tensor], targets: Tensor, path: Path) -> None:
    """Accuracy against confidence: on the diagonal, a prediction of 80 % is right eight times in ten."""
    from matplotlib.figure import Figure

    from natgrad.lab.figures import FAINT, styled

    with styled():
        figure = Figure(figsize=(5.2, 4.4), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.9, dashes=(4, 3))
        for (name, p), colour in zip(predictions.items(), ("#0072B2", "#D55E00"), strict=True):
            confidence, guess = p.max(1)
            points = [(c, a) for c, a, n in bins(confidence, (guess == targets).double(), 10) if n >= 20]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=2, ms=5, label=name)
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy on held-out digits")
        axes.set_xlim(0.2, 1.02)
        axes.set_ylim(0.2, 1.02)
        axes.legend(loc="upper left")
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Laplace's approximation on digits")
    parser.add_argument("--plot", type=Path, help="draw the reliability diagram into this file")
    main(plot=parser.parse_args().plot)
