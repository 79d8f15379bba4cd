"""Hugging Face's Accelerate: `prepare` takes a NaturalGradient like any optimiser; here in bfloat16.

`prepare` puts the forward pass under autocast; parameters, factors and the quadratic model stay in float32.

    python examples/with_accelerate.py [--plot FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from natgrad.lab import data


def main(
    epochs: int = 8, rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2), plot: Path | None = None
) -> dict[str, list[float]]:
    """Trains with both optimisers; the loss of every step, by name. AdamW has the best of its rates."""
    runs = {rate: train(epochs, rate) for rate in (None, *rates)}
    best = min(rates, key=lambda rate: mean_of_last(runs[rate]))
    found = {"natgrad, no learning rate": runs[None], f"AdamW, lr={best:g}": runs[best]}
    for name, losses in found.items():
        print(f"{name:<28}loss of the last 7 steps: {mean_of_last(losses):.4f}")
    if plot:
        draw(found, plot)
    return found


def train(epochs: int, rate: float | None) -> list[float]:
    """The losses of a run; by natgrad where there is no rate."""
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=True)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    loss_fn = nn.CrossEntropyLoss()
    if rate is None:
        optimizer: torch.optim.Optimizer = natgrad.NaturalGradient(model, loss_fn)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    x, y = data.small_digits()
    loader = DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(epochs):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = loss_fn(model(inputs), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 10.0)
                    losses.append(loss.item())
                optimizer.step()
                optimizer.zero_grad()
    return losses


def mean_of_last(losses: list[float], count: int = 7) -> float:
    """Over the last steps."""
    return sum(losses[-count:]) / len(losses[-count:])


def draw(runs: dict[str, list[float]], path: Path) -> None:
    """The loss of every step."""
    from matplotlib.figure import Figure

    from natgrad.lab.figures import styled

    with styled():
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        axes = figure.subplots()
        for (name, losses), colour in zip(runs.items(), ("#0072B2", "#D55E00"), strict=True):
            axes.semilogy(range(1, len(losses) + 1), losses, color=colour, linewidth=1.6, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, nats")
        axes.legend()
        figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="natgrad with Accelerate")
    parser.add_argument("--plot", type=Path, help="draw the losses into this file")
    main(plot=parser.parse_args().plot)
