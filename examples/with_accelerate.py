"""Hugging Face's Accelerate: `prepare` takes a NaturalGradient like any optimiser; here in bfloat16.

`prepare` puts the forward pass under autocast; parameters, factors and the quadratic model stay in float32.

    python examples/with_accelerate.py [--plot FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from natgrad.lab import data
from natgrad.lab.losses import compare


def main(
    epochs: int = 8, rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2), plot: Path | None = None
) -> dict[str, Sequence[float]]:
    """Trains with both optimisers; the loss of every step, by name. AdamW has the best of its rates."""
    runs = {rate: train(epochs, rate) for rate in (None, *rates)}
    peers = {f"AdamW, lr={rate:g}": runs[rate] for rate in rates}
    found, said = compare(runs[None], peers, 7, "last 7 steps", plot=plot)
    print(said)
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="natgrad with Accelerate")
    parser.add_argument("--plot", type=Path, help="draw the losses into this file")
    main(plot=parser.parse_args().plot)
