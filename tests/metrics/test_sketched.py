"""metric="sketched" is the Fisher information of the definition, and solves as Gram does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from natgrad import ConfigError, NonFiniteError, StepError
from natgrad.metrics import Dense, Sketched
from natgrad.operators import Sketched as SketchedOperator
from oracle import fisher as oracle
from oracle.problems import COVERED, MODELS, problem

DTYPE = torch.float64


def gradient(model: nn.Module) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(3)
    return {n: torch.randn(p.shape, dtype=DTYPE, generator=source) for n, p in model.named_parameters()}


@pytest.mark.parametrize("rank", [1, 32])
@pytest.mark.parametrize("model", MODELS)
def test_exact_is_the_definition(model: str, rank: int, show: Callable) -> None:
    one = problem(model, "ce", "mean")
    shown = show(Sketched(rank=rank), one.model, one.loss)
    shown.observe(one.x, one.y)
    F = oracle.fisher(one.model, one.loss, one.x, one.y)
    torch.testing.assert_close(shown.dense(), F)
    assert all(p.grad is None for p in one.model.parameters())
    g = gradient(one.model)
    for damping in (1e-3, 0.1):
        solved = oracle.flat(shown.estimate.solve(g, damping, 0))
        expected = torch.linalg.solve(F + damping * torch.eye(len(F), dtype=DTYPE), oracle.flat(g))
        torch.testing.assert_close(solved, expected, rtol=1e-7, atol=1e-8 / damping)


@pytest.mark.parametrize("kind", ["mc", "rademacher", "empirical"])
def test_other_kinds_are_those_of_dense(kind: str, show: Callable) -> None:
    one = problem("linear", "mse")
    sketched, dense = (show(metric(kind=kind), one.model, one.loss, seed=4) for metric in (Sketched, Dense))
    for shown in (sketched, dense):
        shown.observe(one.x, one.y)
    torch.testing.assert_close(sketched.dense(), dense.dense())


@pytest.mark.parametrize("model", COVERED)
def test_micro_batches_are_one_batch_and_a_step_begins_anew(model: str, show: Callable) -> None:
    one = problem(model, "mse")
    whole, parts = (show(Sketched(), one.model, one.loss) for _ in range(2))
    parts.observe(one.x + 1, one.y, step=0)  # forgotten
    for k, (x, y) in enumerate(one.parts(2, 3)):
        parts.observe(x, y, step=1, first=k == 0)
    whole.observe(one.x, one.y)
    g = gradient(one.model)
    torch.testing.assert_close(
        oracle.flat(parts.estimate.solve(g, 0.1, 1)), oracle.flat(whole.estimate.solve(g, 0.1, 1))
    )


def test_parameters_that_do_not_move_are_held(show: Callable) -> None:
    one = problem("linear", "ce")
    shown = show(Sketched(), one.model, one.loss)
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


def test_errors(show: Callable) -> None:
    one = problem("linear", "ce")
    shown = show(Sketched(), one.model, one.loss)
    with pytest.raises(StepError, match="observed"):
        shown.estimate.operator()
    with pytest.raises(NonFiniteError, match="0.weight"):
        shown.observe(one.x * float("nan"), one.y)
    shown.observe(one.x, one.y)
    assert shown.estimate.state_dict() == {}
    shown.estimate.load_state_dict({})
    with pytest.raises(StepError, match="observed"):
        shown.estimate.operator()
    for wrong in ({"rank": 0}, {"rank": 9, "largest": 8}, {"iterations": -1}, {"tolerance": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Sketched(**wrong)


def test_a_batch_without_signals_is_zero(show: Callable) -> None:
    one = problem("linear", "ce ignoring")
    shown = show(Sketched(), one.model, one.loss)
    shown.observe(one.x, torch.full_like(one.y, one.loss.ignore_index))
    assert not shown.dense().any()
    g = gradient(one.model)
    torch.testing.assert_close(oracle.flat(shown.estimate.solve(g, 0.5, 0)), 2 * oracle.flat(g))
