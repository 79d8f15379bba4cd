"""Small networks, losses and data in float64 that natgrad and its peers all read, and what they return as matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

N, CLASSES = 12, 3
MODELS = ("mlp", "cnn")
LOSSES = ("cross-entropy-mean", "cross-entropy-sum", "squared-error-mean", "squared-error-sum")
SKIPPED = "needs the peers: `make install`, or pip install --no-deps -r tests/peers/requirements.txt"


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A model and its inputs."""
    torch.manual_seed(3)
    model, shape = {
        "mlp": (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)), (5,)),
        "cnn": (
            nn.Sequential(
                nn.Conv2d(2, 3, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(12, CLASSES),
            ),
            (2, 4, 4),
        ),
        "tokens": (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES), _Last()), (6, 5)),
    }[name]
    return model.double(), torch.randn(N, *shape, dtype=torch.float64)


def loss_and_targets(name: str, *positions: int) -> tuple[nn.Module, Tensor]:
    """A loss by the name in LOSSES, and targets for N examples with `positions` each."""
    torch.manual_seed(4)
    kind, _, reduction = name.rpartition("-")
    if kind == "cross-entropy":
        return nn.CrossEntropyLoss(reduction=reduction), torch.randint(CLASSES, (N, *positions))
    return nn.MSELoss(reduction=reduction), torch.randn(N, CLASSES, *positions, dtype=torch.float64)


def in_batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Two batches of different sizes: a mean of means would not be the mean."""
    return [(x[:5], y[:5]), (x[5:], y[5:])]


def dense(operator: Any) -> Tensor:
    """The matrix of natgrad's or of curvlinops' operator, from its products."""
    return operator @ torch.eye(operator.shape[1], dtype=torch.float64)


def from_curvlinops(
    build: Callable[..., Any], model: nn.Module, loss: nn.Module, data: Any, **options: Any
) -> Tensor:
    """The matrix of one of curvlinops' operators on all parameters.

    On a copy of the model: what raises half-way leaves its hooks behind.
    """
    model = copy.deepcopy(model)
    return dense(build(model, loss, list(model.parameters()), data, **options))


def close(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-8, as asked of results that are the same by definition."""
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8 * float(theirs.abs().max()))


def apart(one: Tensor, other: Tensor) -> float:
    """The relative distance in norm."""
    return float((one - other).norm() / other.norm())


class _Last(nn.Module):
    """Classes second, where torch.nn.CrossEntropyLoss reads them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)
