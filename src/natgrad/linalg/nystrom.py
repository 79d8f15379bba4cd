"""A positive semi-definite matrix near to one that is known by its products alone, by the randomised Nyström method.

With an orthonormal random Ω [n, r], K̂ = (KΩ)(ΩᵀKΩ)⁺(KΩ)ᵀ is the best approximation K̂ ⪯ K whose range is that of KΩ.
K̂ + λI is easily solved with, and close to K + λI as soon as r is about the number of eigenvalues above λ.

Source: Frangella, Tropp & Udell 2023, "Randomized Nyström preconditioning", SIAM J. Matrix Anal. Appl. 44 (2), arXiv
2110.02820.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError, NonFiniteError, NotPositiveDefiniteError
from natgrad.linalg.iterate import Product

# Vectors whose products are taken at once: more make a product no cheaper, and take memory.
AT_ONCE = 16
# The shift of the core matrix is raised tenfold so often where rounding has made it indefinite.
ATTEMPTS = 8


class Nystrom:
    """K ≈ U diag(values) Uᵀ + σ(I − UUᵀ), whose rank can be raised: random directions that are there are kept.

    What U leaves out counts as the least of its eigenvalues, σ, as in the paper's preconditioner (eq. 5.3), or as zero
    where U leaves nothing out.

    Args:
        product: K v for k vectors, [k, n].
        size: n.
        rank: r to begin with.
        largest: r is not raised beyond this.
        bound: what the rank of K can't exceed; n where nothing more is known.
        dtype: of the vectors.
        device: of the vectors.
        generator: the source of chance.

    Attributes:
        vectors: U, by rows.
        values: eigenvalues, descending.

    Raises:
        ConfigError: r or its limit is not positive.
        NonFiniteError: a product has an entry that is not finite.
        NotPositiveDefiniteError: K is not positive semi-definite, by more than rounding explains.
    """

    def __init__(
        self,
        product: Product,
        size: int,
        *,
        rank: int,
        largest: int,
        bound: int | None = None,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> None:
        if rank < 1 or largest < 1:
            raise ConfigError(f"rank={rank} and largest={largest} must be positive")
        self._product, self._generator = product, generator
        self._bound = min(size, size if bound is None else bound)
        self._most = min(largest, self._bound)
        self._test = torch.zeros(0, size, dtype=dtype, device=device)  # Ω, by rows
        self._images = torch.zeros_like(self._test)  # KΩ, by rows
        self.vectors, self.values = self._test, self._test[:, 0]
        self._raise_to(rank)

    def __len__(self) -> int:
        """r, the number of products that were taken."""
        return len(self._test)

    @property
    def complete(self) -> bool:
        """Whether K̂ is K, but for rounding: as many vectors as K can have eigenvalues, or none left above rounding."""
        return len(self) == self._bound or self._least <= self._rounding

    @property
    def exhausted(self) -> bool:
        """Whether the rank will not be raised any more."""
        return len(self) == self._most or self.complete

    @property
    def remainder(self) -> float:
        """σ, what K is taken to be on all that U leaves out."""
        return 0.0 if self.complete else self._least

    @property
    def _least(self) -> float:
        return float(self.values[-1])

    @property
    def _rounding(self) -> float:
        return len(self._test[0]) * torch.finfo(self.values.dtype).eps * float(self.values[0])

    @torch.no_grad()
    def extend(self, level: float, price: float = 1.0) -> Nystrom:
        """Doubles the rank until the least eigenvalue is at most `level`, or nothing is gained by it.

        The condition number of the preconditioned K + λI is about κ = 1 + 2σ/λ (Proposition 5.3), and conjugate
        gradients take about ½ √κ log(2/ε) products. Doubling stops, too, where that is less than the r products of a
        doubling.

        Args:
            level: λ.
            price: how many solutions are to be paid for; infinite to go by the level alone.
        """
        precision = torch.finfo(self.values.dtype).eps ** 0.75
        while not self.exhausted and self._least > level:
            if level > 0:
                iterations = 0.5 * math.sqrt(1 + 2 * self._least / level) * math.log(2 / precision)
                if price * iterations <= len(self):
                    break
            self._raise_to(2 * len(self))
        return self

    def _raise_to(self, rank: int) -> None:
        count, size = min(rank, self._most) - len(self._test), self._test.shape[1]
        fresh = torch.randn(
            count, size, dtype=self._test.dtype, device=self._test.device, generator=self._generator
        )
        for _ in range(2):
            fresh = torch.linalg.qr((fresh - (fresh @ self._test.mT) @ self._test).mT).Q.mT
        images = torch.cat([self._product(part) for part in fresh.split(AT_ONCE)])
        self._test, self._images = torch.cat([self._test, fresh]), torch.cat([self._images, images])
        self._decompose()

    def _decompose(self) -> None:
        """Algorithm 2.1: K + νI is approximated, ν being what rounding may have taken away, and ν taken off again."""
        size, precision = self._test.shape[1], torch.finfo(self._test.dtype)
        norm = float(self._images.norm())
        if not math.isfinite(norm):
            raise NonFiniteError("a product with the matrix has an entry that is not finite")
        shift = max(math.sqrt(size) * precision.eps * norm, precision.tiny)
        for _ in range(ATTEMPTS):
            shifted = self._images + shift * self._test
            core = shifted @ self._test.mT
            lower, info = torch.linalg.cholesky_ex((core + core.mT) / 2)
            if not bool(info):
                break
            shift *= 10
        else:
            least = float(torch.linalg.eigvalsh((core + core.mT) / 2)[0])
            raise NotPositiveDefiniteError(
                "the matrix", "ΩᵀKΩ", least, advice="K is not positive semi-definite"
            )
        half = torch.linalg.solve_triangular(lower, shifted, upper=False)  # K̂ + ν = Bᵀ B on its range
        q, r = torch.linalg.qr(half.mT)
        left, singular, _ = torch.linalg.svd(r)
        self.vectors = (q @ left).mT
        self.values = (singular.square() - shift).clamp_min(0)

    def approximation(self, v: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        """U diag(values) Uᵀ v, which is K̂ v."""
        return (v @ self.vectors.mT * self.values) @ self.vectors

    def solve(
        self, v: Float[Tensor, "k n"], damping: float, remainder: float | None = None
    ) -> Float[Tensor, "k n"]:
        """(K̂ + σ(I − UUᵀ) + λI)⁻¹ v for λ > 0, with another σ if one is given."""
        rest = (self.remainder if remainder is None else remainder) + damping
        weights = 1 / (self.values + damping) - 1 / rest
        return torch.addmm(v / rest, (v @ self.vectors.mT) * weights, self.vectors)
