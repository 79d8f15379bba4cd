"""metric="gram" is the Fisher information of the definition, through inner products of its rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import natgrad.operators.gram as operators
from natgrad import ConfigError
from natgrad.linalg import Stage
from natgrad.metrics import Gram
from oracle import fisher as oracle
from oracle.problems import problem

DTYPE = torch.float64


def gradient(model: nn.Module) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(3)
    return {n: torch.randn(p.shape, dtype=DTYPE, generator=source) for n, p in model.named_parameters()}


def test_rows_are_a_value(show: Callable) -> None:
    """Neither the data nor the model can change what was observed."""
    one = problem("spatial", "ce")
    shown = show(Gram(), one.model, one.loss)
    shown.observe(one.x, one.y)
    F = oracle.fisher(one.model, one.loss, one.x, one.y)
    operator = shown.estimate.operator()
    with torch.no_grad():
        one.x.mul_(7)
        for p in one.model.parameters():
            p.mul_(3)
    torch.testing.assert_close(operator.to_dense(), F)


def test_it_says_which_stage_a_factorisation_took(show: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    one = problem("linear", "ce", examples=1)
    shown = show(Gram(), one.model, one.loss)
    shown.observe(one.x, one.y)
    shown.estimate.solve(gradient(one.model), 0.1, 0)
    assert shown.estimate.stages == {}
    monkeypatch.setattr(
        operators, "cholesky", lambda K, *_, **__: (torch.eye(len(K)).to(K), Stage.MORE_DAMPING)
    )
    shown.estimate.solve(gradient(one.model), 0.2, 0)
    assert [list(stages.values()) for stages in shown.estimate.stages.values()] == [["more damping"]]


def test_what_would_not_fit_is_refused(show: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    one = problem("linear", "ce")
    shown = show(Gram(), one.model, one.loss)
    shown.observe(one.x, one.y)
    monkeypatch.setattr(operators, "LARGEST_BYTES", 10)
    with pytest.raises(ConfigError, match="bytes"):
        shown.estimate.solve(gradient(one.model), 0.1, 0)


def test_precision_reaches_the_operator_and_is_checked(show: Callable) -> None:
    one = problem("linear", "ce")
    shown = show(Gram(precision="mixed"), one.model, one.loss)
    assert shown.observe(one.x, one.y).operator().precision == "mixed"
    with pytest.raises(ConfigError, match="'half'"):
        Gram(precision="half")
