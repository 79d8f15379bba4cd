"""An operator that is known by its products answers as its dense matrix does, or says how far off it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import natgrad.operators.matrixfree as module
from natgrad import ConfigError, NotPositiveDefiniteError
from natgrad.errors import ConvergenceWarning
from natgrad.operators import Dense, Diagonal, MatrixFree, ParameterSpace
from oracle.operators import DTYPE, generator, positive_definite, random_rows, submatrix
from oracle.operators import Case as OracleCase

TIGHT = {"rtol": 1e-8, "atol": 1e-8}


def multiplied(space: ParameterSpace, matrix: Tensor) -> Callable:
    return lambda rows: space.unflatten_rows(space.flatten_rows(rows) @ matrix)


def of_rows(seed: int, m: int, n: int) -> OracleCase:
    rows, J = random_rows(seed, m, n, 2 * (m * n + m + 1))
    return OracleCase(MatrixFree(rows.space, rows=rows, dtype=DTYPE), J.T @ J)


def of_product(seed: int, m: int, n: int) -> OracleCase:
    space = ParameterSpace({"layer.weight": (m, n), "layer.bias": (m,), "temperature": ()})
    matrix = positive_definite(space.numel, generator(seed))
    return OracleCase(MatrixFree(space, multiplied(space, matrix), dtype=DTYPE), matrix)


def of_both(seed: int, m: int, n: int) -> OracleCase:
    rows, J = random_rows(seed, m, n, 1)
    product = of_product(seed, m, n)
    operator = MatrixFree(rows.space, product.operator.product, rows, dtype=DTYPE)
    return OracleCase(operator, product.dense + J.T @ J)


def guided(seed: int, m: int, n: int) -> OracleCase:
    case = of_product(seed, m, n)
    near = Diagonal(case.operator.space, case.operator.space.unflatten(case.dense.diagonal()))
    return OracleCase(
        MatrixFree(case.operator.space, case.operator.product, dtype=DTYPE, preconditioner=near), case.dense
    )


CASES = {f.__name__: f for f in (of_rows, of_product, of_both, guided)}
every_kind = pytest.mark.parametrize("kind", CASES)
draws = given(seed=st.integers(0, 10_000), m=st.integers(1, 4), n=st.integers(1, 4))
few = settings(max_examples=6)


def agrees(operator, dense: Tensor) -> None:
    identity = torch.eye(len(dense), dtype=DTYPE)
    damped = dense + 0.3 * identity
    assert_close(operator.to_dense(), dense, **TIGHT)
    assert_close(operator @ identity, dense, **TIGHT)
    assert_close(operator.solve(identity), torch.linalg.inv(dense), **TIGHT)
    assert_close(operator.solve(identity, 0.3), torch.linalg.inv(damped), **TIGHT)
    assert_close(operator.pinv_solve(identity), torch.linalg.inv(dense), **TIGHT)
    for damping in (0.0, 0.3):
        root = operator.sqrt_matmul(identity, damping)
        assert_close(root @ root, dense + damping * identity, **TIGHT)
    assert_close(operator.diagonal(), dense.diagonal(), **TIGHT)
    assert_close(operator.trace(), dense.trace(), **TIGHT)
    assert_close(operator.logdet(), dense.logdet(), **TIGHT)
    assert_close(operator.logdet(0.3), damped.logdet(), **TIGHT)
    assert_close(operator.eigenvalues(), torch.linalg.eigvalsh(dense).flip(0), **TIGHT)
    assert_close(operator.eigenvalues(1), torch.linalg.eigvalsh(dense)[-1:], **TIGHT)
    assert_close((1.5 * operator).to_dense(), 1.5 * dense, **TIGHT)
    assert_close(
        (1.5 * operator).solve(identity, 0.1), torch.linalg.inv(1.5 * dense + 0.1 * identity), **TIGHT
    )
    assert_close(operator.damped(0.3).solve(identity), torch.linalg.inv(damped), **TIGHT)
    assert (operator @ identity[:, :0]).shape == (len(dense), 0)
    assert operator.solve(identity[:, :0], 0.1).shape == (len(dense), 0)
    assert operator.sample(0).shape == (0, len(dense))


@every_kind
@few
@draws
def test_agrees_with_the_dense_matrix(kind: str, seed: int, m: int, n: int) -> None:
    case = CASES[kind](seed, m, n)
    agrees(case.operator, case.dense)


@every_kind
@settings(max_examples=3)
@draws
def test_agrees_by_iteration_alone(kind: str, seed: int, m: int, n: int) -> None:
    case = CASES[kind](seed, m, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SMALL", 0)
        # As many probes as parameters are exact, and as many Lanczos steps; only the log-determinant is a draw.
        operator, dense = case.operator, case.dense
        values = torch.linalg.eigvalsh(dense).flip(0)
        assert_close(operator.eigenvalues(), values, **TIGHT)
        assert_close(operator.eigenvalues(1), values[:1], **TIGHT)
        assert_close(operator.trace(), dense.trace(), **TIGHT)
        assert_close(operator.diagonal(), dense.diagonal(), **TIGHT)
        value, error = operator.logdet_estimate(0.3, probes=200, generator=generator(0))
        exact = (dense + 0.3 * torch.eye(len(dense), dtype=DTYPE)).logdet()
        assert abs(value - exact) <= 5 * error + 1e-8
        assert abs(operator.logdet(0.3) - exact) <= 5 * operator.logdet_estimate(0.3).standard_error + 1e-8


@every_kind
@pytest.mark.parametrize(
    "names", [("layer.bias",), ("temperature", "layer.weight"), ("layer.bias", "temperature")]
)
def test_a_restriction_is_the_submatrix(kind: str, names: tuple[str, ...]) -> None:
    case = CASES[kind](2, 3, 2)
    agrees(case.operator.restrict(names), submatrix(case, names))


@every_kind
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_samples_have_the_inverse_as_covariance(kind: str, damping: float) -> None:
    case, count = CASES[kind](1, 3, 2), 4000
    samples = case.operator.sample(count, damping=damping, generator=generator(11))
    covariance = torch.linalg.inv(case.dense + damping * torch.eye(len(case.dense), dtype=DTYPE))
    variances = covariance.diagonal()
    error = ((variances[:, None] * variances + covariance.square()) / count).sqrt()
    assert ((samples.T @ samples / count - covariance).abs() < 4 * error).all()


def test_estimates_are_right_within_their_errors() -> None:
    space = ParameterSpace({"w": (10, 10)})
    matrix = positive_definite(100, generator(0))
    operator = MatrixFree(space, multiplied(space, matrix), dtype=DTYPE)
    value, error = operator.trace_estimate(30, generator(1))
    assert error > 0
    assert abs(value - matrix.trace()) < 4 * error
    value, error = operator.diagonal_estimate(30, generator(1))
    assert ((value - matrix.diagonal()).abs() < 6 * error).all()
    assert (error > 0).all()


def test_what_rows_know_exactly_has_no_error() -> None:
    case = of_rows(0, 3, 3)
    for found, exact in (
        (case.operator.trace_estimate(3), case.dense.trace()),
        (case.operator.diagonal_estimate(3), case.dense.diagonal()),
    ):
        assert_close(found.value, exact)
        assert not found.standard_error.any()


def test_a_solution_says_how_it_went() -> None:
    case = of_product(3, 4, 4)
    assert case.operator.convergence is None
    b = torch.randn(len(case.dense), dtype=DTYPE)
    case.operator.solve(b, 0.1)
    record = case.operator.convergence
    assert record.reason == "residual"
    assert record.residual < 1e-11
    hurried = MatrixFree(case.operator.space, case.operator.product, dtype=DTYPE, limit=3)
    with pytest.warns(ConvergenceWarning, match="3 iterations"):
        hurried.solve(b, 0.1)
    loose = MatrixFree(case.operator.space, case.operator.product, dtype=DTYPE, tolerance=1e-2)
    x = loose.solve(b, 0.1)
    assert 1e-12 < (case.dense @ x + 0.1 * x - b).norm() / b.norm() <= 1e-2


def test_a_good_guide_saves_iterations() -> None:
    space = ParameterSpace({"w": (200,)})
    scales = torch.logspace(0, -6, 200, dtype=DTYPE)
    matrix = scales.diag() + 1e-9 * positive_definite(200, generator(0))
    plain = MatrixFree(space, multiplied(space, matrix), dtype=DTYPE, tolerance=1e-8)
    near = MatrixFree(
        space,
        multiplied(space, matrix),
        dtype=DTYPE,
        tolerance=1e-8,
        preconditioner=Diagonal(space, {"w": scales}),
    )
    b = torch.randn(200, dtype=DTYPE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        plain.solve(b, 1e-7)
    x = near.solve(b, 1e-7)
    assert_close(x, torch.linalg.solve(matrix + 1e-7 * torch.eye(200, dtype=DTYPE), b), rtol=1e-4, atol=1e-2)
    assert 10 * near.convergence.iterations < plain.convergence.iterations
    near.solve(b)  # undamped, the guide has a floor of its own
    assert near.convergence.residual < 1e-7


@pytest.mark.filterwarnings("ignore::natgrad.errors.ConvergenceWarning")
def test_a_singular_operator_needs_damping() -> None:
    rows, _ = random_rows(0, 3, 3, 2)
    few = MatrixFree(rows.space, rows=rows, dtype=DTYPE)
    b = torch.randn(rows.space.numel, dtype=DTYPE)
    flat = torch.linalg.eigh(positive_definite(13, generator(0)))
    matrix = (flat.eigenvectors * torch.linspace(0, 1, 13, dtype=DTYPE)) @ flat.eigenvectors.T
    singular = MatrixFree(rows.space, multiplied(rows.space, matrix), dtype=DTYPE)
    for operator in (few, singular):
        for of in (
            lambda F: F.solve(b),
            lambda F: F.logdet(),
            lambda F: F.sample(2, generator=generator(0)),
        ):
            with pytest.raises(NotPositiveDefiniteError):
                of(operator)
        assert torch.isfinite(operator.solve(b, 0.1)).all()
    assert_close(few.pinv_solve(b), torch.linalg.pinv(few.to_dense(), hermitian=True) @ b)
    assert_close(singular.pinv_solve(b), torch.linalg.pinv(matrix, hermitian=True) @ b)


def test_an_indefinite_matrix_has_products_and_solutions_only() -> None:
    space = ParameterSpace({"w": (4, 5)})
    Q = torch.linalg.qr(torch.randn(20, 20, dtype=DTYPE)).Q
    matrix = (Q * torch.linspace(-1, 2, 20, dtype=DTYPE)) @ Q.T
    hessian = MatrixFree(space, multiplied(space, matrix), dtype=DTYPE, definite=False)
    b = torch.randn(20, 2, dtype=DTYPE)
    assert_close(hessian @ b, matrix @ b)
    assert_close(hessian.solve(b, 0.01), torch.linalg.solve(matrix + 0.01 * torch.eye(20, dtype=DTYPE), b))
    assert_close(hessian.trace(), matrix.trace())
    assert_close(hessian.diagonal(), matrix.diagonal())
    assert_close(hessian.eigenvalues(), torch.linalg.eigvalsh(matrix).flip(0))
    for of in (
        lambda H: H.sample(1, 0.1),
        lambda H: H.logdet(3.0),
        lambda H: H.logdet_estimate(3.0),
        lambda H: H.sqrt_matmul(b),
        lambda H: H.pinv_solve(b),
    ):
        with pytest.raises(ConfigError, match="Hessian"):
            of(hessian)


def test_of_rows_can_be_converted_and_of_products_cannot() -> None:
    case = of_rows(1, 3, 2)
    single = case.operator.to(dtype=torch.float32)
    assert_close(single.to_dense(), case.dense.float(), rtol=1e-4, atol=1e-4)
    assert (single @ torch.ones(len(case.dense))).dtype == torch.float32
    with pytest.raises(ConfigError, match="convert the model"):
        of_product(1, 3, 2).operator.to(dtype=torch.float32)


def test_it_refuses_what_it_is_not(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = of_rows(1, 3, 2)
    with pytest.raises(ConfigError, match='"kfac"'):
        case.operator.save(tmp_path / "F")
    with pytest.raises(ConfigError, match="product, or rows"):
        MatrixFree(case.operator.space)
    for options in ({"limit": 0}, {"tolerance": 0.0}, {"tolerance": 2.0}):
        with pytest.raises(ConfigError, match="limit"):
            MatrixFree(case.operator.space, lambda v: v, **options)
    monkeypatch.setattr(module, "LARGEST_BYTES", 100)
    with pytest.raises(ConfigError, match="bytes"):
        case.operator.to_dense()


def test_large_ones_are_small_where_rows_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, J = random_rows(0, 6, 6, 2)  # 43 parameters, 4 rows
    monkeypatch.setattr(module, "SMALL", 10)
    operator, F = MatrixFree(rows.space, rows=rows, dtype=DTYPE), J.T @ J
    assert_close(operator.logdet(0.2), (F + 0.2 * torch.eye(43, dtype=DTYPE)).logdet())
    assert_close(operator.eigenvalues(6), torch.linalg.eigvalsh(F).flip(0)[:6], rtol=1e-8, atol=1e-9)
    same = Dense(rows.space, F)
    assert_close(operator.trace(), same.trace())


def test_sums_stay_matrix_free() -> None:
    kinds = list(CASES)
    for left, right in [(a, b) for a in kinds for b in kinds]:
        one, other = CASES[left](1, 3, 2), CASES[right](2, 3, 2)
        both = one.operator + other.operator
        assert isinstance(both, MatrixFree)
        agrees(both, one.dense + other.dense)
    assert (CASES["guided"](1, 3, 2).operator + CASES["guided"](2, 3, 2).operator).preconditioner is not None
