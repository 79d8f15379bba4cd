"""metric="rectangular" is the Fisher information of the definition, through the singular values of its rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import natgrad.operators.rectangular as operators
from natgrad import ConfigError, NonFiniteError, StepError
from natgrad.metrics import Dense, Gram, Rectangular
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
    shown = show(Rectangular(), one.model, one.loss)
    shown.observe(one.x, one.y)
    F = oracle.fisher(one.model, one.loss, one.x, one.y)
    torch.testing.assert_close(shown.dense(), F)
    g = gradient(one.model)
    solved = oracle.flat(shown.estimate.solve(g, 0.1, 0))
    expected = torch.linalg.solve(F + 0.1 * torch.eye(len(F), dtype=DTYPE), oracle.flat(g))
    torch.testing.assert_close(solved, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["mc", "rademacher", "empirical"])
def test_other_kinds_are_those_of_dense(kind: str, show: Callable) -> None:
    one = problem("linear", "mse")
    own, dense = (show(metric(kind=kind), one.model, one.loss, seed=4) for metric in (Rectangular, Dense))
    for shown in (own, dense):
        shown.observe(one.x, one.y)
    torch.testing.assert_close(own.dense(), dense.dense())


@pytest.mark.parametrize("model", COVERED)
def test_micro_batches_are_one_batch_and_a_step_begins_anew(model: str, show: Callable) -> None:
    one = problem(model, "mse")
    whole, parts = (show(Rectangular(), one.model, one.loss) for _ in range(2))
    parts.observe(one.x + 1, one.y, step=0)  # forgotten
    for k, (x, y) in enumerate(one.parts(2, 3)):
        parts.observe(x, y, step=1, first=k == 0)
    whole.observe(one.x, one.y)
    torch.testing.assert_close(parts.dense(), whole.dense())


def test_small_singular_values_keep_their_digits(show: Callable) -> None:
    """Inputs that nearly depend on one another: what is left is below rounding in JJᵀ, and not in J."""
    model = nn.Linear(2, 1, bias=False).double()
    source = torch.Generator().manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(8, 2, dtype=DTYPE, generator=source)).Q.unbind(1)
    x, y = torch.stack([u, u + 1e-10 * v], 1), torch.zeros(8, 1, dtype=DTYPE)
    truth = torch.tensor([2.0, -3.0], dtype=DTYPE)
    errors = []
    for metric in (Rectangular(), Gram()):
        operator = show(metric, model, nn.MSELoss(reduction="sum")).observe(x, y).operator()
        target = operator.rows.matmul({"weight": truth.view(1, 1, 2)})[0]
        found = operator.dual_solve(target, 0.0)["weight"].view(2)
        errors.append(float((found - truth).norm()))
    assert errors[0] < 1e-4  # 1e-16 times the condition number of J
    assert errors[1] > 0.1


def test_errors(show: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    one = problem("linear", "ce")
    shown = show(Rectangular(), one.model, one.loss)
    with pytest.raises(StepError, match="observed"):
        shown.estimate.operator()
    with pytest.raises(NonFiniteError, match="0.weight"):
        shown.observe(one.x * float("nan"), one.y)
    shown.observe(one.x, one.y)
    assert shown.estimate.state_dict() == {}
    with monkeypatch.context() as patch:
        patch.setattr(operators, "LARGEST_BYTES", 10)
        with pytest.raises(ConfigError, match=r"bytes.*gram"):
            shown.estimate.solve(gradient(one.model), 0.1, 0)
    shown.estimate.load_state_dict({})
    with pytest.raises(StepError, match="observed"):
        shown.estimate.operator()


def test_a_batch_without_signals_is_zero(show: Callable) -> None:
    one = problem("linear", "ce ignoring")
    shown = show(Rectangular(), one.model, one.loss)
    shown.observe(one.x, torch.full_like(one.y, one.loss.ignore_index))
    assert not shown.dense().any()
    g = gradient(one.model)
    torch.testing.assert_close(oracle.flat(shown.estimate.solve(g, 0.5, 0)), 2 * oracle.flat(g))
