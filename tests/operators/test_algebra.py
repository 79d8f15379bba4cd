"""Sums keep their closed form where there is one, and operators show themselves briefly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from natgrad.operators import (
    BlockDiagonal,
    Damped,
    Diagonal,
    EigenKronecker,
    Inverse,
    Kronecker,
    LinearOperator,
    LowRank,
    Restricted,
    ScaledIdentity,
    Sum,
)
from natgrad.operators import Dense as DenseOperator
from oracle.operators import (
    DTYPE,
    Case,
    blocks,
    damped,
    dense,
    diagonal,
    eigen,
    identity,
    linear_with_bias,
    low_rank,
    restricted_to_the_smaller_part,
    total,
)


def test_closed_forms_are_kept() -> None:
    one, two = diagonal(0, 2, 3).operator, diagonal(1, 2, 3).operator
    scalar = identity(0, 2, 3).operator
    assert isinstance(one + two, Diagonal)
    assert isinstance(scalar + scalar, ScaledIdentity)
    assert isinstance(scalar + one, Damped)
    assert isinstance(one + scalar, Damped)
    matrix = DenseOperator(one.space, one.to_dense())
    assert isinstance(matrix + matrix, DenseOperator)
    assert isinstance(matrix + one, Sum)
    assert isinstance(blocks(0, 2, 2).operator + blocks(1, 2, 2).operator, BlockDiagonal)
    assert isinstance(2.0 * linear_with_bias(0, 2, 2).operator, Kronecker)
    assert isinstance(2.0 * total(0, 2, 2).operator, Sum)


def test_damping_adds_up() -> None:
    operator = linear_with_bias(0, 2, 2).operator
    assert operator.damped(0.0) is operator
    twice = operator.damped(0.25).damped(0.5)
    assert isinstance(twice, Damped)
    assert twice.operator is operator
    assert twice.damping == 0.75
    both = damped(0, 2, 2).operator + damped(0, 2, 2).operator
    assert isinstance(both, Damped)
    assert both.damping == 0.6


def test_a_dense_operator_keeps_its_last_factor() -> None:
    case = diagonal(0, 2, 3)
    operator = DenseOperator(case.operator.space, case.dense)
    lower, _ = operator.cholesky(0.1)
    assert operator.cholesky(0.1)[0] is lower
    assert operator.cholesky(0.2)[0] is not lower
    torch.testing.assert_close(lower @ lower.T, case.dense + 0.1 * torch.eye(len(case.dense), dtype=DTYPE))


def test_inverses_keep_their_closed_form() -> None:
    for case, kind in [
        (identity, ScaledIdentity),
        (diagonal, Diagonal),
        (linear_with_bias, EigenKronecker),
        (eigen, EigenKronecker),
        (damped, EigenKronecker),
        (blocks, BlockDiagonal),
        (low_rank, LowRank),
        (total, Inverse),
    ]:
        operator = case(0, 2, 2).operator
        assert type(operator.inv(0.1)) is kind
    matrix = dense(0, 2, 2).operator
    assert matrix.inv().inv() is matrix
    assert isinstance(matrix.inv(0.1).inv(), Damped)


def test_restrictions_keep_their_closed_form() -> None:
    def part(case: Callable[[int, int, int], Case], *names: str) -> LinearOperator:
        return case(0, 2, 2).operator.restrict(names)

    assert isinstance(part(linear_with_bias, "fc.weight"), Kronecker)
    assert isinstance(part(linear_with_bias, "fc.bias"), DenseOperator)
    assert isinstance(part(linear_with_bias, "fc.bias", "fc.weight"), Kronecker)
    assert isinstance(part(eigen, "fc.weight"), Restricted)
    assert isinstance(part(eigen, "fc.bias"), DenseOperator)
    assert isinstance(part(eigen, "fc.bias", "fc.weight"), EigenKronecker)
    assert isinstance(part(damped, "fc.weight"), Damped)
    assert isinstance(part(blocks, "w"), Kronecker)  # the one block that is left
    assert isinstance(part(blocks, "t", "w"), BlockDiagonal)
    assert isinstance(part(restricted_to_the_smaller_part, "layer.bias"), DenseOperator)


def test_a_restriction_to_the_larger_part_forms_no_matrix_of_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operator = eigen(0, 2, 5).operator.restrict("fc.weight")
    monkeypatch.setattr(Restricted, "_dense", None)
    b = torch.ones(10, dtype=DTYPE)
    for damping in (0.0, 0.1):
        x = operator.solve(b, damping)
        torch.testing.assert_close(operator @ x + damping * x, b, rtol=1e-9, atol=1e-9)
        assert torch.isfinite(operator.logdet(damping))
        assert torch.isfinite(operator.sample(2, damping)).all()


def test_a_restriction_in_float32_stands_a_wide_spectrum() -> None:
    like = eigen(0, 20, 30).operator
    assert isinstance(like, EigenKronecker)
    S = torch.logspace(0, -7, 20 * 31, dtype=DTYPE).view(20, 31)
    operator = dataclasses.replace(like, values=S).restrict("fc.weight")
    b = torch.ones(600, dtype=DTYPE)
    expected = torch.linalg.solve(operator.to_dense() + 1e-4 * torch.eye(600, dtype=DTYPE), b)
    found = operator.to(dtype=torch.float32).solve(b.float(), damping=1e-4).double()
    assert (found - expected).norm() < 1e-2 * expected.norm()


def test_repr_is_one_line() -> None:
    assert repr(linear_with_bias(0, 2, 3).operator) == "Kronecker(8 × 8, float64, cpu, fc)"
    assert repr(identity(0, 2, 3).operator) == "ScaledIdentity(9 × 9, float64, cpu, layer.weight and 2 more)"
