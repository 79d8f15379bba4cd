"""Lanczos processes: the eigenvalues and the functions of a symmetric matrix that is known by its products alone.

Every process here orthogonalises anew against its whole basis, twice: the textbook's three-term recurrence loses
orthogonality as soon as one eigenvalue has converged, and finds that eigenvalue again (Paige 1971; Parlett 1998, "The
symmetric eigenvalue problem", ch. 13). Vectors are rows: a product takes K of them as [K, n].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.linalg.iterate import Product


class Lanczos:
    """K Lanczos processes side by side, one from each start: A Q = Q T, T tridiagonal, Q orthonormal.

    Args:
        product: A v for K vectors, [K, n].
        starts: [K, n]; none of them zero.

    Attributes:
        norms: ‖start‖ of each, [K].
    """

    def __init__(self, product: Product, starts: Float[Tensor, "K n"]) -> None:
        self._product = product
        self.norms = starts.norm(dim=1)
        self._next = starts / self.norms[:, None]
        self._basis: list[Tensor] = []  # each [K, n]
        self._alphas: list[Tensor] = []  # each [K]
        self._betas: list[Tensor] = []
        self._ended = torch.zeros(len(starts), dtype=torch.bool, device=starts.device)
        self._largest = torch.zeros_like(self.norms)

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return len(self._alphas)

    @property
    def basis(self) -> Float[Tensor, "K steps n"]:
        """Q, by rows."""
        return torch.stack(self._basis, 1)

    @property
    def remainder(self) -> Float[Tensor, "K"]:
        """‖A Q − Q T‖ of each process; 0 where its subspace is invariant, so that T has eigenvalues of A exactly."""
        return self._betas[-1]

    @torch.no_grad()
    def extend(self, steps: int) -> Lanczos:
        """Takes so many steps more, a product of K vectors each; stops early where all subspaces are invariant."""
        precision = torch.finfo(self._next.dtype).eps
        for _ in range(steps):
            if bool(self._ended.all()):
                break
            self._basis.append(self._next)
            image = self._product(self._next)
            alpha = (image * self._next).sum(1)
            basis = self.basis
            for _ in range(2):
                image = image - (basis.mT @ (basis @ image[:, :, None])).squeeze(2)
            beta = image.norm(dim=1)
            self._largest = torch.maximum(self._largest, alpha.abs() + beta)
            # An ended process goes on with zero vectors; its T is filled up with a decoupled, known eigenvalue.
            self._alphas.append(torch.where(self._ended, self._alphas[0], alpha) if self._alphas else alpha)
            self._ended = self._ended | (beta <= 10 * precision * self._largest)
            beta = torch.where(self._ended, 0.0, beta)
            self._betas.append(beta)
            self._next = torch.where(self._ended[:, None], 0.0, image / beta.clamp_min(precision**2)[:, None])
        return self

    def eigen(self) -> tuple[Float[Tensor, "K steps"], Float[Tensor, "K steps steps"]]:
        """Eigenvalues of each T, ascending, and its eigenvectors as columns."""
        T = torch.diag_embed(torch.stack(self._alphas, 1))
        if self.steps > 1:
            beta = torch.stack(self._betas[:-1], 1)
            T = T + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
        return torch.linalg.eigh(T)

    def apply(self, function: Callable[[Tensor], Tensor]) -> Float[Tensor, "K n"]:
        """f(A) start ≈ ‖start‖ Q f(T) e₁ for each start; exact for polynomials of degree steps − 1."""
        values, vectors = self.eigen()
        weights = (vectors * function(values)[:, None]) @ vectors[:, 0, :, None]
        return (self.basis.mT @ weights).squeeze(2) * self.norms[:, None]


@torch.no_grad()
def function_product(
    product: Product,
    function: Callable[[Tensor], Tensor],
    v: Float[Tensor, "K n"],
    *,
    tolerance: float,
    limit: int = 500,
) -> Float[Tensor, "K n"]:
    """f(A) v for each of K vectors by Lanczos, until eight steps more change it by less than the tolerance.

    Args:
        product: A v for K vectors.
        function: f on eigenvalues, elementwise.
        v: the vectors.
        tolerance: of the change, relative to the result's norm.
        limit: the most steps; the basis of each vector takes steps·n numbers.

    Raises:
        ConfigError: the limit was reached.
    """
    result, used = torch.zeros_like(v), v.norm(dim=1) > 0
    if not bool(used.any()):
        return result
    process = Lanczos(product, v[used])
    last: Tensor | None = None
    while True:
        before = process.steps
        now = process.extend(min(8, v.shape[1] - before)).apply(function)
        whole = process.steps in (before, v.shape[1])
        if whole or (
            last is not None and bool(((now - last).norm(dim=1) <= tolerance * now.norm(dim=1)).all())
        ):
            result[used] = now
            return result
        if process.steps >= limit:
            raise ConfigError(
                f"a function of the matrix did not converge in {limit} Lanczos steps; pass more damping, or use a "
                "representation with a closed form"
            )
        last = now


class Eigenpairs(NamedTuple):
    """The largest eigenvalues of a symmetric matrix.

    Attributes:
        values: θ, descending.
        vectors: orthonormal, by rows.
        residuals: ‖A u − θ u‖ of each: within so much of each θ lies an eigenvalue.
        products: how many products with one vector it took.
    """

    values: Float[Tensor, "k"]
    vectors: Float[Tensor, "k n"]
    residuals: Float[Tensor, "k"]
    products: int


@torch.no_grad()
def largest_eigenpairs(
    product: Product,
    size: int,
    k: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
    tolerance: float | None = None,
    block: int | None = None,
    limit: int = 100,
) -> Eigenpairs:
    """The k largest eigenpairs by block Lanczos with thick restarts, from a random block.

    Its subspace holds that of the randomised range finder with as many products (Halko, Martinsson & Tropp 2011), and
    more of them (Musco & Musco 2015, "Randomized block Krylov methods"). Eigenvalues of any multiplicity up to the
    block's size are found. A restart keeps the best Ritz vectors (Wu & Simon 2000, "Thick-restart Lanczos").

    Args:
        product: A v for K vectors, [K, n].
        size: n.
        k: how many eigenpairs, from 1 to n.
        dtype: of the vectors.
        device: of the vectors.
        generator: the source of chance.
        tolerance: of the residuals, relative to the largest eigenvalue in size; by default √ε, with which the
            eigenvalues are right to rounding (their error is the residual's square over the gap).
        block: how many vectors enter a product; by default k/2, from 4 to 32.
        limit: the most block products. What is there then is returned; the residuals say how good it is.

    Raises:
        ConfigError: k is out of range.
    """
    if not 1 <= k <= size:
        raise ConfigError(f"k is {k}; there are from 1 to {size} eigenpairs to ask for")
    precision = torch.finfo(dtype).eps
    tolerance = precision**0.5 if tolerance is None else tolerance
    width = min(max(4, min(32, k // 2)) if block is None else block, size)
    keep = min(size, k + width)
    most = min(size, max(2 * k + 4 * width, keep + 3 * width))
    Q = torch.zeros(0, size, dtype=dtype, device=device)
    AQ = torch.zeros_like(Q)
    fresh = torch.randn(width, size, dtype=dtype, device=device, generator=generator)
    products = 0
    blocks = 0
    while True:
        fresh = _orthonormal(fresh[: size - len(Q)], Q, generator)
        Q, AQ = torch.cat([Q, fresh]), torch.cat([AQ, product(fresh)])
        products, blocks = products + len(fresh), blocks + 1
        # All residuals lie in the span of the last block's images, so that one block serves all Ritz vectors.
        fresh = AQ[-len(fresh) :]
        if len(Q) < k:
            continue
        values, weights = torch.linalg.eigh((Q @ AQ.mT + AQ @ Q.mT) / 2)
        values, weights = values.flip(0), weights.flip(1)
        wanted = weights[:, :k].mT
        residuals = (wanted @ AQ - values[:k, None] * (wanted @ Q)).norm(dim=1)
        enough = residuals <= tolerance * values.abs().max().clamp_min(torch.finfo(dtype).tiny)
        if len(Q) == size or bool(enough.all()) or blocks >= limit:
            break
        if len(Q) + width > most < size:
            kept = weights[:, :keep].mT
            leaving = kept @ AQ - values[:keep, None] * (kept @ Q)
            fresh = leaving[leaving.norm(dim=1).argsort(descending=True)[:width]]
            Q, AQ = kept @ Q, kept @ AQ
    return Eigenpairs(values[:k], wanted @ Q, residuals, products)


def _orthonormal(block: Tensor, basis: Tensor, generator: torch.Generator | None) -> Tensor:
    """An orthonormal basis of the block's rows beside those of the basis; random directions where they lie in it."""
    scale = block.norm(dim=1, keepdim=True)
    block = block / scale.clamp_min(torch.finfo(block.dtype).tiny)
    for attempt in range(3):
        for _ in range(2):
            block = block - (block @ basis.mT) @ basis
        q, r = torch.linalg.qr(block.mT)
        lost = r.diagonal().abs() <= 100 * torch.finfo(block.dtype).eps
        block = q.mT.contiguous()
        if attempt and not bool(lost.any()):
            break
        if bool(lost.any()):
            chance = torch.randn(block.shape, dtype=block.dtype, device=block.device, generator=generator)
            block = torch.where(lost[:, None], chance / block.shape[1] ** 0.5, block)
    return block


@torch.no_grad()
def norm_bound(
    product: Product,
    size: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
    steps: int = 30,
    failure: float = 1e-3,
) -> float:
    """A number that the largest eigenvalue of a positive semi-definite matrix does not exceed, in all likelihood.

    The largest Ritz value θ after m steps from a random start is below (1 − ε) λ₁ with a probability of at most
    1.648 √n exp(−√ε (2m − 1)) (Kuczyński & Woźniakowski 1992, "Estimating the largest eigenvalue by the power and
    Lanczos algorithms with a random start", Theorem 4.2 (a)); so θ/(1 − ε) is a bound.

    Args:
        product: A v for K vectors.
        size: n.
        dtype: of the vectors.
        device: of the vectors.
        generator: the source of chance.
        steps: m.
        failure: how probable an eigenvalue above the bound may be.
    """
    start = torch.randn(1, size, dtype=dtype, device=device, generator=generator)
    process = Lanczos(product, start).extend(min(steps, size))
    values, _ = process.eigen()
    largest = max(float(values.max()), 0.0)
    if process.steps == size or float(process.remainder) == 0:
        return largest
    epsilon = (math.log(1.648 * math.sqrt(size) / failure) / (2 * process.steps - 1)) ** 2
    return largest / (1 - epsilon) if epsilon < 1 else math.inf
