"""metric="exact" chooses by size, and whatever it chooses gives the same step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import natgrad.metrics.exact as module
from natgrad import NonFiniteError, StepError
from natgrad.metrics import Dense, Exact
from natgrad.metrics.exact import operator_by_size
from natgrad.operators import Gram, LinearOperator, Rectangular, Sketched
from oracle import fisher as oracle
from oracle.operators import random_rows
from oracle.problems import MODELS, problem

DTYPE = torch.float64

# Thresholds under which each is chosen, whatever the size.
CHOICES: dict[type[LinearOperator], dict[str, int]] = {
    Rectangular: {},
    Gram: {"RECTANGULAR": 0, "FEW": 0},
    Sketched: {"RECTANGULAR": 0, "FEW": 0, "GRAM": 0},
}
every_choice = pytest.mark.parametrize("choice", CHOICES, ids=lambda kind: kind.__name__)


def force(monkeypatch: pytest.MonkeyPatch, choice: type[LinearOperator]) -> None:
    for name, value in CHOICES[choice].items():
        monkeypatch.setattr(module, name, value)


def gradient(model: nn.Module) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(3)
    return {n: torch.randn(p.shape, dtype=DTYPE, generator=source) for n, p in model.named_parameters()}


@pytest.mark.parametrize("examples", [1, 10])  # fewer rows than the 13 parameters, and more
def test_it_chooses_by_the_fewer_of_rows_and_parameters(
    examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = random_rows(0, 3, 3, examples)
    least = min(len(rows), 13)
    assert isinstance(operator_by_size(rows), Rectangular)
    monkeypatch.setattr(module, "JACOBIAN", len(rows) * 13)
    assert isinstance(operator_by_size(rows), Rectangular)
    monkeypatch.setattr(module, "JACOBIAN", len(rows) * 13 - 1)
    assert isinstance(operator_by_size(rows), Gram)
    monkeypatch.setattr(module, "JACOBIAN", 10**6)
    monkeypatch.setattr(module, "FEW", least)
    monkeypatch.setattr(module, "RECTANGULAR", 0)
    assert isinstance(operator_by_size(rows), Rectangular)
    monkeypatch.setattr(module, "FEW", least - 1)
    assert isinstance(operator_by_size(rows), Gram)
    monkeypatch.setattr(module, "RECTANGULAR", 13)
    assert isinstance(operator_by_size(rows), Rectangular if len(rows) >= 13 else Gram)
    monkeypatch.setattr(module, "RECTANGULAR", 12)
    assert isinstance(operator_by_size(rows), Gram)
    monkeypatch.setattr(module, "GRAM", least)
    chosen = operator_by_size(rows)
    assert isinstance(chosen, Gram)
    assert len(chosen.cholesky(0.1)[0]) == least  # "dense" where parameters are fewer
    monkeypatch.setattr(module, "GRAM", least - 1)
    assert isinstance(operator_by_size(rows), Sketched)


@every_choice
@pytest.mark.parametrize("model", MODELS)
def test_every_choice_gives_the_step_of_dense(
    model: str, choice: type[LinearOperator], show: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, choice)
    one = problem(model, "ce")
    exact, dense = (show(metric, one.model, one.loss) for metric in (Exact(), Dense()))
    for shown in (exact, dense):
        shown.observe(one.x, one.y)
    assert isinstance(exact.estimate.operator(), choice)
    torch.testing.assert_close(exact.dense(), dense.dense())
    g = gradient(one.model)
    for damping in (1e-4, 0.1, 10.0):
        found, expected = (oracle.flat(shown.estimate.solve(g, damping, 0)) for shown in (exact, dense))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8 / damping)


@every_choice
def test_some_parameters_alone(
    choice: type[LinearOperator], show: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, choice)
    one = problem("linear", "mse")
    exact, dense = (show(metric, one.model, one.loss) for metric in (Exact(), Dense()))
    g = gradient(one.model)
    part = {name: g[name] for name in ("0.weight", "2.bias")}
    for shown in (exact, dense):
        shown.observe(one.x, one.y)
    found, expected = (shown.estimate.solve(part, 0.1, 0) for shown in (exact, dense))
    for name in part:
        torch.testing.assert_close(found[name], expected[name])


@every_choice
def test_a_state_has_nothing_of_past_steps(
    choice: type[LinearOperator], show: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, choice)
    one = problem("linear", "mse")
    first, second = (show(Exact(), one.model, one.loss) for _ in range(2))
    g = gradient(one.model)
    first.observe(one.x + 1, one.y, step=0)
    first.estimate.solve(g, 0.1, 0)
    state = first.estimate.state_dict()
    second.estimate.load_state_dict(state)
    with pytest.raises(StepError, match="observed"):
        second.estimate.operator()
    for shown in (first, second):
        shown.observe(one.x, one.y, step=1)
    found, again = (shown.estimate.solve(g, 0.1, 1) for shown in (first, second))
    assert all(torch.equal(found[name], again[name]) for name in found)


@every_choice
def test_errors(choice: type[LinearOperator], show: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, choice)
    one = problem("linear", "ce")
    shown = show(Exact(), one.model, one.loss)
    with pytest.raises(StepError, match="observed"):
        shown.estimate.operator()
    with pytest.raises(NonFiniteError, match="0.weight"):
        shown.observe(one.x * float("nan"), one.y)
