"""metric="sketched" is the Fisher information of the definition, and solves as Gram does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from natgrad import ConfigError
from natgrad.metrics import Sketched
from natgrad.operators import Sketched as SketchedOperator
from oracle import fisher as oracle
from oracle.problems import problem

DTYPE = torch.float64


def gradient(model: nn.Module) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(3)
    return {n: torch.randn(p.shape, dtype=DTYPE, generator=source) for n, p in model.named_parameters()}


def test_options_reach_the_operator(show: Callable) -> None:
    one = problem("linear", "ce")
    shown = show(Sketched(rank=2, largest=5, iterations=7, tolerance=1e-4), one.model, one.loss)
    operator = shown.observe(one.x, one.y).operator()
    assert isinstance(operator, SketchedOperator)
    assert (operator.rank, operator.largest, operator.iterations, operator.tolerance) == (2, 5, 7, 1e-4)


def test_sketch_and_solve_descends(show: Callable) -> None:
    one = problem("linear", "ce")
    shown = show(Sketched(iterations=0, rank=2), one.model, one.loss)
    shown.observe(one.x, one.y)
    g = gradient(one.model)
    assert oracle.flat(g) @ oracle.flat(shown.estimate.solve(g, 0.01, 0)) > 0


def test_options_out_of_range_are_refused() -> None:
    for wrong in ({"rank": 0}, {"rank": 9, "largest": 8}, {"iterations": -1}, {"tolerance": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Sketched(**wrong)
