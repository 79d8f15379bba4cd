"""Iterations solve what a dense solver solves, say how they went, and stop when they are told to."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from natgrad import ConfigError, NotPositiveDefiniteError
from natgrad.linalg.iterate import conjugate_gradients, minimal_residuals
from natgrad.linalg.lanczos import Lanczos, function_product, largest_eigenpairs, norm_bound

DTYPE = torch.float64
CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, generator=generator(seed))


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    Q = torch.linalg.qr(randn(len(values), len(values), seed=seed)).Q
    A = (Q * values) @ Q.T
    return (A + A.T) / 2


class Counted:
    """A product that counts its calls and its vectors."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.calls, self.vectors = A, 0, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls, self.vectors = self.calls + 1, self.vectors + len(v)
        return v @ self.A


# ------------------------------------------------------------------------------------- conjugate gradients


@settings(max_examples=20)
@given(n=st.integers(1, 30), k=st.integers(0, 4), seed=st.integers(0, 1000))
def test_cg_solves_several_systems(n: int, k: int, seed: int) -> None:
    A, b = with_spectrum(torch.linspace(0.1, 3, n, dtype=DTYPE), seed), randn(k, n, seed=seed)
    x, record = conjugate_gradients(lambda v: v @ A, b, tolerance=1e-12)
    assert_close(x, torch.linalg.solve(A, b.T).T, rtol=1e-9, atol=1e-9)
    assert record.reason == "residual"
    assert record.residual <= 1e-12


def test_cg_needs_a_step_for_each_distinct_eigenvalue() -> None:
    values = torch.tensor([1.0, 2.0, 5.0], dtype=DTYPE).repeat(10)
    product = Counted(with_spectrum(values))
    b = randn(2, 30)
    x, record = conjugate_gradients(product, b, tolerance=1e-10)
    assert_close(x @ product.A, b)
    assert record.iterations == product.calls == 4  # three, and one that looks at the residual itself


def test_cg_ends_at_once_with_the_right_preconditioner() -> None:
    A, b = with_spectrum(torch.logspace(-6, 0, 40, dtype=DTYPE)), randn(3, 40)
    product, inverse = Counted(A), torch.linalg.inv(A)
    x, _ = conjugate_gradients(product, b, tolerance=1e-8, precondition=lambda v: v @ inverse)
    assert product.calls <= 4
    assert_close(x, torch.linalg.solve(A, b.T).T, rtol=1e-5, atol=1e-5)


def test_cg_leaves_finished_systems_alone_and_takes_zeros() -> None:
    A = with_spectrum(torch.linspace(0.01, 1, 50, dtype=DTYPE))
    eigenvector = torch.linalg.eigh(A)[1][:, 7]
    b = torch.stack([eigenvector, torch.zeros(50, dtype=DTYPE), randn(50)])
    product = Counted(A)
    x, _ = conjugate_gradients(product, b, tolerance=1e-10)
    assert_close(x, torch.linalg.solve(A, b.T).T, rtol=1e-7, atol=1e-7)
    assert torch.equal(x[1], torch.zeros(50, dtype=DTYPE))
    assert product.vectors < product.calls + 8  # the easy system took part in a few products only


def test_cg_goes_on_from_where_it_is_told_to_start() -> None:
    A, b = with_spectrum(torch.logspace(-3, 0, 40, dtype=DTYPE)), randn(2, 40)
    exact = torch.linalg.solve(A, b.T).T
    _, cold = conjugate_gradients(lambda v: v @ A, b, tolerance=1e-8)
    near = exact + 1e-7 * randn(2, 40, seed=1)
    x, warm = conjugate_gradients(lambda v: v @ A, b, tolerance=1e-8, start=near)
    assert warm.iterations < cold.iterations
    assert_close(x, exact, rtol=1e-4, atol=1e-4)
    assert_close(near, exact + 1e-7 * randn(2, 40, seed=1))  # left as it was


def test_cg_stops_when_progress_is_slow_by_the_formula() -> None:
    A, b, epsilon = with_spectrum(torch.logspace(-5, 0, 200, dtype=DTYPE)), randn(1, 200), 1e-2
    x, record = conjugate_gradients(lambda v: v @ A, b, tolerance=1e-12, progress=epsilon)
    assert record.reason == "progress"
    assert record.residual > 1e-12

    def height(steps: int) -> float:
        y, _ = conjugate_gradients(lambda v: v @ A, b, tolerance=1e-15, limit=steps)
        return float(0.5 * (y * (y @ A)).sum() - (b * y).sum())

    def slow(steps: int) -> bool:
        back = max(10, steps // 10)
        return steps > back and height(steps - back) - height(steps) < -back * epsilon * height(steps)

    assert slow(record.iterations)
    assert not slow(record.iterations - 1)
    assert_close(
        0.5 * (x * (x @ A)).sum() - (b * x).sum(), torch.tensor(height(record.iterations), dtype=DTYPE)
    )


def test_cg_says_where_it_was_stopped() -> None:
    A, b = with_spectrum(torch.logspace(-8, 0, 60, dtype=DTYPE)), randn(1, 60)
    x, record = conjugate_gradients(lambda v: v @ A, b, tolerance=1e-12, limit=5)
    assert (record.iterations, record.reason) == (5, "limit")
    assert record.residual == pytest.approx(float((b - x @ A).norm() / b.norm()), rel=1e-6)
    assert "5 iterations" in str(record)


def test_cg_knows_when_rounding_lets_it_go_no_further() -> None:
    A = with_spectrum(torch.logspace(-5, 0, 60, dtype=DTYPE)).float()
    b = randn(1, 60).float()
    x, record = conjugate_gradients(lambda v: v @ A, b, tolerance=1e-9, limit=5000)
    assert record.reason == "rounding"
    true = float((b - x @ A).norm() / b.norm())
    assert record.residual == pytest.approx(true, rel=0.2)  # what it says is true of x, not of the recurrence


def test_cg_meets_a_direction_of_negative_curvature() -> None:
    A = with_spectrum(torch.linspace(-1, 1, 20, dtype=DTYPE))
    with pytest.raises(NotPositiveDefiniteError, match="negative curvature"):
        conjugate_gradients(lambda v: v @ A, randn(1, 20), tolerance=1e-8)


# -------------------------------------------------------------------------------------------------- MINRES


@settings(max_examples=20)
@given(n=st.integers(1, 25), k=st.integers(0, 3), seed=st.integers(0, 1000))
def test_minres_solves_indefinite_systems(n: int, k: int, seed: int) -> None:
    values = torch.linspace(0.5, 3, n, dtype=DTYPE) * torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)
    A, b = with_spectrum(values, seed), randn(k, n, seed=seed + 1)
    x, record = minimal_residuals(lambda v: v @ A, b, tolerance=1e-11)
    assert_close(x, torch.linalg.solve(A, b.T).T, rtol=1e-8, atol=1e-8)
    assert record.residual <= 1e-10


def test_minres_minimises_the_residual_over_the_krylov_space() -> None:
    A, b = with_spectrum(torch.linspace(-2, 3, 30, dtype=DTYPE)), randn(1, 30)
    for steps in (1, 3, 6):
        x, record = minimal_residuals(lambda v: v @ A, b, tolerance=1e-14, limit=steps)
        powers = [b[0]]
        for _ in range(steps - 1):
            powers.append(A @ powers[-1])
        K = torch.linalg.qr(torch.stack(powers, 1)).Q
        best = torch.linalg.lstsq(A @ K, b[0]).solution
        assert_close(x[0], K @ best, rtol=1e-6, atol=1e-8)
        assert record.reason == "limit"


def test_minres_leaves_what_lies_outside_the_range() -> None:
    values = torch.linspace(-1, 1, 11, dtype=DTYPE)  # one is zero
    A = with_spectrum(values)
    inside = A @ randn(11)
    x, record = minimal_residuals(lambda v: v @ A, inside[None], tolerance=1e-10)
    assert_close(x[0], torch.linalg.pinv(A, hermitian=True) @ inside, rtol=1e-6, atol=1e-7)
    x, record = minimal_residuals(lambda v: v @ A, randn(1, 11), tolerance=1e-10, limit=20)
    assert record.reason == "limit"
    assert torch.isfinite(x).all()


# ------------------------------------------------------------------------------------------------- Lanczos


def test_lanczos_is_orthonormal_and_tridiagonalises() -> None:
    A = with_spectrum(torch.logspace(-8, 2, 40, dtype=DTYPE))  # one eigenvalue converges early
    process = Lanczos(lambda v: v @ A, randn(3, 40)).extend(15).extend(10)
    Q = process.basis
    assert Q.shape == (3, 25, 40)
    assert_close(Q @ Q.mT, torch.eye(25, dtype=DTYPE).expand(3, 25, 25), rtol=0, atol=1e-12)
    values, vectors = process.eigen()
    T = vectors @ torch.diag_embed(values) @ vectors.mT
    assert_close(Q @ A @ Q.mT, T, rtol=1e-9, atol=1e-9)
    assert_close(process.norms, randn(3, 40).norm(dim=1))


def test_lanczos_ends_in_an_invariant_subspace_and_its_neighbours_go_on() -> None:
    A = with_spectrum(torch.arange(1.0, 13, dtype=DTYPE))
    vectors = torch.linalg.eigh(A)[1]
    starts = torch.stack([vectors[:, 2] + vectors[:, 9], randn(12)])
    process = Lanczos(lambda v: v @ A, starts).extend(12)
    assert process.steps == 12
    assert_close(process.apply(torch.log), (starts @ vectors * torch.arange(1.0, 13).log()) @ vectors.T)
    alone = Lanczos(lambda v: v @ A, starts[:1]).extend(12)
    assert alone.steps == 2
    assert float(alone.remainder) == 0


@pytest.mark.parametrize("function", [torch.sqrt, torch.rsqrt, torch.log])
def test_functions_of_a_matrix(function) -> None:
    A, v = with_spectrum(torch.logspace(-2, 1, 60, dtype=DTYPE)), randn(3, 60)
    v[1] = 0
    values, vectors = torch.linalg.eigh(A)
    result = function_product(lambda u: u @ A, function, v, tolerance=1e-12)
    assert_close(result, (v @ vectors * function(values)) @ vectors.T, rtol=1e-9, atol=1e-9)
    with pytest.raises(ConfigError, match="did not converge in 16"):
        function_product(lambda u: u @ A, function, v, tolerance=1e-12, limit=16)


@settings(max_examples=30)
@given(n=st.integers(1, 60), share=st.floats(0, 1), seed=st.integers(0, 1000), block=st.integers(1, 8))
def test_largest_eigenpairs(n: int, share: float, seed: int, block: int) -> None:
    k = max(1, math.ceil(share * n))
    values = torch.rand(n, dtype=DTYPE, generator=generator(seed)).square()
    A = with_spectrum(values, seed)
    pairs = largest_eigenpairs(
        lambda v: v @ A, n, k, dtype=DTYPE, device=CPU, generator=generator(seed), block=block, limit=1000
    )
    expected = values.sort(descending=True).values
    assert_close(pairs.values, expected[:k], rtol=1e-9, atol=1e-9)
    assert_close(pairs.vectors @ pairs.vectors.T, torch.eye(k, dtype=DTYPE), rtol=0, atol=1e-10)
    residual = pairs.vectors @ A - pairs.values[:, None] * pairs.vectors
    assert_close(residual.norm(dim=1), pairs.residuals, rtol=0, atol=1e-10)
    assert pairs.residuals.max() <= 2e-8 * expected[0]


def test_multiple_eigenvalues_are_all_found() -> None:
    values = torch.tensor([5.0] * 4 + [3.0] * 3 + [0.0] * 33, dtype=DTYPE)
    A = with_spectrum(values)
    pairs = largest_eigenpairs(lambda v: v @ A, 40, 9, dtype=DTYPE, device=CPU, generator=generator())
    assert_close(pairs.values, values[:9], rtol=1e-9, atol=1e-9)


def test_few_products_suffice_where_the_spectrum_falls() -> None:
    A = with_spectrum(torch.logspace(0, -8, 300, dtype=DTYPE))
    product = Counted(A)
    pairs = largest_eigenpairs(product, 300, 10, dtype=DTYPE, device=CPU, generator=generator())
    assert product.vectors == pairs.products < 100
    with pytest.raises(ConfigError, match="from 1 to 300"):
        largest_eigenpairs(product, 300, 301, dtype=DTYPE, device=CPU)


@pytest.mark.parametrize("n", [3, 30, 300])
def test_the_norm_is_bounded(n: int) -> None:
    for seed in range(20):
        values = torch.rand(n, dtype=DTYPE, generator=generator(seed)).pow(4)
        A = with_spectrum(values, seed)
        bound = norm_bound(lambda v, A=A: v @ A, n, dtype=DTYPE, device=CPU, generator=generator(seed))
        assert values.max() <= bound * (1 + 1e-12)
        assert bound <= 1.2 * values.max()
    assert norm_bound(lambda v: v @ A, n, dtype=DTYPE, device=CPU, steps=1) >= float(values.max())
