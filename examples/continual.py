"""Learning one task after another without forgetting: elastic weight consolidation on split digits.

Five tasks, two digits each, the later ones without the earlier ones' data: is it the first digit of the pair, or the
second? All share the network and its two outputs. After task k the posterior is taken for a Gaussian about θ*ₖ with
the precision Nₖ Fₖ, and the next tasks carry it as a prior (Kirkpatrick et al. 2017; with K-FAC Ritter et al. 2018):

    loss(θ) + (strength / N) Σₖ Nₖ ½ (θ − θ*ₖ)ᵀ Fₖ (θ − θ*ₖ).

The penalty is the quadratic prediction of KL(p_θ*ₖ ‖ p_θ): how far the answers to old questions move. `F.kl(δ)` is just
that, and differentiable. Strength 1 is Bayes's own; like everybody we need more, as F at θ*ₖ knows only θ*ₖ's
surroundings. Each metric has the best of a grid on a run of its own (seed 0), which the table leaves out.

    python examples/continual.py [--plot FILE]
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

PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
STRENGTHS = {"euclidean": 30_000.0, "diagonal": 10_000.0, "kfac": 100.0}

Task = tuple[Tensor, Tensor]
Penalty = Callable[[dict[str, Tensor]], Tensor]


class Outcome(NamedTuple):
    """How a learner did."""

    final: float  # accuracy at the end, mean over the tasks
    forgetting: float  # accuracy just after a task was learnt − at the end, mean over all but the last
    table: list[list[float]]  # after task k: the accuracy on tasks 0 … k


def main(
    examples: int = 800,
    epochs: int = 10,
    seeds: Sequence[int] = (1, 2),
    plot: Path | None = None,
) -> dict[str, Outcome]:
    """Learns the tasks with no penalty and with three, and returns what is left of each task at the end."""
    learners = {
        "without": None,
        "distance only (F = I)": "euclidean",
        "EWC, diagonal": "diagonal",
        "EWC, kfac": "kfac",
    }
    outcomes = {}
    print(f"five tasks of {examples} digits each; means of {len(seeds)} runs\n")
    print(f"{'':<24}{'accuracy at the end':>20}{'forgetting':>13}")
    for name, metric in learners.items():
        runs = [learn(metric, examples, epochs, STRENGTHS.get(metric or "", 0.0), seed) for seed in seeds]
        mean = torch.tensor([(r.final, r.forgetting) for r in runs]).mean(0).tolist()
        outcomes[name] = Outcome(mean[0], mean[1], runs[0].table)
        print(f"{name:<24}{mean[0]:>20.1%}{mean[1]:>13.1%}")
    if plot:
        draw(outcomes, plot)
    return outcomes


def learn(metric: str | None, examples: int, epochs: int, strength: float, seed: int) -> Outcome:
    """One learner through all tasks."""
    tasks = [split_task(pair, examples, seed) for pair in PAIRS]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 100), nn.Tanh(), nn.Linear(100, 2))
    loss_fn = nn.CrossEntropyLoss()
    penalties: list[Penalty] = []
    table = []
    for train, _ in tasks:
        fit(model, loss_fn, train, penalties, epochs, seed)
        if metric is not None:
            penalties.append(consolidate(model, loss_fn, train, metric, strength))
        table.append([accuracy(model, test) for _, test in tasks[: len(table) + 1]])
    lost = [table[k][k] - table[-1][k] for k in range(len(tasks) - 1)]
    return Outcome(sum(table[-1]) / len(tasks), sum(lost) / len(lost), table)


def consolidate(model: nn.Module, loss_fn: nn.Module, train: Task, metric: str, strength: float) -> Penalty:
    """The penalty that keeps the answers to this task: strength · ½ (θ − θ*)ᵀ F (θ − θ*), for tasks of equal size."""
    centre = {name: p.detach().clone() for name, p in model.named_parameters()}
    F = natgrad.fisher(model, loss_fn, train, metric=metric)
    if metric == "euclidean":  # a multiple of the identity, of the trace that F has
        F = F * float(natgrad.fisher(model, loss_fn, train, metric="diagonal").trace() / F.trace())
    return lambda theta: strength * F.kl({name: theta[name] - centre[name] for name in centre})


def fit(
    model: nn.Module, loss_fn: nn.Module, train: Task, penalties: Sequence[Penalty], epochs: int, seed: int
) -> None:
    """Trains on a task with Adam, under the penalties of those before it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    theta = dict(model.named_parameters())
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(train[0]), generator=order).split(50):
            optimizer.zero_grad()
            loss = loss_fn(model(train[0][rows]), train[1][rows]) + sum(p(theta) for p in penalties)
            loss.backward()
            optimizer.step()


def split_task(pair: tuple[int, int], examples: int, seed: int) -> tuple[Task, Task]:
    """A task's training and test examples: target 1 for the pair's second digit."""
    inputs, labels = data.mnist_digits()
    chosen = (labels == pair[0]) | (labels == pair[1])
    return data.split(inputs[chosen], (labels[chosen] == pair[1]).long(), examples, seed)


@torch.no_grad()
def accuracy(model: nn.Module, test: Task) -> float:
    """The share of right answers."""
    return float((model(test[0]).argmax(1) == test[1]).double().mean())


def draw(outcomes: dict[str, Outcome], path: Path) -> None:
    """Accuracy on each task as the later ones are learnt."""
    from matplotlib.figure import Figure

    from natgrad.lab.figures import styled

    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
    with styled():
        figure = Figure(figsize=(9.4, 3.4), layout="constrained")
        shown = [name for name in outcomes if "distance" not in name]
        panels = figure.subplots(1, len(shown), sharey=True)
        for axes, name in zip(panels, shown, strict=True):
            table = outcomes[name].table
            for k, pair in enumerate(PAIRS):
                after = range(k, len(PAIRS))
                axes.plot([j + 1 for j in after], [table[j][k] for j in after], "o-", color=colours[k], ms=4,
                          linewidth=1.8, label=f"{pair[0]} or {pair[1]}")  # fmt: skip
            axes.set_title(f"{name}: {outcomes[name].final:.0%} at the end")
            axes.set_xlabel("tasks learnt")
            axes.set_xticks(range(1, len(PAIRS) + 1))
        panels[0].set_ylabel("accuracy on held-out digits")
        panels[0].legend(loc="lower left")
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="elastic weight consolidation on split digits")
    parser.add_argument("--plot", type=Path, help="draw accuracy on each task over time into this file")
    main(plot=parser.parse_args().plot)
