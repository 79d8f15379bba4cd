"""Factorisations of symmetric positive semi-definite matrices that do not break in float32.

A damped factor is factorised in declared stages, each tried only where the one before failed:

1. Cholesky of M + shift·I;
2. Cholesky with more damping: the shift raised by 10, 100, 1000 times ε·(mean diagonal of M), ε the precision of the
   dtype, so that what is added is what rounding may have taken away;
3. an eigendecomposition in float64, its eigenvalues clamped to be positive;
4. NotPositiveDefiniteError, which names the layer, the factor and its least eigenvalue.

Which stage was taken is part of the result, so that a caller can show it.
"""

from __future__ import annotations

import enum

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import NonFiniteError, NotPositiveDefiniteError


class Stage(enum.Enum):
    """Which stage of the fallback a factorisation needed, from the ordinary to the last resort.

    TRUNCATED is none of `cholesky`: an undamped solution left out eigenvalues that can't be told from rounding.
    """

    CHOLESKY = "cholesky"
    MORE_DAMPING = "more damping"
    EIGENDECOMPOSITION = "eigendecomposition"
    TRUNCATED = "small eigenvalues left out"


@torch.no_grad()
def cholesky(
    matrix: Float[Tensor, "*batch n n"], shift: float | Tensor = 0.0, *, layer: str, factor: str
) -> tuple[Float[Tensor, "*batch n n"], Stage]:
    """The lower Cholesky factor L of M + shift·I, L Lᵀ = M + shift·I, by the stages of this module.

    Args:
        matrix: M, symmetric positive semi-definite up to rounding; one triangle is read. Left as it is.
        shift: what is added to the diagonal; one number, or a tensor of one for each matrix of the batch.
        layer: the layer (or block) that an error message names.
        factor: the factor of it that an error message names.

    Returns:
        L, and the stage that was needed; for a batch, the last one that any of its matrices needed.

    Raises:
        NonFiniteError: the matrix or the shift has an infinite or undefined entry.
        NotPositiveDefiniteError: an eigenvalue is more negative than rounding explains, or the matrix is zero and
            nothing is added to it.
    """
    # M is symmetric, so the transposed view of its copy is M by columns: what LAPACK factorises where it stands.
    lower = matrix.clone(memory_format=torch.contiguous_format).mT
    lower.diagonal(dim1=-2, dim2=-1).add_(shift[..., None] if isinstance(shift, Tensor) else shift)
    info = torch.empty(lower.shape[:-2], dtype=torch.int32, device=lower.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    # An entry of M that is not finite reaches a pivot of its row, so the diagonal shows it without a pass over M.
    failed = (info != 0) | ~torch.isfinite(lower.diagonal(dim1=-2, dim2=-1).sum(-1))
    if not failed.any():
        return lower, Stage.CHOLESKY
    shifts = torch.as_tensor(shift, dtype=matrix.dtype, device=matrix.device).expand(failed.shape)
    stages = []
    for index in failed.nonzero().tolist():
        lower[tuple(index)], stage = _rescue(matrix[tuple(index)], float(shifts[tuple(index)]), layer, factor)
        stages.append(stage)
    return lower, max(stages, key=list(Stage).index)


def _rescue(matrix: Tensor, shift: float, layer: str, factor: str) -> tuple[Tensor, Stage]:
    """Stages 2 to 4, for one matrix whose Cholesky factorisation failed."""
    _require_finite(matrix, shift, layer, factor)
    precision = torch.finfo(matrix.dtype).eps
    unit = precision * float(matrix.diagonal().mean().abs())
    for power in (1, 2, 3):
        shifted = matrix.clone()
        shifted.diagonal().add_(shift + 10**power * unit)
        lower, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal().sum())):
            return lower, Stage.MORE_DAMPING
    try:
        values, vectors = torch.linalg.eigh(matrix.double())
    except torch.linalg.LinAlgError:
        raise NotPositiveDefiniteError(layer, factor, float("nan")) from None
    least, largest = float(values[0]), float(values[-1])
    # What rounding leaves of a positive semi-definite matrix; anything below is no covariance.
    if largest + shift <= 0 or least + shift < -(precision**0.5) * largest:
        raise NotPositiveDefiniteError(layer, factor, least)
    values = (values.clamp_min(0) + shift).clamp_min(precision * (largest + shift))
    # M = Q Λ Qᵀ = (Λ^½ Qᵀ)ᵀ (Λ^½ Qᵀ), so the R of a QR factorisation of Λ^½ Qᵀ is Lᵀ up to the signs of its rows.
    lower = torch.linalg.qr(values.sqrt()[:, None] * vectors.mT).R.mT
    lower = lower * torch.where(lower.diagonal() < 0, -1.0, 1.0)
    return lower.to(matrix.dtype), Stage.EIGENDECOMPOSITION


@torch.no_grad()
def cholesky_inverse(
    matrix: Float[Tensor, "*batch n n"],
    shift: float | Tensor = 0.0,
    *,
    layer: str,
    factor: str,
    out: Float[Tensor, "*batch n n"] | None = None,
) -> tuple[Float[Tensor, "*batch n n"], Stage]:
    """(M + shift·I)⁻¹ for symmetric positive semi-definite M, by the stages of this module.

    Args:
        matrix: M. Left as it is.
        shift: what is added to the diagonal; one number, or a tensor of one for each matrix of the batch.
        layer: the layer (or block) that an error message names.
        factor: the factor of it that an error message names.
        out: where the inverse is written; untouched if an error is raised.

    Returns:
        The inverse, symmetric to the last bit, and the stage that was needed.

    Raises:
        NonFiniteError, NotPositiveDefiniteError: as `cholesky`.
    """
    lower, stage = cholesky(matrix, shift, layer=layer, factor=factor)
    return inverse_from_cholesky(lower, out=out), stage


@torch.no_grad()
def inverse_from_cholesky(
    lower: Float[Tensor, "*batch n n"], *, out: Float[Tensor, "*batch n n"] | None = None
) -> Float[Tensor, "*batch n n"]:
    """(L Lᵀ)⁻¹ = L⁻ᵀ L⁻¹ from the lower Cholesky factor L, symmetric to the last bit.

    Args:
        lower: L.
        out: where the inverse is written.
    """
    if out is None:
        out = torch.empty(lower.shape, dtype=lower.dtype, device=lower.device)
    # potri mirrors its result, so it may write by columns into a matrix by rows. It is as fast as anything that was
    # measured (float32, n from 250 to 2000, one thread): a blocked inverse of L and a blocked L⁻ᵀ L⁻¹ take 0.92 to 1.5
    # times as long, triangular solves and one product twice, `cholesky_solve` with I three times, LU twice.
    torch.cholesky_inverse(lower, out=out.mT)
    return out


@torch.no_grad()
def eigendecomposition(
    matrix: Float[Tensor, "*batch n n"], *, layer: str, factor: str
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n n"]]:
    """Eigenvalues Λ (ascending, negative ones clamped to 0) and eigenvectors Q (columns) of M = Q Λ Qᵀ.

    Tried in the matrix's own precision, and again in float64 where that does not converge.

    Args:
        matrix: M, symmetric positive semi-definite up to rounding.
        layer: the layer (or block) that an error message names.
        factor: the factor of it that an error message names.

    Raises:
        NonFiniteError: the matrix has an infinite or undefined entry.
        NotPositiveDefiniteError: float64 did not converge either, or an eigenvalue is more negative than rounding
            explains.
    """
    _require_finite(matrix, 0.0, layer, factor)
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        try:
            values, vectors = (t.to(matrix.dtype) for t in torch.linalg.eigh(matrix.double()))
        except torch.linalg.LinAlgError:
            raise NotPositiveDefiniteError(layer, factor, float("nan")) from None
    wrong = values[..., 0] < -(torch.finfo(matrix.dtype).eps ** 0.5) * values[..., -1].abs()
    if wrong.any():
        raise NotPositiveDefiniteError(
            layer, factor, float(values.min()), advice="a factor must be positive semi-definite"
        )
    return values.clamp_min(0), vectors


def _require_finite(matrix: Tensor, shift: float, layer: str, factor: str) -> None:
    finite = torch.isfinite(matrix)
    if not finite.all():
        raise NonFiniteError(
            f"factor {factor} of {layer} has {int((~finite).sum())} entries that are not finite, of {finite.numel()}; "
            "look for NaN or infinity in the data, the model's outputs or the loss"
        )
    if not torch.isfinite(torch.tensor(shift)):
        raise NonFiniteError(f"the damping of factor {factor} of {layer} is {shift}; it must be finite")
