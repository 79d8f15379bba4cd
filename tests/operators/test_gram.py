"""The operator of few rows: its laws are in test_laws.py; here is what it alone can do, and refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import natgrad.operators.gram as module
from natgrad import ConfigError, NotPositiveDefiniteError
from natgrad.linalg import Stage
from natgrad.operators import FactoredRows, Gram, ParameterSpace
from natgrad.operators.layerrows import BatchRows
from oracle.operators import DTYPE, generator, random_rows


def few(seed: int = 0) -> tuple[Gram, torch.Tensor]:
    """13 parameters, 6 rows."""
    rows, J = random_rows(seed, 3, 3, 3)
    return Gram(rows), J


def test_the_kernel_and_its_spectrum() -> None:
    operator, J = few()
    assert_close(operator.kernel, J @ J.T)
    values = torch.linalg.eigvalsh(J.T @ J).flip(0)
    assert_close(operator.eigenvalues(), values, rtol=1e-9, atol=1e-12)
    assert_close(operator.eigenvalues(4), values[:4])


@pytest.mark.parametrize("damping", [1e-10, 1e-6, 1.0, 1e6])
def test_small_damping_keeps_its_digits(damping: float) -> None:
    operator, J = few()
    b = torch.randn(13, 2, dtype=DTYPE, generator=generator(1))
    values, vectors = torch.linalg.eigh(J.T @ J)
    values = values.clamp_min(0)
    values[:7] = 0  # of rank 6
    exact = vectors @ ((vectors.T @ b) / (values + damping)[:, None])
    x = operator.solve(b, damping)
    assert_close(x, exact, rtol=1e-9, atol=1e-9 / damping)
    # Where b is made by the rows, as a gradient is, nothing is divided by λ.
    r = torch.randn(6, dtype=DTYPE, generator=generator(2))
    found = operator.space.flatten(operator.dual_solve(r, damping))
    expected = J.T @ torch.linalg.solve(J @ J.T + damping * torch.eye(6, dtype=DTYPE), r)
    assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_undamped_it_has_a_pseudo_inverse_only() -> None:
    operator, J = few()
    b = torch.randn(13, dtype=DTYPE)
    for of in (lambda F: F.solve(b), lambda F: F.logdet(), lambda F: F.sample(1), lambda F: F.cholesky(0.0)):
        with pytest.raises(NotPositiveDefiniteError, match="pinv_solve"):
            of(operator)
    assert_close(operator.pinv_solve(b), torch.linalg.pinv(J.T @ J, hermitian=True) @ b, rtol=1e-8, atol=1e-8)
    assert_close(operator.dual_solve(J @ b, 0.0), operator.space.unflatten(torch.linalg.pinv(J) @ (J @ b)))
    root = operator.sqrt_matmul(torch.eye(13, dtype=DTYPE))
    assert_close(root @ root, J.T @ J)


def test_the_smaller_matrix_is_taken() -> None:
    rows, _ = random_rows(0, 2, 2, 10)  # 7 parameters, 20 rows
    many = Gram(rows)
    lower, stage = many.cholesky(0.1)
    assert lower.shape == (7, 7)
    assert stage is Stage.CHOLESKY
    assert "kernel" not in vars(many)
    lower, _ = few()[0].cholesky(0.1)
    assert lower.shape == (6, 6)


def test_what_would_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_BYTES", 100)
    operator, _ = few()
    with pytest.raises(ConfigError, match=r"288 bytes.*matrixfree"):
        operator.solve(torch.ones(13, dtype=DTYPE), 0.1)
    assert (operator @ torch.ones(13, dtype=DTYPE)).shape == (13,)  # a product needs no such matrix
    assert operator.trace() > 0


def test_targets_must_be_one_a_row() -> None:
    operator, _ = few()
    with pytest.raises(ConfigError, match="6 rows"):
        operator.dual_solve(torch.ones(5, dtype=DTYPE), 0.1)
    with pytest.raises(ConfigError, match="damping"):
        operator.dual_solve(torch.ones(6, dtype=DTYPE), -0.1)


def test_sums_join_the_rows() -> None:
    (left, J), (right, L) = few(0), few(1)
    both = left + right
    assert isinstance(both, Gram)
    assert len(both.rows) == 12
    assert_close(both.to_dense(), J.T @ J + L.T @ L)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_with_more_rows_than_parameters_their_gram_matrix_is_never_made(
    damping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """33,000 rows of 800 parameters have a matrix of 5 MB, and one of 8 GiB."""
    rows, J = random_rows(0, 2, 3, 40)
    monkeypatch.setattr(module, "LARGEST_BYTES", 8 * J.shape[1] ** 2)
    operator = Gram(rows)
    target = J @ torch.randn(J.shape[1], dtype=J.dtype, generator=generator(1))
    found = operator.space.flatten(operator.dual_solve(target, damping))
    square = J.T @ J + damping * torch.eye(J.shape[1], dtype=J.dtype)
    assert_close(found, torch.linalg.solve(square, J.T @ target), rtol=1e-8, atol=1e-10)
    exact = float(torch.linalg.cond(square)) ** 0.5
    assert operator.condition <= exact * (1 + 1e-8)
    if damping == 0:
        assert operator.condition == pytest.approx(exact)


def test_an_order_is_the_same_from_either_side() -> None:
    rows, J = random_rows(0, 2, 3, 40)
    _, S, right = torch.linalg.svd(J, full_matrices=False)
    target = torch.randn(len(J), dtype=J.dtype, generator=generator(1))
    damping = float(S[len(S) // 2]) ** 2
    found = Gram(rows).dual_solve(target, damping, 2.0)
    weights = 1 / (S**2 * (1 + (damping / S**2) ** 2))
    assert_close(rows.space.flatten(found), ((J.T @ target) @ right.T * weights) @ right)


@pytest.mark.parametrize("many", [False, True], ids=["JJᵀ", "JᵀJ"])
def test_an_undamped_solution_says_what_it_left_out(many: bool) -> None:
    """A singular value of 1e-10 is J's own, and rounding's in either matrix."""
    rows, J = random_rows(0, 2, 3, 40) if many else random_rows(0, 3, 3, 3)
    operator = Gram(rows)
    full = min(J.shape)
    assert operator.effective_rank(0.0) == full
    assert operator.stage(0.0) is Stage.CHOLESKY
    left, S, right = torch.linalg.svd(J, full_matrices=False)
    S[-1] = 1e-10 * S[0]
    spoilt = (left * S) @ right
    space = rows.space
    rest = space.unflatten_rows(spoilt)
    lacking = Gram(FactoredRows(space, (BatchRows(1, len(J), (), {n: v[None] for n, v in rest.items()}),)))
    assert lacking.effective_rank(0.0) == full - 1
    assert lacking.stage(0.0) is Stage.TRUNCATED
    assert lacking.stage(1.0) is Stage.CHOLESKY
    assert lacking.condition < 1e8


def test_what_was_removed_is_not_left_out() -> None:
    rows, J = random_rows(0, 3, 3, 3)
    columns = torch.full((len(J), 1), len(J) ** -0.5, dtype=DTYPE)
    assert Gram(rows.without(columns)).stage(0.0) is Stage.CHOLESKY


def mixed_and_full(seed: int = 0) -> tuple[Gram, Gram, Tensor]:
    rows, J = random_rows(seed, 3, 6, 8)
    assert len(J) < J.shape[1]
    return (
        Gram(rows, "mixed"),
        Gram(rows),
        J @ torch.randn(J.shape[1], dtype=DTYPE, generator=generator(seed)),
    )


@pytest.mark.parametrize("damping", [1e-4, 1e-2, 1.0, 1e6])
@pytest.mark.parametrize("centred", [False, True])
def test_mixed_precision_solves_to_the_same_digits(damping: float, centred: bool) -> None:
    mixed, full, target = mixed_and_full()
    if centred:
        columns = torch.full((len(target), 1), len(target) ** -0.5, dtype=DTYPE)
        mixed, full = (dataclasses.replace(one, rows=one.rows.without(columns)) for one in (mixed, full))
    top = float(torch.linalg.matrix_norm(full.kernel, 2))
    found, expected = (one.dual_solve(target, damping * top) for one in (mixed, full))
    for name, value in expected.items():
        assert_close(found[name], value, rtol=1e-9, atol=1e-11 * float(value.abs().max()))
    assert "kernel" not in vars(mixed)  # float64 was not needed
    assert mixed.stage(damping * top) is Stage.CHOLESKY
    assert mixed.condition == pytest.approx(full.condition, rel=1e-3)


def test_mixed_precision_gives_way_where_the_damping_is_small() -> None:
    mixed, full, target = mixed_and_full()
    damping = 1e-9 * float(torch.linalg.matrix_norm(full.kernel, 2))
    found, expected = (one.dual_solve(target, damping) for one in (mixed, full))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert "_single" not in vars(mixed)  # nor was K made in float32
    assert all(not v.any() for v in mixed.dual_solve(0 * target, 1.0).values())


def test_mixed_precision_is_kept_and_restored() -> None:
    mixed, _, target = mixed_and_full()
    again = type(mixed)._from_state(mixed.space, *mixed._state())
    assert again.precision == mixed._scaled(4.0).precision == "mixed"
    assert all(
        torch.equal(v, again.dual_solve(target, 1.0)[n]) for n, v in mixed.dual_solve(target, 1.0).items()
    )


@pytest.mark.parametrize("damping", [1e-14, 1e-6, 1.0])
def test_a_step_and_its_image(damping: float) -> None:
    """δ = Jᵀ(K + λI)⁻¹r, and J δ where it is told without another product."""
    operator, J = few()
    r = torch.randn(6, dtype=DTYPE, generator=generator(2))
    step, image = operator.dual_step(r, damping)
    delta = operator.space.flatten(step)
    assert_close(delta, operator.space.flatten(operator.dual_solve(r, damping)), rtol=1e-8, atol=1e-12)
    assert (image is None) == (damping < 1e-12)  # K's rounding would show: refined as ever
    if image is not None:
        assert_close(image, J @ delta, rtol=1e-8, atol=1e-10)


def test_the_gradients_norm_through_the_kernel_and_where_that_has_no_digits_left() -> None:
    operator, J = few()
    r = torch.randn(6, dtype=DTYPE, generator=generator(2))
    expected = pytest.approx(float((J.T @ r).norm()), rel=1e-12)
    assert operator.gradient_norm(r) == expected
    assert "kernel" not in vars(operator)
    assert operator.kernel.shape == (6, 6)
    assert operator.gradient_norm(r) == expected
    # Two rows that differ in their tenth digit: rᵀKr, which should be 1e-20, is rounding.
    twins = torch.randn(2, 5, dtype=DTYPE, generator=generator(3))
    twins[1] = twins[0] + 1e-10 * twins[1]
    space = ParameterSpace({"w": (5,)})
    operator = Gram(FactoredRows(space, (BatchRows(1, 2, (), {"w": twins[None]}),)))
    assert operator.kernel.shape == (2, 2)
    r = torch.tensor([1.0, -1.0], dtype=DTYPE)
    assert operator.gradient_norm(r) == pytest.approx(float((twins.T @ r).norm()), rel=1e-10)
