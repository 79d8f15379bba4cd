"""Rows from which some directions were removed, such as their mean: every operation is the projected matrix's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from natgrad import ConfigError
from natgrad.operators import FactoredRows, Gram, Rectangular, RowOperator
from oracle.operators import DTYPE, generator, random_rows


def centred(seed: int = 0) -> tuple[FactoredRows, Tensor]:
    """Rows without two directions, and the same as a matrix."""
    rows, J = random_rows(seed, 3, 4, 5)
    columns, _ = torch.linalg.qr(torch.randn(len(rows), 2, dtype=DTYPE, generator=generator(seed + 1)))
    return rows.without(columns), J - columns @ (columns.T @ J)


def vectors(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, generator=generator(7))


def test_products_and_matrices_are_the_projected_ones() -> None:
    rows, J = centred()
    space = rows.space
    v, w = vectors(3, space.numel), vectors(3, len(rows))
    assert_close(rows.dense(), J)
    assert_close(rows.matmul(space.unflatten_rows(v)), v @ J.T)
    assert_close(space.flatten_rows(rows.rmatmul(w)), w @ J)
    assert_close(space.flatten_rows(rows.product(space.unflatten_rows(v))), v @ J.T @ J)
    assert_close(rows.gram(), J @ J.T)
    assert_close(rows.covariance(), J.T @ J)
    diagonal = {name: d[None] for name, d in rows.squares().items()}
    assert_close(space.flatten_rows(diagonal)[0], (J.T @ J).diagonal())


def test_what_is_made_of_them_stays_centred() -> None:
    rows, J = centred()
    assert_close(rows.scaled(2.0).dense(), 2 * J)
    names = rows.space.names[:1]
    size = rows.space.restrict(names).numel
    assert_close(rows.restrict(names).dense(), J[:, :size])
    assert_close(rows.to(torch.float32, torch.device("cpu")).dense(), J.float(), rtol=1e-4, atol=1e-6)
    tensors, meta = rows.state()
    assert torch.equal(FactoredRows.from_state(rows.space, tensors, meta).dense(), rows.dense())
    with pytest.raises(ConfigError, match="join them first"):
        rows + rows


@pytest.mark.parametrize("kind", [Gram, Rectangular])
@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.3])
def test_least_squares_with_a_null_vector(kind: type[RowOperator], damping: float) -> None:
    """K has an exact null vector, and is solved all the same."""
    rows, J = centred()
    target = J @ vectors(J.shape[1])
    stacked = torch.cat([J, damping**0.5 * torch.eye(J.shape[1], dtype=DTYPE)])
    long = torch.cat([target, torch.zeros(J.shape[1], dtype=DTYPE)])
    expected = torch.linalg.pinv(stacked, rtol=1e-10) @ long
    found = rows.space.flatten(kind(rows).dual_solve(target, damping))
    assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [Gram, Rectangular])
@pytest.mark.parametrize("order", [1.0, 2.0, 3.5, float("inf")])
def test_an_order_leaves_small_singular_values_out(kind: type[RowOperator], order: float) -> None:
    rows, J = random_rows(3, 3, 4, 5)
    left, S, right = torch.linalg.svd(J, full_matrices=False)
    damping = float(S[len(S) // 2]) ** 2 * 1.01
    target = vectors(len(rows))
    kept = 1e-7 * S[0] < S
    weights = torch.where(kept, 1 / (S * (1 + (damping / S**2) ** order)), 0.0)
    found = rows.space.flatten(kind(rows).dual_solve(target, damping, order))
    assert_close(found, (weights * (target @ left)) @ right, rtol=1e-6, atol=1e-9)
    with pytest.raises(ConfigError, match="at least 1"):
        kind(rows).dual_solve(target, damping, 0.5)
