"""Factorisations: each stage is reached where it should be, and float32 does not break."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from natgrad.errors import NonFiniteError, NotPositiveDefiniteError
from natgrad.linalg import Stage, cholesky, cholesky_inverse, eigendecomposition, inverse_from_cholesky

NAME = {"layer": "net.0", "factor": "A"}


def spectrum(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A symmetric float64 matrix with these eigenvalues."""
    source = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=source)).Q
    matrix = (basis * values) @ basis.T
    return (matrix + matrix.T) / 2


def geometric(n: int, condition: float) -> torch.Tensor:
    return torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 17, 64, 333])
def test_inverse_of_every_size(n: int) -> None:
    matrix = spectrum(geometric(n, 1e3))
    before = matrix.clone()
    inverse, stage = cholesky_inverse(matrix, 0.01, **NAME)
    assert stage is Stage.CHOLESKY
    assert torch.equal(matrix, before)
    assert torch.equal(inverse, inverse.T)
    assert_close(
        inverse, torch.linalg.inv(matrix + 0.01 * torch.eye(n, dtype=torch.float64)), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("n", [5, 100])
def test_out_and_batches(n: int) -> None:
    batch = torch.stack([spectrum(geometric(n, 10), seed) for seed in (0, 1)])
    shifts = torch.tensor([0.5, 2.0], dtype=torch.float64)
    out = torch.full_like(batch, float("nan"))
    inverse, stage = cholesky_inverse(batch, shifts, **NAME, out=out)
    assert inverse is out
    assert stage is Stage.CHOLESKY
    for k in (0, 1):
        alone, _ = cholesky_inverse(batch[k], float(shifts[k]), **NAME)
        assert_close(inverse[k], alone)


def test_the_input_may_be_laid_out_in_any_way() -> None:
    matrix = spectrum(geometric(30, 10))
    expected = torch.linalg.inv(matrix)
    wide = torch.full((30, 40), float("nan"), dtype=torch.float64)
    wide[:, :30] = matrix
    for layout in (matrix.T, wide[:, :30], matrix[None].expand(2, 30, 30)):
        before = layout.clone()
        inverse, stage = cholesky_inverse(layout, **NAME)
        assert stage is Stage.CHOLESKY
        assert_close(inverse, expected.expand(layout.shape))
        assert torch.equal(layout, before)
        lower, _ = cholesky(layout, **NAME)
        assert torch.equal(lower, lower.tril())
        assert_close(inverse_from_cholesky(lower), inverse)


def test_ill_conditioned_float32_does_not_break() -> None:
    for condition, damping in ((1e6, 0.0), (1e12, 0.0), (1e12, 1e-7), (1e30, 0.0)):
        matrix = spectrum(geometric(100, condition)).float()
        inverse, stage = cholesky_inverse(matrix, damping, **NAME)
        assert torch.isfinite(inverse).all()
        assert torch.equal(inverse, inverse.T)
        assert stage in (Stage.CHOLESKY, Stage.MORE_DAMPING)
    x = torch.randn(10, 300)
    _, stage = cholesky_inverse(x.T @ x, 0.0, **NAME)  # rank 10 of 300
    assert stage is Stage.MORE_DAMPING


def test_the_stages_in_their_order() -> None:
    values = torch.ones(20, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    for least, expected in [
        (0.1, Stage.CHOLESKY),
        (-50 * eps, Stage.MORE_DAMPING),
        (-1500 * eps, Stage.EIGENDECOMPOSITION),
    ]:
        values[0] = least
        matrix = spectrum(values).float()
        lower, stage = cholesky(matrix, 0.0, **NAME)
        assert stage is expected
        assert torch.equal(lower, lower.tril())
        assert (lower.diagonal() > 0).all()
        assert_close(lower @ lower.T, matrix, rtol=0, atol=4 * abs(min(least, 0)) + 1e-5)
        inverse, stage = cholesky_inverse(matrix, 0.0, **NAME)
        assert stage is expected
        assert torch.isfinite(inverse).all()
        assert (torch.linalg.eigvalsh(inverse.double()) > 0).all()
    values[0] = -0.01
    with pytest.raises(
        NotPositiveDefiniteError, match=r"factor A of net\.0.*-0\.01.*raise the damping"
    ) as error:
        cholesky(spectrum(values).float(), 0.0, **NAME)
    assert error.value.least_eigenvalue == pytest.approx(-0.01, rel=1e-3)
    assert cholesky(spectrum(values).float(), 0.02, **NAME)[1] is Stage.CHOLESKY


def test_a_batch_reports_the_last_stage_and_repairs_only_what_failed() -> None:
    good = spectrum(torch.ones(6, dtype=torch.float64) + 1).float()
    bad = torch.ones(6, 6)
    lower, stage = cholesky(torch.stack([good, bad, good])[:, None], 0.0, **NAME)
    assert stage is Stage.MORE_DAMPING
    assert_close(lower[0, 0], torch.linalg.cholesky(good))
    assert_close(lower[2, 0], lower[0, 0])
    assert_close(lower[1, 0] @ lower[1, 0].T, bad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(0, 0), (2, 1), (3, 3)])
def test_what_is_not_finite_is_named_and_out_is_untouched(value: float, where: tuple[int, int]) -> None:
    matrix = torch.eye(4)
    matrix[where] = matrix[where[::-1]] = value
    out = torch.ones(4, 4)
    for ask in (
        lambda: cholesky_inverse(matrix, 0.1, **NAME, out=out),
        lambda: eigendecomposition(matrix, **NAME),
    ):
        with pytest.raises(NonFiniteError, match=r"factor A of net\.0 has [12] entries"):
            ask()
    assert torch.equal(out, torch.ones(4, 4))
    with pytest.raises(NonFiniteError, match="damping of factor A"):
        cholesky(torch.eye(4), float("nan"), **NAME)


def test_zero_is_inverted_with_a_shift_only() -> None:
    inverse, stage = cholesky_inverse(torch.zeros(3, 3), 0.5, **NAME)
    assert stage is Stage.CHOLESKY
    assert_close(inverse, 2 * torch.eye(3))
    with pytest.raises(NotPositiveDefiniteError, match="least eigenvalue 0"):
        cholesky_inverse(torch.zeros(3, 3), 0.0, **NAME)


def test_eigendecomposition() -> None:
    matrix = torch.stack([spectrum(geometric(7, 100), seed) for seed in (0, 1)])
    values, vectors = eigendecomposition(matrix, **NAME)
    assert_close((vectors * values[:, None]) @ vectors.mT, matrix)
    assert (values.diff(dim=-1) >= 0).all()
    values, _ = eigendecomposition(torch.ones(5, 5), **NAME)
    assert (values >= 0).all()  # rounding left some a little below
    with pytest.raises(NotPositiveDefiniteError, match="must be positive semi-definite"):
        eigendecomposition(-torch.eye(3), **NAME)


def test_eigendecomposition_tries_float64_where_float32_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    eigh = torch.linalg.eigh

    def fragile(matrix: torch.Tensor) -> object:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fragile)
    values, vectors = eigendecomposition(torch.eye(3), **NAME)
    assert values.dtype == vectors.dtype == torch.float32
    assert_close(values, torch.ones(3))

    def broken(matrix: torch.Tensor) -> object:
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    with pytest.raises(NotPositiveDefiniteError, match="nan"):
        eigendecomposition(torch.eye(3), **NAME)
    with pytest.raises(NotPositiveDefiniteError, match="nan"):
        cholesky(-torch.eye(3), **NAME)
