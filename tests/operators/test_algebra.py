"""Sums keep their closed form where there is one, and operators show themselves briefly."""

from __future__ import annotations

import torch

from natgrad.operators import BlockDiagonal, Damped, Diagonal, Kronecker, ScaledIdentity, Sum
from natgrad.operators import Dense as DenseOperator
from oracle.operators import DTYPE, blocks, damped, diagonal, identity, linear_with_bias, total


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


def test_repr_is_one_line() -> None:
    assert repr(linear_with_bias(0, 2, 3).operator) == "Kronecker(8 × 8, float64, cpu, fc)"
    assert repr(identity(0, 2, 3).operator) == "ScaledIdentity(9 × 9, float64, cpu, layer.weight and 2 more)"
