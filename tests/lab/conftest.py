"""A problem that trains in milliseconds, and an optimiser that tells what natgrad tells."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from natgrad.lab.networks import perceptron
from natgrad.lab.peers import Entrant, entrants
from natgrad.lab.problem import Problem, correct


@dataclass(frozen=True)
class FakeInfo:
    damping: float
    alpha: float
    momentum: float
    rho: float | None


class FakeNatural(torch.optim.SGD):
    """Gradient descent with an `info`, to test the lab apart from the optimiser."""

    def __init__(self, model: nn.Module, loss_fn: nn.Module, **options: Any) -> None:
        super().__init__(model.parameters(), lr=options.get("lr") or 0.5, momentum=0.5)
        self.count = 0

    @property
    def info(self) -> FakeInfo:
        return FakeInfo(2.0**-self.count, 0.5, 0.25, 0.9 if self.count % 2 else None)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.count += 1
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "count"})


@pytest.fixture
def fake() -> Entrant:
    return Entrant(
        "natgrad", "natgrad", lambda model, loss_fn, rate, seed: FakeNatural(model, loss_fn), ours=True
    )


@pytest.fixture
def problem() -> Problem:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 4, generator=generator)
    targets = (inputs @ torch.randn(4, 3, generator=generator)).argmax(1)
    return Problem(
        name="tiny", title="a tiny network", make_model=functools.partial(perceptron, (4, 8, 3)),
        loss_fn=nn.CrossEntropyLoss(), train=(inputs[:48], targets[:48]), test=(inputs[48:], targets[48:]),
        unit="nats per row", batch_size=12, target=0.5, steps=20, evaluate_every=5, scores={"accuracy": correct},
        rates={"adam": 0.03, "sgd": 0.3},
    )  # fmt: skip


@pytest.fixture
def peers(problem: Problem) -> tuple[Entrant, ...]:
    return entrants(["adam", "sgd"], problem)
