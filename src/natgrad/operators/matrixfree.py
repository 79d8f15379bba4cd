"""The operator that is known by its products alone; everything else is iteration or chance."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from natgrad.errors import ConfigError, ConvergenceWarning
from natgrad.linalg import iterate, lanczos, stochastic
from natgrad.linalg.iterate import Convergence
from natgrad.linalg.stochastic import Estimated, exactly
from natgrad.operators.base import PROBES, LinearOperator
from natgrad.operators.checks import require_definite, standard_normal
from natgrad.operators.dense import Dense
from natgrad.operators.gram import Gram
from natgrad.operators.hooks import Rows
from natgrad.operators.rows import FactoredRows
from natgrad.operators.space import ParameterSpace

Product = Callable[[Rows], Rows]

# Up to so many rows or parameters, what would be an estimate is computed instead.
SMALL = 1024
# Vectors whose products are taken at once where many are asked for.
AT_ONCE = 32
# Steps of a Lanczos process behind a log-determinant.
STEPS = 50
LARGEST_BYTES = 2**33


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MatrixFree(LinearOperator):
    """JᵀJ + B, of factored rows J and a product v ↦ B v; one of them may be missing.

    Solutions are by conjugate gradients (by MINRES where the matrix is not definite), roots and draws by Lanczos
    processes, eigenvalues by block Lanczos. The diagonal and the trace are exact where there is no B; else, as the
    log-determinant, they are estimates if there are more than a thousand parameters: `trace_estimate` and its kin say
    with which standard error.

    Attributes:
        space: the parameter space.
        product: B v for K vectors, named tensors [K, *shape].
        rows: J.
        dtype: of the vectors.
        device: of the vectors.
        preconditioner: an operator near to this one that is easy to solve with, such as K-FAC's.
        tolerance: of solutions: ‖b − A x‖ ≤ tolerance · ‖b‖; by default ε^¾, 2e-12 in float64 and 6e-6 in float32.
        limit: the most iterations of a solution. Where it is reached, a ConvergenceWarning says how far it came.
        definite: whether the matrix is positive semi-definite. A Hessian is not: products, solutions, the trace and
            the diagonal make sense for it, and lengths, draws, roots and log-determinants don't.

    Raises:
        ConfigError: neither product nor rows; or limit or tolerance is out of range.
    """

    space: ParameterSpace
    product: Product | None = None
    rows: FactoredRows | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    preconditioner: LinearOperator | None = None
    tolerance: float | None = None
    limit: int = 1000
    definite: bool = True
    _record: list[Convergence] = dataclasses.field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.product is None and self.rows is None:
            raise ConfigError("a matrix-free operator needs a product, or rows")
        if self.limit < 1 or (self.tolerance is not None and not 0 < self.tolerance < 1):
            raise ConfigError(
                f"limit={self.limit} and tolerance={self.tolerance} must be positive, the latter below 1"
            )

    @property
    def convergence(self) -> Convergence | None:
        """How the last solution went, or None before the first."""
        return self._record[-1] if self._record else None

    # ------------------------------------------------------------------------------------------ products

    def _matmul(self, rows: Rows) -> Rows:
        total = {} if self.rows is None else self.rows.product(rows)
        if self.product is None:
            return total
        own = self.product(rows)
        return {name: total[name] + own[name] if total else own[name] for name in self.space.names}

    def _flat(self, vectors: Tensor) -> Tensor:
        return self.space.flatten_rows(self._matmul(self.space.unflatten_rows(vectors)))

    def _damped(self, damping: float) -> Callable[[Tensor], Tensor]:
        return self._flat if damping == 0 else lambda v: torch.add(self._flat(v), v, alpha=damping)

    def _dense(self) -> Tensor:
        size = self.space.numel
        needed = size**2 * torch.finfo(self.dtype).bits // 8
        if needed > LARGEST_BYTES:
            raise ConfigError(
                f"the dense matrix of {size:,} parameters would take {needed / 2**30:.1f} GiB ({needed:,} bytes); use "
                "products, diagonal_estimate() or eigenvalues(k)"
            )
        if self.product is None and self.rows is not None:
            return self.rows.covariance()
        identity = torch.eye(size, dtype=self.dtype, device=self.device)
        dense = torch.cat([self._flat(rows) for rows in identity.split(AT_ONCE)])
        return (dense + dense.mT) / 2

    @functools.cached_property
    def _exact(self) -> LinearOperator | None:
        """The same by a matrix, where that is small."""
        if self.space.numel <= SMALL:
            return Dense(self.space, self._dense())
        if self.product is None and self.rows is not None and len(self.rows) <= SMALL:
            return Gram(self.rows)
        return None

    # ----------------------------------------------------------------------------------------- solutions

    def _solve(self, rows: Rows, damping: float) -> Rows:
        return self.space.unflatten_rows(self._solved(self.space.flatten_rows(rows), damping))

    def _solved(self, b: Tensor, damping: float) -> Tensor:
        product, tolerance = self._damped(damping), self._tolerance
        if not self.definite:
            x, record = iterate.minimal_residuals(product, b, tolerance=tolerance, limit=self.limit)
        else:
            self._require_rows(damping)
            x, record = iterate.conjugate_gradients(
                product, b, tolerance=tolerance, precondition=self._precondition(damping), limit=self.limit
            )
        self._record[:] = [record]
        if record.residual > tolerance:
            if damping == 0 and self.definite:
                self._require_regular(b)
            if record.residual > 10 * tolerance:
                warnings.warn(
                    f"the solution is not as exact as asked for ({tolerance:.2g}): {record}; pass more damping, a "
                    "preconditioner, or a larger limit or tolerance",
                    ConvergenceWarning,
                    stacklevel=2,
                )
        return x

    @property
    def _tolerance(self) -> float:
        return torch.finfo(self.dtype).eps ** 0.75 if self.tolerance is None else self.tolerance

    def _precondition(self, damping: float) -> Callable[[Tensor], Tensor] | None:
        near = self.preconditioner
        if near is None:
            return None
        # An undamped preconditioner may be singular where this is not.
        shift = damping or 1e-6 * float(near.trace()) / self.space.numel

        def solve(v: Tensor) -> Tensor:
            return self.space.flatten_rows(near._solve(self.space.unflatten_rows(v), shift))

        return solve

    def _require_rows(self, damping: float) -> None:
        if (
            damping == 0
            and self.product is None
            and self.rows is not None
            and len(self.rows) < self.space.numel
        ):
            require_definite(0.0, 1.0, len(self.rows), self.dtype, layer=self.space.label, factor="F")

    def _require_regular(self, b: Tensor) -> None:
        """After a solution without damping that failed: was the matrix singular?"""
        start = b[b.norm(dim=1) > 0][:1]
        values, _ = lanczos.Lanczos(self._flat, start).extend(min(self.space.numel, 200)).eigen()
        least, largest, size = float(values.min()), float(values.max()), self.space.numel
        require_definite(least, largest, size, self.dtype, layer=self.space.label, factor="F")

    def _pinv_solve(self, rows: Rows, rtol: float | None) -> Rows:
        self._require_definite("pinv_solve")
        if self.product is None and self.rows is not None:
            return Gram(self.rows)._pinv_solve(rows, rtol)
        return super()._pinv_solve(rows, rtol)

    def _require_definite(self, what: str) -> None:
        if not self.definite:
            raise ConfigError(
                f"{what} needs a positive semi-definite matrix, and a Hessian is none; use the Fisher information, or "
                'kind="ggn"'
            )

    def _sqrt_matmul(self, rows: Rows, damping: float) -> Rows:
        self._require_definite("sqrt_matmul")
        return self._of(rows, lambda s: (s.clamp_min(0) + damping).sqrt())

    def _of(self, rows: Rows, function: Callable[[Tensor], Tensor]) -> Rows:
        flat = self.space.flatten_rows(rows)
        result = lanczos.function_product(self._flat, function, flat, tolerance=self._tolerance)
        return self.space.unflatten_rows(result)

    def _sample(self, n: int, damping: float, generator: torch.Generator | None) -> Rows:
        self._require_definite("sample")
        self._require_rows(damping)
        z = standard_normal(n, (self.space.numel,), self.dtype, self.device, generator)
        if self.product is not None or self.rows is None:
            if damping == 0 and n:
                self._require_regular(z[:1])
            return self._of(self.space.unflatten_rows(z), lambda s: (s.clamp_min(0) + damping).rsqrt())
        # Perturb and solve, as `Gram` does.
        noise = standard_normal(n, (len(self.rows),), self.dtype, self.device, generator)
        b = self.space.flatten_rows(self.rows.rmatmul(noise)).add_(z, alpha=damping**0.5)
        return self.space.unflatten_rows(self._solved(b, damping))

    # --------------------------------------------------------------------------------- estimates and spectra

    def _diagonal(self) -> dict[str, Tensor]:
        if self.product is None and self.rows is not None:
            return self.rows.squares()
        if self._exact is not None:
            return self._exact._diagonal()
        return self.space.unflatten(self._diagonal_estimate(PROBES, self._seeded()).value)

    def _trace(self) -> Tensor:
        if self.product is None or self._exact is not None:
            return super()._trace()
        return self._trace_estimate(PROBES, self._seeded()).value

    def _logdet(self, damping: float) -> Tensor:
        self._require_definite("logdet")
        self._require_rows(damping)
        if self._exact is not None:
            return self._exact._logdet(damping)
        return self._logdet_estimate(damping, PROBES, self._seeded()).value

    def _trace_estimate(self, probes: int, generator: torch.Generator | None) -> Estimated:
        if self.product is None:
            return exactly(self._trace())
        return stochastic.trace(
            self._flat, self.space.numel, probes, dtype=self.dtype, device=self.device, generator=generator
        )

    def _diagonal_estimate(self, probes: int, generator: torch.Generator | None) -> Estimated:
        if self.product is None:
            return exactly(self.space.flatten(self._diagonal()))
        return stochastic.diagonal(
            self._flat, self.space.numel, probes, dtype=self.dtype, device=self.device, generator=generator
        )

    def _logdet_estimate(self, damping: float, probes: int, generator: torch.Generator | None) -> Estimated:
        self._require_definite("logdet")
        self._require_rows(damping)
        if self._exact is not None:
            return exactly(self._exact._logdet(damping))
        return stochastic.trace_of_function(
            self._flat,
            lambda s: (s.clamp_min(0) + damping).log(),
            self.space.numel,
            probes,
            STEPS,
            dtype=self.dtype,
            device=self.device,
            generator=generator,
        )

    def _seeded(self) -> torch.Generator:
        return torch.Generator(device=self.device).manual_seed(0)

    def _eigenvalues(self, k: int) -> Tensor:
        if self._exact is not None and (self.definite or not isinstance(self._exact, Gram)):
            if self.definite:
                return self._exact._eigenvalues(k)
            return torch.linalg.eigvalsh(self._exact._dense())
        pairs = lanczos.largest_eigenpairs(
            self._flat, self.space.numel, k, dtype=self.dtype, device=self.device, generator=self._seeded()
        )
        return pairs.values.clamp_min(0) if self.definite else pairs.values

    # ------------------------------------------------------------------------------------ other operators

    def _with(self, product: Product | None, **changes: Any) -> MatrixFree:
        """The same with another product; what is kept of solutions stays behind."""
        names = (f.name for f in dataclasses.fields(self) if f.init)
        return MatrixFree(**({name: getattr(self, name) for name in names} | {"product": product} | changes))

    def joined(self, other: MatrixFree) -> MatrixFree:
        """The sum with another of its kind, on the same space: rows join, and products add up."""
        rows = [one.rows for one in (self, other) if one.rows is not None]
        products = [one.product for one in (self, other) if one.product is not None]
        near = self.preconditioner, other.preconditioner
        return self._with(
            None if not products else products[0] if len(products) == 1 else _summed(*products),
            rows=None if not rows else rows[0] if len(rows) == 1 else rows[0] + rows[1],
            preconditioner=None if near[0] is None or near[1] is None else near[0] + near[1],
            definite=self.definite and other.definite,
        )

    def _scaled(self, scale: float) -> LinearOperator:
        product, near = self.product, self.preconditioner
        return self._with(
            None if product is None else _scaled(product, scale),
            rows=None if self.rows is None else self.rows.scaled(scale**0.5),
            preconditioner=None if near is None else near._scaled(scale),
        )

    def _restricted(self, names: tuple[str, ...]) -> LinearOperator:
        product, near = self.product, self.preconditioner
        return self._with(
            None if product is None else _restricted(product, self.space, names),
            space=self.space.restrict(names),
            rows=None if self.rows is None else self.rows.restrict(names),
            preconditioner=None if near is None else near._restricted(names),
        )

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        if self.product is not None:
            raise ConfigError(
                "products that run the model stay in its dtype and on its device; convert the model, and make the "
                "operator anew"
            )
        assert self.rows is not None
        near = self.preconditioner
        return self._with(
            None,
            rows=self.rows.to(dtype, device),
            dtype=dtype,
            device=device,
            preconditioner=None if near is None else near._to(dtype, device),
        )

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        raise ConfigError(
            'an operator that is known by its products can\'t be saved; save metric="kfac", "ekfac" or "lowrank", or '
            '"gram", which holds the same rows'
        )

    @classmethod
    def _from_state(
        cls, space: ParameterSpace, tensors: dict[str, Tensor], meta: dict[str, Any]
    ) -> MatrixFree:
        raise ConfigError("an operator that is known by its products can't be saved")


def _summed(left: Product, right: Product) -> Product:
    def total(rows: Rows) -> Rows:
        own, more = left(rows), right(rows)
        return {name: own[name] + more[name] for name in own}

    return total


def _scaled(product: Product, scale: float) -> Product:
    return lambda rows: {name: scale * v for name, v in product(rows).items()}


def _restricted(product: Product, space: ParameterSpace, names: tuple[str, ...]) -> Product:
    def part(rows: Rows) -> Rows:
        count, like = len(rows[names[0]]), rows[names[0]]
        whole = {n: rows[n] if n in rows else like.new_zeros(count, *shape) for n, shape in space.entries}
        found = product(whole)
        return {name: found[name] for name in names}

    return part
