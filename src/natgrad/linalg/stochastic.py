"""Traces, log-determinants and diagonals of a matrix that is known by its products alone, with their standard errors.

Every estimate is a mean over independent random probes z with E[z zᵀ] = I, and its standard error is the sample
deviation over the root of their number. Vectors are rows: a product takes K of them as [K, n] and returns A times each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.linalg.iterate import Product
from natgrad.linalg.lanczos import Lanczos

# Probes whose products are taken at once: their tridiagonal decompositions hold a basis each.
AT_ONCE = 16


class Estimated(NamedTuple):
    """A number (or several) that chance had a part in.

    Attributes:
        value: the estimate.
        standard_error: the standard deviation that it has over draws of the probes; 0 where the value is exact.
    """

    value: Tensor
    standard_error: Tensor


def exactly(value: Tensor) -> Estimated:
    """A value without an error."""
    return Estimated(value, torch.zeros_like(value))


def random_signs(
    n: int, size: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Float[Tensor, "n size"]:
    """n vectors of independent fair signs (Rademacher): of all probes those whose quadratic forms vary least."""
    signs = torch.randint(2, (n, size), device=device, generator=generator)
    return signs.to(dtype).mul_(2).sub_(1)


@torch.no_grad()
def trace(
    product: Product,
    size: int,
    probes: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Estimated:
    """The trace of a symmetric positive semi-definite matrix by Hutch++.

    A third of the products finds the range of the large eigenvalues, a third takes the trace there exactly, and the
    rest estimate what is left as Hutchinson (1990) does (Meyer, Musco, Musco & Woodruff 2021, "Hutch++: Optimal
    stochastic trace estimation", arXiv 2010.09649, Algorithm 1). The error falls as 1/probes rather than 1/√probes.

    Args:
        product: A v for K vectors, [K, n].
        size: n.
        probes: how many products, 2 or more; with less than 6 it is Hutchinson's estimate. From n on it is exact.
        dtype: of the vectors.
        device: of the vectors.
        generator: the source of chance.

    Raises:
        ConfigError: too few probes.
    """
    if probes < 2:
        raise ConfigError(f"probes={probes}: a trace with its standard error takes 2 products or more")
    if probes >= size:
        identity = torch.eye(size, dtype=dtype, device=device)
        parts = [(product(rows) * rows).sum() for rows in identity.split(AT_ONCE)]
        return exactly(torch.stack(parts).sum())
    third = probes // 3 if probes >= 6 else 0
    basis, within = (
        torch.zeros(0, size, dtype=dtype, device=device),
        torch.zeros((), dtype=dtype, device=device),
    )
    if third:
        sketch = product(random_signs(third, size, dtype, device, generator))
        basis = torch.linalg.qr(sketch.mT).Q.mT
        within = (product(basis) * basis).sum()
    rest = random_signs(probes - 2 * third, size, dtype, device, generator)
    rest = rest - (rest @ basis.mT) @ basis
    forms = (product(rest) * rest).sum(1)
    mean, error = _mean(forms)
    return Estimated(within + mean, error)


@torch.no_grad()
def diagonal(
    product: Product,
    size: int,
    probes: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Estimated:
    """The diagonal as the mean of z ∘ A z.

    Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix". Entry i has
    variance Σ_{j≠i} A_ij² / probes.

    Args:
        product: A v for K vectors, [K, n].
        size: n.
        probes: how many products; 2 or more. From n on the diagonal is exact.
        dtype: of the vectors.
        device: of the vectors.
        generator: the source of chance.

    Returns:
        n values, and a standard error for each.

    Raises:
        ConfigError: too few probes.
    """
    if probes < 2:
        raise ConfigError(f"probes={probes}: a diagonal with its standard errors takes 2 products or more")
    if probes >= size:
        identity = torch.eye(size, dtype=dtype, device=device)
        parts = [(product(rows) * rows).sum(1) for rows in identity.split(AT_ONCE)]
        return exactly(torch.cat(parts))
    mean = torch.zeros(size, dtype=dtype, device=device)
    spread, seen = torch.zeros_like(mean), 0
    for count in _portions(
        probes
    ):  # mean and sum of squared deviations, joined as Chan, Golub & LeVeque (1979) do
        z = random_signs(count, size, dtype, device, generator)
        forms = product(z).mul_(z)
        own = forms.mean(0)
        step, seen = own - mean, seen + count
        spread += (forms - own).square_().sum(0) + step.square() * (count * (seen - count) / seen)
        mean += step * (count / seen)
    return Estimated(mean, (spread / (probes - 1) / probes).sqrt())


@torch.no_grad()
def trace_of_function(
    product: Product,
    function: Callable[[Tensor], Tensor],
    size: int,
    probes: int,
    steps: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Estimated:
    """tr f(A) by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017, "Fast estimation of tr(f(A))", Algorithm 1).

    With f = log and A + λI this is the log-determinant. zᵀ f(A) z of a probe is a sum over the eigenvalues of its
    Lanczos matrix, which is exact for polynomials of degree 2·steps − 1. The standard error is that of the probes; it
    does not know of the quadrature's own error, which more steps reduce.

    Args:
        product: A v for K vectors, [K, n].
        function: f on eigenvalues, elementwise.
        size: n.
        probes: how many vectors; 2 or more.
        steps: of each Lanczos process, and so the number of products for each probe.
        dtype: of the vectors.
        device: of the vectors.
        generator: the source of chance.

    Raises:
        ConfigError: too few probes, or no step.
    """
    if probes < 2 or steps < 1:
        raise ConfigError(f"probes={probes}, steps={steps}: it takes 2 probes or more, and a step")
    forms = []
    for count in _portions(probes):
        z = random_signs(count, size, dtype, device, generator)
        values, vectors = Lanczos(product, z).extend(min(steps, size)).eigen()
        forms.append((function(values) * vectors[:, 0].square()).sum(1) * size)
    return Estimated(*_mean(torch.cat(forms)))


def _mean(forms: Tensor) -> tuple[Tensor, Tensor]:
    return forms.mean(), forms.std() / len(forms) ** 0.5


def _portions(probes: int) -> list[int]:
    return [min(AT_ONCE, probes - start) for start in range(0, probes, AT_ONCE)]
