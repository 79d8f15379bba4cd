"""Small training runs, the same for every metric and strategy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad

DTYPE = torch.float64
Batch = tuple[Tensor, Any]

METRICS: dict[str, Any] = {
    "euclidean": "euclidean",
    "diagonal": natgrad.Diagonal(),
    "dense": "dense",
    "kfac": "kfac",
    "kfac-lazy": natgrad.KFAC(kind="empirical", factors=2, inverses=3),
    "ekfac": "ekfac",
    "tempered": "tempered",
    "ekfac-lazy": natgrad.EKFAC(kind="empirical", factors=2, refresh=3),
    "block": "block",
    "exact": "exact",
    "gram": "gram",
    "rectangular": "rectangular",
    "sketched": "sketched",
    "matrixfree": "matrixfree",
    "lowrank": "lowrank",
}
MODES: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "fixed": {"lr": 0.1, "momentum": 0.9, "damping": 0.1},
}


def for_every(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test for every metric in every mode."""
    return pytest.mark.parametrize("metric", METRICS)(pytest.mark.parametrize("mode", MODES)(test))


def net(dtype: torch.dtype = DTYPE, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """Two inputs, three outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3)).to(dtype)


def batches(count: int, size: int = 40, dtype: torch.dtype = DTYPE, seed: int = 1) -> list[Batch]:
    """Three classes of points that a line does not separate."""
    source = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        x = torch.randn(size, 2, dtype=dtype, generator=source)
        noise = 0.3 * torch.randn(size, dtype=dtype, generator=source)
        y = (x[:, 0] * x[:, 1] + noise > 0).long() + (x.norm(dim=1) > 1.5).long()
        found.append((x, y))
    return found


def parameters(model: nn.Module) -> Tensor:
    """All parameters, flat and copied."""
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


@dataclasses.dataclass
class Run:
    """A model, its loss and its optimiser."""

    model: nn.Module
    loss: nn.Module
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, metric: str, mode: str, model: nn.Module | None = None, /, **options: Any) -> Run:
        """A run with one of the metrics in one of the modes."""
        model = net() if model is None else model
        loss = options.pop("loss", nn.CrossEntropyLoss())
        options = MODES[mode] | {"metric": METRICS[metric]} | options
        return cls(model, loss, natgrad.NaturalGradient(model, loss, **options))

    def value(self, batch: Batch) -> Tensor:
        x, y = batch
        return self.loss(self.model(x), y)

    def step(self, batch: Batch) -> float:
        """One step of the ordinary loop."""
        self.optimizer.zero_grad()
        value = self.value(batch)
        value.backward()
        self.optimizer.step()
        return value.item()

    def closure(self, batch: Batch) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            self.optimizer.zero_grad()
            value = self.value(batch)
            value.backward()
            return value

        return evaluate

    def train(self, data: Iterable[Batch]) -> Tensor:
        """Steps through the data; the parameters after it."""
        for batch in data:
            self.step(batch)
        return parameters(self.model)
