"""metric="matrixfree" is the Fisher information by products; its solutions are those of the dense matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from natgrad import ConfigError, StepError
from natgrad.likelihoods import likelihood_from
from natgrad.metrics import LowRank, MatrixFree, Observation
from natgrad.operators import FactoredRows
from natgrad.tape import Batch
from natgrad.tape.output_curvature import of_likelihood
from natgrad.tape.replay import Replay, Snapshot
from oracle import fisher as oracle
from oracle.problems import MODELS, problem

DTYPE = torch.float64
TIGHT = {"rtol": 1e-8, "atol": 1e-9}


def gradient(model: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, dtype=DTYPE, generator=source) for n, p in model.named_parameters()}


@pytest.mark.parametrize("preconditioner", [None, "kfac"])
@pytest.mark.parametrize("model", MODELS)
def test_exact_is_the_definition(model: str, preconditioner: str | None, show: Callable) -> None:
    one = problem(model, "ce")
    shown = show(MatrixFree(preconditioner=preconditioner, progress=0.0), one.model, one.loss)
    shown.observe(one.x, one.y)
    F = oracle.fisher(one.model, one.loss, one.x, one.y)
    damped = F + 0.1 * torch.eye(len(F), dtype=DTYPE)
    g = gradient(one.model)
    torch.testing.assert_close(shown.dense(), F)
    operator = shown.estimate.operator()
    torch.testing.assert_close(operator @ oracle.flat(g), F @ oracle.flat(g))
    torch.testing.assert_close(operator.diagonal(), F.diagonal())
    torch.testing.assert_close(
        operator.solve(oracle.flat(g), 0.1), torch.linalg.solve(damped, oracle.flat(g)), **TIGHT
    )
    solved = oracle.flat(shown.estimate.solve(g, 0.1, 0))
    torch.testing.assert_close(solved, torch.linalg.solve(damped, oracle.flat(g)), **TIGHT)
    assert shown.estimate.convergence.reason == "residual"


@pytest.mark.parametrize("preconditioner", [None, "kfac"])
def test_parameters_that_do_not_move_are_held(preconditioner: str | None, show: Callable) -> None:
    one = problem("linear", "ce")
    shown = show(MatrixFree(preconditioner=preconditioner, progress=0.0), one.model, one.loss)
    shown.observe(one.x, one.y)
    g = gradient(one.model)
    some = {"0.weight": g["0.weight"], "2.bias": g["2.bias"]}
    place = oracle.positions(one.model, list(some))
    F = oracle.fisher(one.model, one.loss, one.x, one.y)[place[:, None], place]
    expected = torch.linalg.solve(F + 0.1 * torch.eye(len(F), dtype=DTYPE), oracle.flat(some))
    torch.testing.assert_close(oracle.flat(shown.estimate.solve(some, 0.1, 0)), expected, **TIGHT)


def test_a_solution_begins_at_the_last_one_and_stops_early(show: Callable) -> None:
    one = problem("linear", "ce", examples=40)
    cold, warm = (show(MatrixFree(progress=p), one.model, one.loss) for p in (0.0, 5e-4))
    for shown in (cold, warm):
        shown.observe(one.x, one.y)
    g = gradient(one.model)
    cold.estimate.solve(g, 1e-4, 0)
    warm.estimate.solve(g, 1e-4, 0)
    assert warm.estimate.convergence.iterations <= cold.estimate.convergence.iterations
    cold.estimate.solve(g, 1e-4, 0)
    assert cold.estimate.convergence.iterations <= 2  # it was there already
    # A restored estimate goes on from the same place.
    other = show(MatrixFree(progress=5e-4), one.model, one.loss)
    other.estimate.load_state_dict(warm.estimate.state_dict())
    other.observe(one.x, one.y, 1)
    warm.observe(one.x, one.y, 1)
    h = gradient(one.model, 5)
    assert torch.equal(
        oracle.flat(other.estimate.solve(h, 1e-3, 1)), oracle.flat(warm.estimate.solve(h, 1e-3, 1))
    )


def test_kfac_guides(show: Callable) -> None:
    """Layers of very different scale, which conjugate gradients alone are slow on."""
    one = problem("linear", "mse", examples=60)
    with torch.no_grad():
        one.x.mul_(torch.tensor([1.0, 30.0, 0.01], dtype=DTYPE))
    counts = []
    for preconditioner in (None, "kfac"):
        shown = show(MatrixFree(preconditioner=preconditioner, progress=0.0), one.model, one.loss)
        shown.observe(one.x, one.y)
        shown.estimate.solve(gradient(one.model), 1e-5, 0)
        counts.append(shown.estimate.convergence.iterations)
    assert 1.5 * counts[1] < counts[0]


@pytest.mark.parametrize("metric", [MatrixFree, LowRank])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_beyond_the_memory_are_replayed(metric: type, reduction: str, show: Callable) -> None:
    one = problem("spatial", "ce", reduction)
    batches = one.parts(2, 1, 2)
    first = show(MatrixFree(), one.model, one.loss)
    first.observe(*batches[0])
    enough = float(first.estimate.operator().rows.nbytes)
    chosen = metric(memory=1.5 * enough) if metric is MatrixFree else metric(rank=99, memory=1.5 * enough)
    shown = show(chosen, one.model, one.loss)
    snapshot = Snapshot.of(one.model)
    names = [name for name, _ in one.model.named_parameters()]
    for k, (x, y) in enumerate(batches):
        observe = shown.estimate.observe
        batch = Batch((x,), {}, y, len(x))
        replay = Replay.gauss_newton(
            snapshot, names, batch, lambda z: (z,), of_likelihood(likelihood_from(one.loss), y)
        )

        def with_replay(observation: Observation, observe=observe, replay=replay) -> None:
            observe(dataclasses.replace(observation, replay=replay))

        shown.estimate.observe = with_replay
        shown.observe(x, y, first=k == 0)
        shown.estimate.observe = observe
    F = oracle.fisher(one.model, one.loss, one.x, one.y)
    torch.testing.assert_close(shown.dense(), F, rtol=1e-6, atol=1e-9)
    if metric is MatrixFree:
        operator = shown.estimate.operator()
        assert isinstance(operator.rows, FactoredRows)
        assert operator.product is not None
        torch.testing.assert_close(operator.diagonal(), F.diagonal())
        torch.testing.assert_close(operator.restrict("0.bias").to_dense(), F[8:10, 8:10])


def test_errors(show: Callable) -> None:
    one = problem("linear", "ce")
    with pytest.raises(StepError, match="loss"):
        show(MatrixFree(), one.model, one.loss).estimate.operator()
    for options, said in (
        ({"preconditioner": "adam"}, "kfac"),
        ({"memory": float("nan")}, "memory"),
        ({"progress": 1.0}, "progress"),
        ({"limit": 0}, "limit"),
    ):
        with pytest.raises(ConfigError, match=said):
            MatrixFree(**options)
