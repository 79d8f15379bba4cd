"""The laws of design.md for every representation: an operator is the dense matrix that its definition gives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from oracle.operators import CASES, DTYPE, Case, generator

TIGHT = {"rtol": 1e-9, "atol": 1e-9}

every_kind = pytest.mark.parametrize("kind", CASES)
draws = given(seed=st.integers(0, 10_000), m=st.integers(1, 4), n=st.integers(1, 4))
few = settings(max_examples=8)


def vectors(case: Case, seed: int, k: int = 3) -> torch.Tensor:
    return torch.randn(len(case.dense), k, dtype=DTYPE, generator=generator(seed + 77))


def eye(case: Case) -> torch.Tensor:
    return torch.eye(len(case.dense), dtype=DTYPE)


@every_kind
@few
@draws
def test_agrees_with_the_dense_matrix(kind: str, seed: int, m: int, n: int) -> None:
    case = CASES[kind](seed, m, n)
    assert case.operator.shape == case.dense.shape
    assert_close(case.operator.to_dense(), case.dense, **TIGHT)
    assert_close(case.operator @ eye(case), case.dense, **TIGHT)


@every_kind
@few
@draws
def test_is_symmetric_and_positive(kind: str, seed: int, m: int, n: int) -> None:
    case = CASES[kind](seed, m, n)
    x, y = vectors(case, seed, 2).unbind(1)
    assert_close((case.operator @ x) @ y, x @ (case.operator @ y), **TIGHT)
    assert x @ (case.operator @ x) >= 0


@every_kind
@pytest.mark.parametrize("damping", [0.0, 0.7])
@few
@draws
def test_solve_inverts(kind: str, damping: float, seed: int, m: int, n: int) -> None:
    case = CASES[kind](seed, m, n)
    b = vectors(case, seed)
    x = case.operator.solve(b, damping=damping)
    assert_close(case.operator @ x + damping * x, b, **TIGHT)
    assert_close(x, torch.linalg.solve(case.dense + damping * eye(case), b), **TIGHT)
    assert_close(case.operator.damped(damping).solve(b), x, **TIGHT)


@every_kind
@few
@draws
def test_scalars_agree_with_the_dense_matrix(kind: str, seed: int, m: int, n: int) -> None:
    case = CASES[kind](seed, m, n)
    operator, dense = case.operator, case.dense
    assert_close(operator.trace(), dense.trace(), **TIGHT)
    assert_close(operator.diagonal(), dense.diagonal(), **TIGHT)
    assert_close(operator.logdet(), dense.logdet(), **TIGHT)
    assert_close(operator.logdet(damping=0.4), (dense + 0.4 * eye(case)).logdet(), **TIGHT)
    eigenvalues = torch.linalg.eigvalsh(dense).flip(0)
    assert_close(operator.eigenvalues(), eigenvalues, **TIGHT)
    assert_close(operator.eigenvalues(k=1), eigenvalues[:1], **TIGHT)


@every_kind
def test_every_kind_of_vector_comes_back_as_it_came(kind: str) -> None:
    case = CASES[kind](3, 3, 2)
    operator, space = case.operator, case.operator.space
    block = vectors(case, 3)
    named = [space.unflatten(v) for v in block.unbind(1)]
    for of in (lambda v: operator @ v, operator.solve, lambda v: operator.solve(v, damping=0.2)):
        columns = of(block)
        assert columns.shape == block.shape
        for k in range(block.shape[1]):
            assert_close(of(block[:, k]), columns[:, k], **TIGHT)
            result = of(named[k])
            assert list(result) == list(space.names)
            assert {name: tuple(t.shape) for name, t in result.items()} == space.shapes
            assert_close(space.flatten(result), columns[:, k], **TIGHT)
    assert (operator @ block[:, :0]).shape == (len(case.dense), 0)


@every_kind
@few
@draws
def test_the_metric(kind: str, seed: int, m: int, n: int) -> None:
    case = CASES[kind](seed, m, n)
    operator, space = case.operator, case.operator.space
    block = vectors(case, seed, 4)
    u, v = block[:, 0], block[:, 1]
    inner = u @ case.dense @ v
    assert_close(operator.inner(u, v), inner, **TIGHT)
    assert_close(operator.inner(space.unflatten(u), v), inner, **TIGHT)
    assert_close(operator.norm(u), (u @ case.dense @ u).sqrt(), **TIGHT)
    assert_close(operator.norm(space.unflatten(u)), operator.norm(u), **TIGHT)
    cosine = inner / operator.norm(u) / operator.norm(v)
    assert_close(operator.angle(u, v).cos(), cosine, **TIGHT)
    assert_close(operator.angle(space.unflatten(u), space.unflatten(v)), operator.angle(u, v), **TIGHT)
    # Blocks go column by column; one vector goes with every column.
    left, right = block[:, :2], block[:, 2:]
    for of in (operator.inner, operator.angle):
        assert_close(of(left, right), torch.stack([of(left[:, k], right[:, k]) for k in (0, 1)]), **TIGHT)
        assert_close(of(left, v), torch.stack([of(left[:, k], v) for k in (0, 1)]), **TIGHT)
    assert_close(operator.norm(left), torch.stack([operator.norm(left[:, k]) for k in (0, 1)]), **TIGHT)


@every_kind
def test_angles_near_zero_and_pi_keep_their_digits(kind: str) -> None:
    case = CASES[kind](5, 3, 2)
    u, w = vectors(case, 5, 2).unbind(1)
    w = w - u * (case.operator.inner(u, w) / case.operator.inner(u, u))  # at a right angle to u
    assert_close(case.operator.angle(u, w), torch.tensor(math.pi / 2, dtype=DTYPE), **TIGHT)
    slope = 1e-9 * case.operator.norm(w) / case.operator.norm(u)
    assert_close(case.operator.angle(u, u + 1e-9 * w), slope, rtol=1e-5, atol=0)
    assert_close(math.pi - case.operator.angle(u, -u - 1e-9 * w), slope, rtol=1e-5, atol=1e-15)
    assert case.operator.angle(u, 3 * u) < 1e-12


@every_kind
@few
@draws
def test_sums_and_multiples(kind: str, seed: int, m: int, n: int) -> None:
    case, other = CASES[kind](seed, m, n), CASES[kind](seed + 1, m, n)
    b = vectors(case, seed)
    scaled = 2.5 * case.operator
    assert_close(scaled.to_dense(), 2.5 * case.dense, **TIGHT)
    assert_close((case.operator * 2.5) @ b, 2.5 * case.dense @ b, **TIGHT)
    assert_close(scaled.solve(b, 0.1), torch.linalg.solve(2.5 * case.dense + 0.1 * eye(case), b), **TIGHT)
    both = case.operator + other.operator if case.operator.space == other.operator.space else scaled
    matrix = case.dense + other.dense if both is not scaled else 2.5 * case.dense
    assert_close(both.to_dense(), matrix, **TIGHT)
    assert_close(both @ b, matrix @ b, **TIGHT)
    assert_close(both.solve(b), torch.linalg.solve(matrix, b), **TIGHT)
    assert_close(both.diagonal(), matrix.diagonal(), **TIGHT)
    assert_close(both.logdet(0.2), (matrix + 0.2 * eye(case)).logdet(), **TIGHT)
    assert_close((0 * case.operator).to_dense(), torch.zeros_like(case.dense))


@every_kind
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_samples_have_the_inverse_as_covariance(kind: str, damping: float) -> None:
    case = CASES[kind](1, 3, 2)
    count = 4000
    samples = case.operator.sample(count, damping=damping, generator=generator(11))
    assert samples.shape == (count, len(case.dense))
    covariance = torch.linalg.inv(case.dense + damping * eye(case))
    variances = covariance.diagonal()
    error = ((variances[:, None] * variances + covariance.square()) / count).sqrt()
    assert ((samples.T @ samples / count - covariance).abs() < 4 * error).all()
    assert (samples.mean(0).abs() < 4 * (variances / count).sqrt()).all()
    again = case.operator.sample(count, damping=damping, generator=generator(11))
    assert torch.equal(samples, again)
    assert case.operator.sample(0).shape == (0, len(case.dense))
