"""metric="lowrank" has the largest eigenvalues of the Fisher information, its trace, and a bound that holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from natgrad import ConfigError, StepError
from natgrad.metrics import LowRank
from oracle import fisher as oracle
from oracle.problems import MODELS, problem

DTYPE = torch.float64


@pytest.mark.parametrize("rank", [1, 4, 100])
@pytest.mark.parametrize("model", MODELS)
def test_it_is_the_best_of_its_rank(model: str, rank: int, show: Callable) -> None:
    one = problem(model, "ce")
    shown = show(LowRank(rank=rank), one.model, one.loss)
    shown.observe(one.x, one.y)
    operator = shown.estimate.operator()
    F = oracle.fisher(one.model, one.loss, one.x, one.y)
    values = torch.linalg.eigvalsh(F).flip(0).clamp_min(0)
    k = min(rank, len(F))
    torch.testing.assert_close(operator.values, values[:k], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(operator.trace(), F.trace())
    error = float(torch.linalg.matrix_norm(operator.to_dense() - F, ord=2))
    assert error <= operator.error * (1 + 1e-9) + 1e-12
    if k < len(F):
        rest = values[k:].mean()
        assert operator.error <= 1.2 * float(torch.maximum(rest, values[k] - rest)) + 1e-7


@pytest.mark.parametrize("kind", ["mc", "rademacher", "empirical"])
def test_at_full_rank_every_kind_is_whole(kind: str, show: Callable) -> None:
    one = problem("linear", "mse")
    shown = show(LowRank(rank=1000, kind=kind), one.model, one.loss)
    shown.observe(one.x, one.y)
    assert shown.estimate.operator().error < 1e-6
    if kind == "empirical":
        expected = oracle.empirical(one.model, one.loss, one.x, one.y)
        torch.testing.assert_close(shown.dense(), expected, rtol=1e-6, atol=1e-9)


def test_micro_batches_are_one_batch(show: Callable) -> None:
    one = problem("grouped conv2d", "ce")
    whole, parts = (show(LowRank(rank=3), one.model, one.loss) for _ in range(2))
    whole.observe(one.x, one.y)
    for k, (x, y) in enumerate(one.parts(2, 3)):
        parts.observe(x, y, first=k == 0)
    torch.testing.assert_close(parts.dense(), whole.dense(), rtol=1e-6, atol=1e-8)


def test_solve(show: Callable) -> None:
    one = problem("linear", "ce")
    shown = show(LowRank(rank=5), one.model, one.loss)
    shown.observe(one.x, one.y)
    A = shown.dense()
    g = {n: torch.randn_like(p) for n, p in one.model.named_parameters()}
    eye = torch.eye(len(A), dtype=DTYPE)
    solved = oracle.flat(shown.estimate.solve(g, 0.1, 0))
    torch.testing.assert_close(solved, torch.linalg.solve(A + 0.1 * eye, oracle.flat(g)))
    place = oracle.positions(one.model, ["0.bias"])
    part = shown.estimate.solve({"0.bias": g["0.bias"]}, 0.1, 0)
    inner = A[place[:, None], place] + 0.1 * eye[: len(place), : len(place)]
    torch.testing.assert_close(part["0.bias"], torch.linalg.solve(inner, g["0.bias"]))


def test_the_start_can_be_repeated(show: Callable) -> None:
    one = problem("linear", "ce")
    first, second = (show(LowRank(rank=2), one.model, one.loss) for _ in range(2))
    for shown in (first, second):
        shown.observe(one.x, one.y)
    assert torch.equal(first.dense(), second.dense())


def test_errors(show: Callable) -> None:
    one = problem("linear", "ce")
    with pytest.raises(StepError, match="loss"):
        show(LowRank(), one.model, one.loss).estimate.operator()
    for options, said in (({"rank": 0}, "rank"), ({"memory": -1.0}, "memory")):
        with pytest.raises(ConfigError, match=said):
            LowRank(**options)
