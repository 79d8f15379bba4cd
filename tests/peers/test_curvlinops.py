"""natgrad equals curvlinops 3.0.1 where both define the same matrix (its differences are in test_differences.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import natgrad
from peers import networks
from peers.networks import close, dense, from_curvlinops, in_batches

curvlinops = pytest.importorskip("curvlinops", reason=networks.SKIPPED)

# linear_operator, which curvlinops imports at its first product, compiles with it
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

Problem = tuple[Any, Any, Any, Any]


@pytest.fixture(params=networks.MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=networks.LOSSES)
def problem(request: pytest.FixtureRequest, name: str) -> Problem:
    """(model, loss, x, y)."""
    (model, x), (loss, y) = networks.network(name), networks.loss_and_targets(request.param)
    return model, loss, x, y


@pytest.mark.parametrize("metric", ["dense", "gram", "matrixfree"])
def test_the_gauss_newton_matrix(problem: Problem, metric: str) -> None:
    model, loss, x, y = problem
    theirs = from_curvlinops(curvlinops.GGNLinearOperator, model, loss, in_batches(x, y))
    close(dense(natgrad.fisher(model, loss, in_batches(x, y), metric=metric)), theirs)


def test_the_hessian(problem: Problem) -> None:
    model, loss, x, y = problem
    theirs = from_curvlinops(curvlinops.HessianLinearOperator, model, loss, in_batches(x, y))
    close(dense(natgrad.hessian(model, loss, in_batches(x, y))), theirs)


@pytest.mark.parametrize(
    ("metric", "build"), [("kfac", "KFACLinearOperator"), ("ekfac", "EKFACLinearOperator")]
)
def test_exact_kronecker_factors(problem: Problem, metric: str, build: str) -> None:
    """Bias and weight in one block, positions of a convolution expanded: A their mean, G their sum."""
    model, loss, x, y = problem
    theirs = from_curvlinops(
        getattr(curvlinops, build),
        model,
        loss,
        in_batches(x, y),
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    close(dense(natgrad.fisher(model, loss, in_batches(x, y), metric=metric)), theirs)


def test_reduced_positions(problem: Problem) -> None:
    model, loss, x, y = problem
    theirs = from_curvlinops(
        curvlinops.KFACLinearOperator,
        model,
        loss,
        in_batches(x, y),
        fisher_type="type-2",
        separate_weight_and_bias=False,
        kfac_approx="reduce",
    )
    metric = natgrad.KFAC(kind="exact", sharing="reduce")
    close(dense(natgrad.fisher(model, loss, in_batches(x, y), metric=metric)), theirs)


def test_factors_of_weight_and_bias_apart_are_the_blocks_of_ours(problem: Problem) -> None:
    model, loss, x, y = problem
    theirs = from_curvlinops(
        curvlinops.KFACLinearOperator,
        model,
        loss,
        in_batches(x, y),
        fisher_type="type-2",
        separate_weight_and_bias=True,
    )
    ours = natgrad.fisher(model, loss, in_batches(x, y), metric="kfac")
    start = 0
    for name, parameter in model.named_parameters():
        end = start + parameter.numel()
        close(ours.restrict([name]).to_dense(), theirs[start:end, start:end])
        start = end


@pytest.mark.parametrize("loss_name", ["cross-entropy-mean", "cross-entropy-sum"])
def test_the_empirical_fisher(name: str, loss_name: str) -> None:
    (model, x), (loss, y) = networks.network(name), networks.loss_and_targets(loss_name)
    data = in_batches(x, y)
    theirs = from_curvlinops(curvlinops.EFLinearOperator, model, loss, data)
    close(dense(natgrad.fisher(model, loss, data, metric="dense", kind="empirical")), theirs)
    factors = from_curvlinops(
        curvlinops.KFACLinearOperator,
        model,
        loss,
        data,
        fisher_type="empirical",
        separate_weight_and_bias=False,
    )
    close(dense(natgrad.fisher(model, loss, data, metric="kfac", kind="empirical")), factors)


@pytest.mark.parametrize("loss_name", networks.LOSSES)
def test_outputs_at_every_token(loss_name: str) -> None:
    (model, x), (loss, y) = networks.network("tokens"), networks.loss_and_targets(loss_name, 6)
    theirs = from_curvlinops(curvlinops.GGNLinearOperator, model, loss, in_batches(x, y))
    close(dense(natgrad.fisher(model, loss, in_batches(x, y), metric="matrixfree")), theirs)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_factors_with_a_class_at_every_token(reduction: str) -> None:
    (model, x), (loss, y) = (
        networks.network("tokens"),
        networks.loss_and_targets(f"cross-entropy-{reduction}", 6),
    )
    theirs = from_curvlinops(
        curvlinops.KFACLinearOperator,
        model,
        loss,
        in_batches(x, y),
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    close(dense(natgrad.fisher(model, loss, in_batches(x, y), metric="kfac")), theirs)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("special", ["weight", "ignore_index", "label_smoothing"])
def test_what_cross_entropy_can_be_told(name: str, special: str, reduction: str) -> None:
    model, x = networks.network(name)
    _, y = networks.loss_and_targets("cross-entropy-mean")
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    options: dict[str, Any] = {"weight": weight, "ignore_index": 1, "label_smoothing": 0.1}
    loss = torch.nn.CrossEntropyLoss(**{special: options[special]}, reduction=reduction)
    theirs = from_curvlinops(curvlinops.GGNLinearOperator, model, loss, [(x, y)])
    close(dense(natgrad.fisher(model, loss, (x, y), metric="matrixfree")), theirs)
    close(natgrad.fisher(model, loss, (x, y), metric="dense").to_dense(), theirs)
