"""Which training examples do harm? Planted mistakes come out on top.

Taking example n out of the training moves the weights by (F + λI)⁻¹ gₙ / N to first order (gₙ its gradient), and so the
loss on held-out examples, whose gradient is h, by hᵀ (F + λI)⁻¹ gₙ / N. Its influence is the opposite (Koh & Liang
2017, arXiv 1703.04730):

    sₙ = − hᵀ (F + λI)⁻¹ gₙ / N,

what example n adds to the held-out loss. One `solve` answers for all examples. The same with gₙ in the place of h is
the self-influence: what the model knows of an example from this example alone.

    python examples/influence.py [--plot FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import natgrad
from natgrad.lab import data

PRECISION = 0.1  # δ of the prior: the weight decay is δ/N, and so is λ


def main(
    train: int = 1400, planted: int = 70, repeats: int = 3, steps: int = 60, plot: Path | None = None
) -> dict[str, float]:
    """Trains on some wrong labels, ranks the examples, and returns each ranking's precision at k = planted."""
    found = [one_run(train, planted, steps, seed) for seed in range(repeats)]
    precision = {n: sum(float(f[n][:planted].double().mean()) for f in found) / repeats for n in found[0]}
    print(f"{planted} of {train:,} labels are wrong. Of the {planted} examples on top so many are")
    print(f"(mean of {repeats} runs), and to find 90 % of the mistakes one looks through so many:\n")
    for name, value in precision.items():
        reach = sum(int(f[name].nonzero()[int(0.9 * planted) - 1]) + 1 for f in found) / repeats
        print(f"{name:<38}{value:>6.0%}{reach:>10,.0f}")
    if plot:
        draw(found[0], planted, plot)
    return precision


def one_run(train: int, planted: int, steps: int, seed: int) -> dict[str, Tensor]:
    """Ranking → for each place from the top, whether the example there has a wrong label."""
    (inputs, labels), held_out = data.split(*data.small_digits(), train=train, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(train, generator=generator)[:planted]
    given = labels.clone()
    given[wrong] = (labels[wrong] + torch.randint(1, 10, (planted,), generator=generator)) % 10

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    loss_fn = nn.CrossEntropyLoss()
    optimizer = natgrad.NaturalGradient(model, loss_fn, weight_decay=natgrad.L2(PRECISION / train))
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(inputs), given).backward()
        optimizer.step()

    gradients, losses = by_example(model, loss_fn, inputs, given)  # [N, P], [N]
    h = by_example(model, loss_fn, *held_out)[0].mean(0)
    scores = {"chance": torch.rand(train, generator=generator), "loss": losses,
              "influence with F = I": -gradients @ h}  # fmt: skip
    for metric in ("diagonal", "kfac", "ekfac", "dense"):
        F = natgrad.fisher(model, loss_fn, (inputs, given), metric=metric)
        scores[f"influence, {metric}"] = -gradients @ F.solve(h, damping=PRECISION / train) / train
        if metric == "kfac":
            solved = F.solve(gradients.mT.contiguous(), damping=PRECISION / train)  # columns, all at once
            own = (gradients * solved.mT).sum(1) / train
    scores["self-influence, kfac"] = own
    is_wrong = torch.zeros(train, dtype=torch.bool)
    is_wrong[wrong] = True
    return {name: is_wrong[s.argsort(descending=True)] for name, s in scores.items()}


def by_example(
    model: nn.Module, loss_fn: nn.Module, inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Each example's gradient, flat in the model's order, and its loss."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        value = loss_fn(functional_call(model, weights, x[None]), y[None])
        return value, value

    gradients, losses = vmap(grad(loss, has_aux=True), in_dims=(None, 0, 0))(weights, inputs, targets)
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1), losses.detach()


def draw(hits: dict[str, Tensor], planted: int, path: Path) -> None:
    """The share of the wrong labels found against the number of examples looked at."""
    from matplotlib.figure import Figure

    from natgrad.lab.figures import FAINT, styled

    looks = {"chance": (FAINT, 1.0), "loss": ("#009E73", 1.8), "influence with F = I": ("#0072B2", 1.8),
             "influence, diagonal": ("#56B4E9", 1.8), "influence, kfac": ("#D55E00", 2.6)}  # fmt: skip
    with styled():
        figure = Figure(figsize=(5.8, 4.0), layout="constrained")
        axes = figure.subplots()
        for name, (colour, width) in looks.items():
            axes.plot(hits[name].cumsum(0) / planted, color=colour, linewidth=width, label=name)
        axes.set_xlim(0, 5 * planted)
        axes.set_xlabel("examples looked at, in the order of the ranking")
        axes.set_ylabel("share of the wrong labels found")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.28))
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="influence of training examples on digits")
    parser.add_argument("--plot", type=Path, help="draw how fast the mistakes are found into this file")
    main(plot=parser.parse_args().plot)
