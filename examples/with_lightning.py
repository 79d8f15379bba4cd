"""PyTorch Lightning: `configure_optimizers` returns a NaturalGradient, and nothing else changes.

Lightning's automatic optimisation gives `step` a closure that runs `training_step`, clears the gradients and sends new
ones back. natgrad sees the batch there through the model and the loss that it was given.

    python examples/with_lightning.py [--plot FILE]
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from natgrad.lab import data
from natgrad.lab.losses import compare


class Digits(lightning.LightningModule):
    """A convolutional network on scikit-learn's digits."""

    def __init__(self, optimizer: str = "natgrad") -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        self.loss_fn = nn.CrossEntropyLoss()
        self.optimizer, self.losses = optimizer, []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        loss = self.loss_fn(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The one line that is new."""
        if self.optimizer == "natgrad":
            return natgrad.NaturalGradient(self.net, self.loss_fn)
        return torch.optim.AdamW(self.net.parameters(), lr=float(self.optimizer))


def main(
    epochs: int = 8, rates: tuple[str, ...] = ("1e-3", "3e-3", "1e-2", "3e-2"), plot: Path | None = None
) -> dict[str, Sequence[float]]:
    """Trains with both optimisers; the loss of every step, by name. AdamW has the best of its rates."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    x, y = data.small_digits()
    loader = DataLoader(TensorDataset(x.float(), y), batch_size=256, shuffle=True, drop_last=True)
    runs = {name: train(loader, name, epochs) for name in ("natgrad", *rates)}
    peers = {f"AdamW, lr={rate}": runs[rate] for rate in rates}
    found, said = compare(runs["natgrad"], peers, 7, "last epoch", plot=plot)
    print(said)
    return found


def train(loader: DataLoader, optimizer: str, epochs: int) -> list[float]:
    """The losses of a run."""
    lightning.seed_everything(0, verbose=False)
    model = Digits(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about workers and loggers
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            gradient_clip_val=10.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, loader)
    return model.losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="natgrad in PyTorch Lightning")
    parser.add_argument("--plot", type=Path, help="draw the losses into this file")
    main(plot=parser.parse_args().plot)
