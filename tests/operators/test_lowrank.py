"""The operator of a few eigenpairs: its laws are in test_laws.py; here are its limits and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from natgrad import ConfigError, NotPositiveDefiniteError
from natgrad.metrics.lowrank import low_rank
from natgrad.operators import Dense, LowRank, ParameterSpace
from oracle.operators import DTYPE, generator

SPACE = ParameterSpace({"w": (4, 3), "b": (4,)})


def orthonormal(k: int) -> Tensor:
    return torch.linalg.qr(torch.randn(16, k, dtype=DTYPE, generator=generator(0))).Q.T.contiguous()


def test_without_a_remainder_it_is_singular() -> None:
    operator = LowRank(SPACE, orthonormal(3), torch.tensor([3.0, 2.0, 1.0], dtype=DTYPE))
    b = torch.randn(16, dtype=DTYPE)
    for of in (lambda F: F.solve(b), lambda F: F.logdet(), lambda F: F.sample(1)):
        with pytest.raises(NotPositiveDefiniteError):
            of(operator)
    assert_close(operator.pinv_solve(b), torch.linalg.pinv(operator.to_dense(), hermitian=True) @ b)
    assert_close(
        operator.solve(b, 0.1), torch.linalg.solve(operator.to_dense() + 0.1 * torch.eye(16, dtype=DTYPE), b)
    )


@pytest.mark.parametrize("k", [0, 16])
def test_none_and_all(k: int) -> None:
    values = torch.linspace(2, 1, k, dtype=DTYPE)
    operator = LowRank(SPACE, orthonormal(k), values, 0.0 if k else 0.7)
    dense = operator.to_dense()
    b = torch.randn(16, dtype=DTYPE)
    assert_close(operator.solve(b), torch.linalg.solve(dense, b))
    assert_close(operator.logdet(), dense.logdet())
    assert_close(operator.trace(), dense.trace())
    assert_close(operator.eigenvalues(), torch.linalg.eigvalsh(dense).flip(0))


def test_an_error_stays_with_multiples_and_parts() -> None:
    operator = LowRank(SPACE, orthonormal(2), torch.ones(2, dtype=DTYPE), 0.1, error=0.5)
    assert (2 * operator).error == 1.0
    assert operator.restrict("b").error == 0.5
    assert operator.to(dtype=torch.float32).error == 0.5


def test_what_does_not_fit() -> None:
    for vectors, values, rest, said in (
        (orthonormal(3), torch.ones(2, dtype=DTYPE), 0.0, "needs"),
        (orthonormal(3)[:, :5], torch.ones(3, dtype=DTYPE), 0.0, "needs"),
        (orthonormal(3), torch.ones(3, dtype=DTYPE), -1.0, "remainder"),
        (orthonormal(3), torch.ones(3, dtype=DTYPE), float("nan"), "remainder"),
    ):
        with pytest.raises(ConfigError, match=said):
            LowRank(SPACE, vectors, values, rest)


@pytest.mark.parametrize("rank", [1, 3, 8, 15, 16, 40])
@pytest.mark.parametrize("decay", [0.0, -2.0, -10.0])
def test_the_best_of_its_rank_and_its_error_bound_holds(rank: int, decay: float) -> None:
    Q = torch.linalg.qr(torch.randn(16, 16, dtype=DTYPE, generator=generator(4))).Q
    values = torch.logspace(0, decay, 16, dtype=DTYPE)
    F = (Q * values) @ Q.T
    found = low_rank(Dense(SPACE, F), rank)
    k = min(rank, 16)
    assert_close(found.values, values[:k], rtol=1e-7, atol=1e-9)
    assert_close(found.trace(), F.trace())
    if k < 16:
        assert found.remainder == pytest.approx(float(values[k:].mean()), rel=1e-6, abs=1e-9)
    error = float(torch.linalg.matrix_norm(found.to_dense() - F, ord=2))
    assert error <= found.error * (1 + 1e-9) + 1e-15
    best = float(torch.maximum(values[k] - values[k:].mean(), values[k:].mean())) if k < 16 else 0.0
    assert found.error <= 1.2 * best + 1e-7
