"""Averages over steps, corrected for their bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Weight:
    """The total weight of an exponentially decaying sum; sum ÷ total is the bias-corrected average.

    Dividing by the weights that were really given corrects the bias exactly, however many examples each step had
    and however it was split into micro-batches (with equal batches it is Adam's 1 − εᵗ; Kingma & Ba 2015, §3).
    """

    total: float = 0.0

    def add(self, weight: float, decay: float) -> None:
        """total ← decay · total + weight."""
        self.total = decay * self.total + weight


def accumulate(total: Tensor, value: Tensor, decay: float, weight: float) -> None:
    """total ← decay · total + weight · value, in place."""
    if decay == 0.0:
        torch.mul(value, weight, out=total)
    else:
        total.mul_(decay).add_(value, alpha=weight)


def decay_since(decay: float, last: int | None, now: int) -> float:
    """What remains of an average last fed in step `last`: ε for every step since, whether or not it was fed then.

    Counting steps rather than feedings keeps the average's horizon where it is when the refresh period grows. For a
    further micro-batch of the same step it is 1.
    """
    return decay if last is None else decay ** (now - last)
