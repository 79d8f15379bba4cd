"""Linear systems by iteration, for matrices that are known by their products alone.

Vectors are rows: a product takes K of them as [K, n] and returns A times each. K systems are solved side by side, so
that each iteration is one product; those that are done take no further part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import NotPositiveDefiniteError

Product = Callable[[Tensor], Tensor]

# The progress of conjugate gradients is measured over so many iterations at least (Martens 2010, §4.4).
LOOK_BACK = 10


@dataclasses.dataclass(frozen=True)
class Convergence:
    """How an iteration went.

    Attributes:
        iterations: products with the matrix, of however many vectors at once.
        residual: ‖b − A x‖ / ‖b‖ of the worst of the systems.
        reason: why it ended: "residual" (small enough), "progress" (too slow to go on, which was asked for),
            "limit" (no more iterations allowed) or "rounding" (the residual will not fall any further).
    """

    iterations: int
    residual: float
    reason: str

    def __str__(self) -> str:
        return f"{self.iterations} iterations, relative residual {self.residual:.2g} ({self.reason})"


@torch.no_grad()
def conjugate_gradients(
    product: Product,
    b: Float[Tensor, "K n"],
    *,
    tolerance: float,
    progress: float = 0.0,
    precondition: Product | None = None,
    start: Float[Tensor, "K n"] | None = None,
    limit: int = 1000,
) -> tuple[Float[Tensor, "K n"], Convergence]:
    """A⁻¹ b for symmetric positive definite A, by preconditioned conjugate gradients (Hestenes & Stiefel 1952).

    Args:
        product: A v for K vectors.
        b: the right-hand sides.
        tolerance: a system is done when ‖b − A x‖ ≤ tolerance · ‖b‖, measured on x itself and not on the recurrence.
        progress: a system is done, too, when φ(x) = ½xᵀAx − bᵀx fell by less than this times φ, per iteration, over
            the last max(10, a tenth of all) iterations (Martens 2010, "Deep learning via Hessian-free optimization",
            §4.4, with 0.0005). 0 asks for the solution.
        precondition: M⁻¹ v for K vectors, M symmetric positive definite and near to A.
        start: where to start from; 0 by default.
        limit: the most iterations.

    Returns:
        The solutions, and how it went.

    Raises:
        NotPositiveDefiniteError: a vector p with pᵀAp < 0 was met.
    """
    solution = torch.zeros_like(b) if start is None else start.clone()
    sizes = b.norm(dim=1)
    system = _Systems(product, precondition, b, solution, sizes, tolerance)
    count, reason = int(start is not None), "residual"
    heights: list[Tensor] = []  # φ of all systems, by iteration
    while len(system.rows):
        if count >= limit:
            reason = "limit"
            break
        system.step()
        count += 1
        done = system.residuals() <= tolerance
        if bool(done.any()):
            count += 1
            done = system.verify(done)
            if bool(system.stuck[system.rows].any()):
                reason = "rounding"
        if progress:
            heights.append(system.height())
            back = max(LOOK_BACK, len(heights) // 10)
            if len(heights) > back:
                now, then = heights[-1][system.rows], heights[-1 - back][system.rows]
                slow = (now < 0) & (then - now < back * progress * -now)
                if bool((slow & ~done).any()):
                    reason = "progress"
                done = done | slow
        system.drop(done)
    solution = system.x
    residual = float((system.last / sizes.clamp_min(torch.finfo(b.dtype).tiny)).max()) if len(b) else 0.0
    return solution, Convergence(count, residual, reason)


class _Systems:
    """The state of conjugate gradients for several systems, of which only the rows that are not done are worked on."""

    def __init__(
        self,
        product: Product,
        precondition: Product | None,
        b: Tensor,
        x: Tensor,
        sizes: Tensor,
        tolerance: float,
    ) -> None:
        self._product, self._precondition = product, precondition
        self._b, self._tolerance = b, tolerance
        self.x, self._sizes = x, sizes
        self.last = torch.zeros_like(sizes)  # ‖b − A x‖ when a system was last looked at
        self.stuck = torch.zeros_like(sizes, dtype=torch.bool)
        self._best = torch.full_like(sizes, torch.inf)  # of the residuals that were verified
        self._height = torch.zeros_like(sizes)
        self.rows = (sizes > 0).nonzero().squeeze(1)
        self._r = b[self.rows]
        if bool(x.any()):
            self._r = self._r - product(x[self.rows])
            self._height[self.rows] = -0.5 * (x[self.rows] * (b[self.rows] + self._r)).sum(1)
            self.last[self.rows] = self._r.norm(dim=1)
            left = self.residuals() > tolerance
            self.rows, self._r = self.rows[left], self._r[left]
        self._begin()

    def _begin(self) -> None:
        y = self._r if self._precondition is None else self._precondition(self._r)
        self._p, self._ry = y.clone(), (self._r * y).sum(1)

    def step(self) -> None:
        """One iteration."""
        image = self._product(self._p)
        curvature = (self._p * image).sum(1)
        if bool((curvature < 0).any()):
            forms = curvature / self._p.square().sum(1)
            raise NotPositiveDefiniteError(
                "the matrix",
                "A + λI",
                float(forms.min()),
                advice="conjugate gradients met a direction of negative curvature; raise the damping",
            )
        alpha = torch.where(curvature > 0, self._ry / curvature, 0.0)
        self.x[self.rows] += alpha[:, None] * self._p
        self._r = self._r - alpha[:, None] * image
        self._height[self.rows] -= 0.5 * alpha * self._ry
        y = self._r if self._precondition is None else self._precondition(self._r)
        ry = (self._r * y).sum(1)
        beta = torch.where(self._ry > 0, ry / self._ry, 0.0)
        self._p, self._ry = y + beta[:, None] * self._p, ry
        self.last[self.rows] = self._r.norm(dim=1)

    def residuals(self) -> Tensor:
        """‖r‖ / ‖b‖ by the recurrence."""
        return self.last[self.rows] / self._sizes[self.rows]

    def height(self) -> Tensor:
        """φ(x) of all systems."""
        return self._height.clone()

    def verify(self, claimed: Tensor) -> Tensor:
        """Which of the claims are true of x itself; where one is not, the iteration starts anew from there.

        A system whose true residual has not halved since it was last verified is as good as rounding lets it be.
        """
        rows = self.rows[claimed]
        true = self._b[rows] - self._product(self.x[rows])
        norms = true.norm(dim=1)
        self.last[rows] = norms
        relative = norms / self._sizes[rows]
        self.stuck[rows] = (relative > self._tolerance) & (relative > 0.5 * self._best[rows])
        self._best[rows] = torch.minimum(self._best[rows], relative)
        proven = (relative <= self._tolerance) | self.stuck[rows]
        if not bool(proven.all()):
            self._r[claimed] = true
            y = self._r if self._precondition is None else self._precondition(self._r)
            self._p[claimed] = y[claimed]
            self._ry[claimed] = (self._r * y).sum(1)[claimed]
        done = claimed.clone()
        done[claimed] = proven
        return done

    def drop(self, done: Tensor) -> None:
        """Leaves systems as they are from here on."""
        if bool(done.any()):
            stay = ~done
            self.rows, self._r = self.rows[stay], self._r[stay]
            self._p, self._ry = self._p[stay], self._ry[stay]


@torch.no_grad()
def minimal_residuals(
    product: Product, b: Float[Tensor, "K n"], *, tolerance: float, limit: int = 1000
) -> tuple[Float[Tensor, "K n"], Convergence]:
    """A⁻¹ b for symmetric A of either sign, such as a Hessian, by MINRES (Paige & Saunders 1975).

    Each iterate has the least residual within its Krylov space. Where A is singular and b has a part outside its
    range, that part stays in the residual.

    Args:
        product: A v for K vectors.
        b: the right-hand sides.
        tolerance: done when all ‖b − A x‖ ≤ tolerance · ‖b‖.
        limit: the most iterations.

    Returns:
        The solutions, and how it went.
    """
    sizes, tiny = b.norm(dim=1, keepdim=True), torch.finfo(b.dtype).tiny
    x = torch.zeros_like(b)
    v_old, v = torch.zeros_like(b), b / sizes.clamp_min(tiny)
    beta, eta = torch.zeros_like(sizes), sizes.clone()
    c_old, c = torch.ones_like(sizes), torch.ones_like(sizes)
    s_old, s = torch.zeros_like(sizes), torch.zeros_like(sizes)
    w_old, w = torch.zeros_like(b), torch.zeros_like(b)
    residual, count, reason = torch.where(sizes > 0, 1.0, 0.0), 0, "residual"
    while bool((residual > tolerance).any()):
        if count >= limit:
            reason = "limit"
            break
        image = product(v) - beta * v_old
        alpha = (v * image).sum(1, keepdim=True)
        image = image - alpha * v
        beta_new = image.norm(dim=1, keepdim=True)
        # The new column of T, turned by the last two rotations, and the rotation that clears what is below it.
        third = s_old * beta
        second = s * alpha + c * c_old * beta
        first = c * alpha - s * c_old * beta
        size = torch.hypot(first, beta_new)
        c_old, s_old, c, s = c, s, first / size.clamp_min(tiny), beta_new / size.clamp_min(tiny)
        w_old, w = w, (v - third * w_old - second * w) / size.clamp_min(tiny)
        x = x + torch.where(size > tiny, c * eta, 0.0) * w
        eta = -s * eta
        residual = eta.abs() / sizes.clamp_min(tiny)
        v_old, v, beta = v, image / beta_new.clamp_min(tiny), beta_new
        count += 1
    true = (b - product(x)).norm(dim=1, keepdim=True) / sizes.clamp_min(tiny)
    return x, Convergence(count + 1, float(true.max()) if len(b) else 0.0, reason)
