"""metric="gram" is the Fisher information of the definition, through inner products of its rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import natgrad.operators.gram as operators
from natgrad import ConfigError, NonFiniteError, StepError
from natgrad.linalg import Stage
from natgrad.metrics import Dense, Gram
from oracle import fisher as oracle
from oracle.problems import COVERED, MODELS, problem

DTYPE = torch.float64


def gradient(model: nn.Module) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(3)
    return {n: torch.randn(p.shape, dtype=DTYPE, generator=source) for n, p in model.named_parameters()}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("model", MODELS)
def test_exact_is_the_definition(model: str, reduction: str, show: Callable) -> None:
    one = problem(model, "ce", reduction)
    shown = show(Gram(), one.model, one.loss)
    shown.observe(one.x, one.y)
    F = oracle.fisher(one.model, one.loss, one.x, one.y)
    torch.testing.assert_close(shown.dense(), F)
    assert all(p.grad is None for p in one.model.parameters())
    g = gradient(one.model)
    solved = oracle.flat(shown.estimate.solve(g, 0.1, 0))
    expected = torch.linalg.solve(F + 0.1 * torch.eye(len(F), dtype=DTYPE), oracle.flat(g))
    torch.testing.assert_close(solved, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("loss", ["mse", "bce", "poisson", "gaussian", "ce ignoring", "ce weighted"])
def test_every_likelihood(loss: str, show: Callable) -> None:
    one = problem("linear", loss)
    shown = show(Gram(), one.model, one.loss)
    shown.observe(one.x, one.y)
    torch.testing.assert_close(shown.dense(), oracle.fisher(one.model, one.loss, one.x, one.y))


@pytest.mark.parametrize("kind", ["mc", "rademacher", "empirical"])
@pytest.mark.parametrize("model", MODELS)
def test_other_kinds_are_those_of_dense(model: str, kind: str, show: Callable) -> None:
    one = problem(model, "mse")
    gram, dense = (show(metric(kind=kind), one.model, one.loss, seed=4) for metric in (Gram, Dense))
    for shown in (gram, dense):
        shown.observe(one.x, one.y)
    torch.testing.assert_close(gram.dense(), dense.dense())
    if kind == "empirical":
        torch.testing.assert_close(gram.dense(), oracle.empirical(one.model, one.loss, one.x, one.y))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("model", COVERED)
def test_micro_batches_are_one_batch_and_a_step_begins_anew(
    model: str, reduction: str, show: Callable
) -> None:
    one = problem(model, "mse", reduction)
    whole, parts = (show(Gram(), one.model, one.loss) for _ in range(2))
    parts.observe(one.x + 1, one.y, step=0)  # forgotten
    for k, (x, y) in enumerate(one.parts(2, 3)):
        parts.observe(x, y, step=1, first=k == 0)
    whole.observe(one.x, one.y)
    torch.testing.assert_close(parts.dense(), whole.dense())


def test_parameters_that_do_not_move_are_held(show: Callable) -> None:
    one = problem("linear", "ce")
    shown = show(Gram(), one.model, one.loss)
    shown.observe(one.x, one.y)
    g = gradient(one.model)
    names = ["2.bias", "0.weight"]
    solved = shown.estimate.solve({name: g[name] for name in names}, 0.1, 0)
    place = oracle.positions(one.model, list(solved))
    F = oracle.fisher(one.model, one.loss, one.x, one.y)[place[:, None], place]
    expected = torch.linalg.solve(
        F + 0.1 * torch.eye(len(F), dtype=DTYPE), oracle.flat({name: g[name] for name in solved})
    )
    torch.testing.assert_close(oracle.flat(solved), expected)
    assert sorted(solved) == sorted(names)


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


def test_errors(show: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    one = problem("linear", "ce")
    shown = show(Gram(), one.model, one.loss)
    with pytest.raises(StepError, match="loss"):
        shown.estimate.operator()
    with pytest.raises(NonFiniteError, match="0.weight"):
        shown.observe(one.x * float("nan"), one.y)
    shown.observe(one.x, one.y)
    monkeypatch.setattr(operators, "LARGEST_BYTES", 10)
    with pytest.raises(ConfigError, match="bytes"):
        shown.estimate.solve(gradient(one.model), 0.1, 0)
    assert shown.estimate.state_dict() == {}
    shown.estimate.load_state_dict({})
    with pytest.raises(StepError, match="loss"):
        shown.estimate.operator()


def test_a_batch_without_signals_is_zero(show: Callable) -> None:
    one = problem("linear", "ce ignoring")
    shown = show(Gram(), one.model, one.loss)
    shown.observe(one.x, torch.full_like(one.y, one.loss.ignore_index))
    assert not shown.dense().any()
    g = gradient(one.model)
    torch.testing.assert_close(oracle.flat(shown.estimate.solve(g, 0.5, 0)), 2 * oracle.flat(g))
