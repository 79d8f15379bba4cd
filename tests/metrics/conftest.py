"""One way to show a batch to a metric's estimate, without an optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from natgrad.likelihoods import likelihood_from
from natgrad.metrics import Estimate, Metric, Observation
from natgrad.tape import Tape
from natgrad.tape.passes import SignalPass


class Shown:
    """A model whose batches an estimate is shown."""

    def __init__(self, metric: Metric, model: nn.Module, loss: nn.Module, seed: int = 0) -> None:
        self.model, self.likelihood = model, likelihood_from(loss)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.estimate: Estimate = metric.start(parameters)
        self.tape = Tape(parameters)
        self.generator = torch.Generator().manual_seed(seed)

    def observe(self, x: Tensor, y: Any, step: int = 0, first: bool = True) -> Estimate:
        with self.tape.recording():
            z = self.model(x)
        outputs = z if isinstance(z, tuple) else (z,)
        signals = self.likelihood.signals(z, y, self.estimate.kind, self.generator, len(x))
        passes = (
            SignalPass(self.tape, outputs, s if isinstance(s, tuple) else (s,), len(x)) for s in signals
        )
        additive = self.likelihood.reduction == "sum"
        with torch.no_grad():
            self.estimate.observe(Observation(passes, len(x), step, first, additive))
        return self.estimate

    def dense(self) -> Tensor:
        return self.estimate.operator().to_dense()


@pytest.fixture
def show() -> Callable[..., Shown]:
    return Shown
