"""Small random models of every kind of layer with every likelihood, in float64, for the laws of the Fisher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

DTYPE = torch.float64
CLASSES = 3


class Tied(nn.Module):
    """Two maps with one weight, each with a bias or none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Linear(3, 3),
            nn.Linear(3, 3, bias=False),
            nn.Linear(3, CLASSES),
        )
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(3, 3), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.cell(torch.tanh(self.cell(x)))))


class Packed(nn.Module):
    """Slices of one weight, a weight that is stored with its input axis first, and a low-rank adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.shift = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(6))
        self.head = nn.Parameter(torch.randn(3, CLASSES))
        self.down, self.up = nn.Parameter(torch.randn(1, 3)), nn.Parameter(torch.randn(CLASSES, 1))
        self.final = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        (q, k), (b, c) = self.packed.chunk(2), self.shift.chunk(2)
        hidden = torch.tanh(nn.functional.linear(x, q, b) + nn.functional.linear(x.sin(), k, c))
        return torch.addmm(self.final, hidden, self.head) + hidden @ self.down.T @ self.up.T


class ClassesSecond(nn.Module):
    """[N, T, C] → [N, C, T], as the cross-entropy reads tokens."""

    def forward(self, z: Tensor) -> Tensor:
        return z.transpose(1, 2)


class Pair(nn.Module):
    """A mean and a variance."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z[..., 0], z[..., 1].exp() + 0.1


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES)), (3,)),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, CLASSES, bias=False)),
        (3,),
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, CLASSES), ClassesSecond()),
        (2, 2),
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, CLASSES)),
        (2, 4),
    ),
    "grouped conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2, stride=2, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, CLASSES)
        ),
        (2, 3, 3),
    ),
    "spatial": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, CLASSES, 1)), (1, 3, 2)),
    "tied": (Tied, (3,)),
    "twice": (Twice, (3,)),
    "packed": (Packed, (3,)),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, CLASSES)),
        (3,),
    ),
}
COVERED = tuple(name for name in MODELS if name != "layer norm")

LOSSES = (
    "ce",
    "ce weighted",
    "ce ignoring",
    "ce smoothed",
    "ce soft",
    "mse",
    "bce",
    "bce weighted",
    "poisson",
    "gaussian",
)


@dataclass
class Problem:
    """A model, a loss and data."""

    model: nn.Module
    loss: nn.Module
    x: Tensor
    y: Tensor
    name: str

    def parts(self, *sizes: int) -> list[tuple[Tensor, Tensor]]:
        """The data in batches of these sizes."""
        return list(zip(self.x.split(list(sizes)), self.y.split(list(sizes))))


def problem(model: str, loss: str, reduction: str = "mean", examples: int = 5, seed: int = 0) -> Problem:
    """A problem by name."""
    torch.manual_seed(seed)
    build, shape = MODELS[model]
    net = build().to(DTYPE)
    x = torch.randn(examples, *shape, dtype=DTYPE)
    if loss == "gaussian":
        layers = list(net.children()) if isinstance(net, nn.Sequential) else [net]
        if isinstance(layers[-1], ClassesSecond):
            layers = layers[:-1]
        net = nn.Sequential(
            *layers, *([nn.Flatten(2), ClassesSecond()] if model == "spatial" else []), Pair()
        )
    with torch.no_grad():
        z = net(x)
    return Problem(net, *_loss(loss, reduction, z, x), f"{model}, {loss}, {reduction}")


def _loss(name: str, reduction: str, z: Any, x: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    family, *option = name.split()
    if family == "gaussian":
        return nn.GaussianNLLLoss(reduction=reduction), x, torch.randn_like(z[0])
    if family == "mse":
        return nn.MSELoss(reduction=reduction), x, torch.randn_like(z)
    if family == "poisson":
        return nn.PoissonNLLLoss(reduction=reduction), x, torch.randint(4, z.shape).to(DTYPE)
    if family == "bce":
        positive = torch.tensor(3.0, dtype=DTYPE) if option else None
        return nn.BCEWithLogitsLoss(pos_weight=positive, reduction=reduction), x, torch.rand_like(z).round()
    y = torch.randint(CLASSES, z.shape[:1] + z.shape[2:])
    if option == ["weighted"]:
        weight = torch.tensor([0.5, 2.0, 1.0], dtype=DTYPE)
        return nn.CrossEntropyLoss(weight=weight, reduction=reduction), x, y
    if option == ["ignoring"]:
        y.view(-1)[::3] = -100
        return nn.CrossEntropyLoss(reduction=reduction), x, y
    if option == ["smoothed"]:
        return nn.CrossEntropyLoss(label_smoothing=0.2, reduction=reduction), x, y
    if option == ["soft"]:
        return nn.CrossEntropyLoss(reduction=reduction), x, torch.softmax(torch.randn_like(z), 1)
    return nn.CrossEntropyLoss(reduction=reduction), x, y


def problems(
    models: tuple[str, ...] = tuple(MODELS), losses: tuple[str, ...] = LOSSES
) -> st.SearchStrategy[Problem]:
    """Random problems."""
    return st.builds(
        problem,
        st.sampled_from(models),
        st.sampled_from(losses),
        st.sampled_from(["mean", "sum"]),
        st.integers(4, 6),
        st.integers(0, 99),
    )
