"""What the metrics that are made of rows have in common: each is the Fisher information of the definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from natgrad import NonFiniteError, StepError
from natgrad.metrics import Dense, Exact, Gram, Rectangular, Sketched
from natgrad.metrics.rowmetric import RowMetric
from natgrad.operators import FactoredRows
from oracle import fisher as oracle
from oracle.problems import COVERED, MODELS, problem

DTYPE = torch.float64
METRICS: dict[str, Callable[..., RowMetric]] = {
    "exact": Exact,
    "gram": Gram,
    "rectangular": Rectangular,
    "sketched": Sketched,
    "sketched, rank 1": lambda **options: Sketched(rank=1, **options),
}
every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))


def gradient(model: nn.Module) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(3)
    return {n: torch.randn(p.shape, dtype=DTYPE, generator=source) for n, p in model.named_parameters()}


def solved_by(F: Tensor, g: Tensor, damping: float) -> Tensor:
    return torch.linalg.solve(F + damping * torch.eye(len(F), dtype=DTYPE), g)


@every_metric
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("model", MODELS)
def test_exact_is_the_definition(
    model: str, reduction: str, metric: Callable[..., RowMetric], show: Callable
) -> None:
    one = problem(model, "ce", reduction)
    shown = show(metric(), one.model, one.loss)
    shown.observe(one.x, one.y)
    F = oracle.fisher(one.model, one.loss, one.x, one.y)
    torch.testing.assert_close(shown.dense(), F)
    assert all(p.grad is None for p in one.model.parameters())
    g = gradient(one.model)
    for damping in (1e-3, 0.1):
        solved = oracle.flat(shown.estimate.solve(g, damping, 0))
        torch.testing.assert_close(
            solved, solved_by(F, oracle.flat(g), damping), rtol=1e-7, atol=1e-8 / damping
        )


@every_metric
@pytest.mark.parametrize("loss", ["mse", "bce", "poisson", "gaussian", "ce ignoring", "ce weighted"])
def test_every_likelihood(loss: str, metric: Callable[..., RowMetric], show: Callable) -> None:
    one = problem("linear", loss)
    shown = show(metric(), one.model, one.loss)
    shown.observe(one.x, one.y)
    torch.testing.assert_close(shown.dense(), oracle.fisher(one.model, one.loss, one.x, one.y))


@every_metric
@pytest.mark.parametrize("kind", ["mc", "rademacher", "empirical"])
def test_other_kinds_are_those_of_dense(kind: str, metric: Callable[..., RowMetric], show: Callable) -> None:
    one = problem("linear", "mse")
    own, dense = (show(of(kind=kind), one.model, one.loss, seed=4) for of in (metric, Dense))
    for shown in (own, dense):
        shown.observe(one.x, one.y)
    torch.testing.assert_close(own.dense(), dense.dense())
    if kind == "empirical":
        torch.testing.assert_close(own.dense(), oracle.empirical(one.model, one.loss, one.x, one.y))


@every_metric
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("model", COVERED)
def test_micro_batches_are_one_batch_and_a_step_begins_anew(
    model: str, reduction: str, metric: Callable[..., RowMetric], show: Callable
) -> None:
    one = problem(model, "mse", reduction)
    whole, parts = (show(metric(), one.model, one.loss) for _ in range(2))
    parts.observe(one.x + 1, one.y, step=0)  # forgotten
    for k, (x, y) in enumerate(one.parts(2, 3)):
        parts.observe(x, y, step=1, first=k == 0)
    whole.observe(one.x, one.y)
    torch.testing.assert_close(parts.dense(), whole.dense())
    g = gradient(one.model)
    torch.testing.assert_close(
        oracle.flat(parts.estimate.solve(g, 0.1, 1)), oracle.flat(whole.estimate.solve(g, 0.1, 1))
    )


@every_metric
def test_parameters_that_do_not_move_are_held(metric: Callable[..., RowMetric], show: Callable) -> None:
    one = problem("linear", "ce")
    shown = show(metric(), one.model, one.loss)
    shown.observe(one.x, one.y)
    g = gradient(one.model)
    whole = oracle.fisher(one.model, one.loss, one.x, one.y)
    for names in (["2.bias", "0.weight"], ["2.weight"]):
        solved = shown.estimate.solve({name: g[name] for name in names}, 0.1, 0)
        assert sorted(solved) == sorted(names)
        place = oracle.positions(one.model, list(solved))
        expected = solved_by(
            whole[place[:, None], place], oracle.flat({name: g[name] for name in solved}), 0.1
        )
        torch.testing.assert_close(oracle.flat(solved), expected)


def test_what_is_held_costs_one_matrix_for_all_solutions_of_a_step(
    show: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = problem("linear", "ce")
    shown = show(Gram(), one.model, one.loss)
    made: list[int] = []
    for name in ("gram", "covariance"):
        original = getattr(FactoredRows, name)
        monkeypatch.setattr(
            FactoredRows, name, lambda rows, of=original: (made.append(len(rows)), of(rows))[1]
        )
    for step in range(2):
        shown.observe(one.x, one.y, step=step)
        for damping in (0.1, 0.2):
            shown.estimate.solve({"2.weight": gradient(one.model)["2.weight"]}, damping, step)
    assert len(made) == 2


@every_metric
def test_errors(metric: Callable[..., RowMetric], show: Callable) -> None:
    one = problem("linear", "ce")
    shown = show(metric(), one.model, one.loss)
    with pytest.raises(StepError, match="observed"):
        shown.estimate.operator()
    with pytest.raises(NonFiniteError, match="0.weight"):
        shown.observe(one.x * float("nan"), one.y)
    shown.observe(one.x, one.y)
    assert shown.estimate.state_dict() == {}
    shown.estimate.load_state_dict({})
    with pytest.raises(StepError, match="observed"):
        shown.estimate.operator()


@every_metric
def test_a_batch_without_signals_is_zero(metric: Callable[..., RowMetric], show: Callable) -> None:
    one = problem("linear", "ce ignoring")
    shown = show(metric(), one.model, one.loss)
    shown.observe(one.x, torch.full_like(one.y, one.loss.ignore_index))
    assert not shown.dense().any()
    g = gradient(one.model)
    torch.testing.assert_close(oracle.flat(shown.estimate.solve(g, 0.5, 0)), 2 * oracle.flat(g))
