"""What several representations see to, and the source of their chance."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError, NotPositiveDefiniteError
from natgrad.operators.space import ParameterSpace

# A dense matrix of more bytes than this is refused.
LARGEST_BYTES = 2**33


def check_scalar(what: str, value: float) -> None:
    """Sees that a damping or a scale keeps an operator positive semi-definite.

    Raises:
        ConfigError: the value is negative or not finite.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{what} is {value}; it must be finite and not negative")


def require_definite(
    least: float, largest: float, size: int, dtype: torch.dtype, *, layer: str, factor: str
) -> None:
    """Sees that an undamped matrix can be inverted: that its least eigenvalue stands out from rounding.

    Args:
        least: its least eigenvalue, or an estimate.
        largest: its largest eigenvalue, or an estimate.
        size: its number of rows n; rounding is taken to be n ε times the largest eigenvalue.
        dtype: what it was computed in.
        layer: the layer (or block) that the message names.
        factor: the factor of it that the message names.

    Raises:
        NotPositiveDefiniteError: it can't.
    """
    if least <= size * torch.finfo(dtype).eps * largest:
        raise NotPositiveDefiniteError(
            layer,
            factor,
            least,
            advice="it is singular to working precision: pass damping > 0, or take pinv_solve(), the solution of "
            "least norm",
        )


def check_room(space: ParameterSpace, dtype: torch.dtype) -> None:
    """Sees that a dense matrix on a space would fit in memory.

    Raises:
        ConfigError: it would not; says how many bytes it takes, and what to use instead.
    """
    needed = space.numel**2 * dtype.itemsize
    if needed > LARGEST_BYTES:
        raise ConfigError(
            f"the dense matrix of {space.numel:,} parameters would take {needed / 2**30:.1f} GiB ({needed:,} bytes); "
            "use products, solve(), diagonal() or trace() where the representation has them in closed form, or "
            "restrict() to fewer parameters"
        )


def pseudo_inverse(values: Float[Tensor, "*shape"], rtol: float | None, size: int) -> Float[Tensor, "*shape"]:
    """1/λ of eigenvalues, and 0 of those that are zero.

    Args:
        values: eigenvalues of one matrix, in any order.
        rtol: those up to this times the largest are zero; None for `size` times the precision.
        size: the number of rows whose rounding went into an eigenvalue.
    """
    if not values.numel():
        return values
    cutoff = values.max() * (size * torch.finfo(values.dtype).eps if rtol is None else rtol)
    return torch.where(values > cutoff, values.reciprocal(), 0.0)


def standard_normal(
    n: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None,
) -> Float[Tensor, "n ..."]:
    """n draws of independent standard normal numbers, [n, *shape]."""
    return torch.randn((n, *shape), dtype=dtype, device=device, generator=generator)
