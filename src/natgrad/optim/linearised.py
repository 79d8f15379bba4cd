"""Residuals around the present parameters: r(θ + δ) ≈ r + Jδ, with J as the metric represents it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from natgrad.errors import NonFiniteError, StepError, announce
from natgrad.likelihoods import ResidualBlock, Residuals
from natgrad.metrics.rowmetric import RowEstimate
from natgrad.operators import Gram, ParameterSpace, Rectangular, RowOperator
from natgrad.optim.curvature import Curvature
from natgrad.optim.groups import Membership
from natgrad.optim.together import evaluated_along
from natgrad.steps import LeastSquares, half_square

Closure = Callable[[], Any]

# Rows and gradients are the same sums in another order: they agree to this, relative to the largest gradient.
AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-8}
# What is remembered of a closure whose evaluations can't go together.
APART = "one length at a time"


class Linearised(LeastSquares):
    """One step's least-squares problem: the residuals, their Jacobian's products and solves, and trials.

    Vectors δ are flat, in the order of `space`. A trial moves the parameters and puts them back, whatever happens.

    Args:
        closure: what returns the residuals.
        likelihood: what reads them.
        members: the optimiser's parameters.
        groups: its groups; their `lr` is a factor of δ.
        curvature: its estimates.
        step: the present step.
        agreed: what earlier steps found to agree, see `_check_rows`; added to.

    Attributes:
        residuals: r.
        loss: h(θ).
        movable: whether h can be measured at other parameters.
        space: the parameters that move.
        operator: F with its rows, where the metric keeps any.
    """

    def __init__(
        self,
        closure: Closure,
        likelihood: Residuals,
        members: Membership,
        groups: list[dict[str, Any]],
        curvature: Curvature,
        step: int,
        agreed: set[object],
    ) -> None:
        self._closure, self._likelihood, self._curvature, self._step = closure, likelihood, curvature, step
        self._model, self._agreed = members.model, agreed
        self._random = torch.get_rng_state()
        self._blocks = self._evaluate()
        self._after = torch.get_rng_state()
        self._buffers = [(buffer, buffer.clone()) for buffer in members.buffers()]
        self.residuals: Float[Tensor, "M"] = _joined(self._blocks)
        own = [block.loss for block in self._blocks]
        self.movable = all(loss is None for loss in own)
        self.loss = half_square(self.residuals) if self.movable else sum(x for x in own if x is not None)
        moving = {name: m for name, m in members.members.items() if not groups[m.group]["frozen"]}
        self._parameters = {name: m.parameter for name, m in moving.items()}
        self.space = ParameterSpace.of(self._parameters)
        self._rates = {name: groups[m.group]["lr"] for name, m in moving.items()}
        self._base = {name: p.detach().clone() for name, p in self._parameters.items()}
        with curvature.reading():
            self._observe()
            self.operator = self._row_operator()
            if self.operator is not None and not self._check_rows():
                self._observe()
                self.operator = self._row_operator()
        self.sharp = isinstance(self.operator, Rectangular)
        self.repeats = isinstance(self.operator, Rectangular | Gram)
        self._solved: tuple[Tensor, Tensor] | None = None

    def _evaluate(self) -> tuple[ResidualBlock, ...]:
        with self._curvature.recording(), _NoBackward():
            return self._likelihood.blocks(self._closure())

    def _observe(self) -> None:
        if not self._curvature.due():
            return
        self._curvature.restart(self._step)
        for block in self._blocks:
            self._curvature.observe((block.values,), None, len(block))
        self._curvature.require_finite()

    def _row_operator(self) -> RowOperator | None:
        """F with its rows, on the parameters that move, where one metric has them all and is made of rows."""
        if len(self._curvature.estimates) != 1 or not self._curvature.estimates[0][1].whole:
            return None
        operator = self._curvature.estimates[0][1].operator()
        if not isinstance(operator, RowOperator):
            return None
        if self.space.names != operator.space.names:
            operator = operator._restricted(self.space.names)
        if all(block.removed is None for block in self._blocks):
            return operator
        removed = torch.block_diag(*[_columns(block) for block in self._blocks])
        return dataclasses.replace(operator, rows=operator.rows.without(removed))

    def _check_rows(self) -> bool:
        """Sees that the rows' Jᵀw is autograd's: that every point's residual depends on that point's inputs alone.

        Rows are made on that assumption. Where a layer sees its points mixed, by batch normalisation, attention over
        points, or an order of rows of its own, they are another matrix's; such parameters get per-example gradients
        from here on. Looked at once for each arrangement of blocks.
        """
        assert self.operator is not None
        arrangement = tuple((b.name, tuple(b.values.shape)) for b in self._blocks)
        if arrangement in self._agreed:
            return True
        generator = torch.Generator(device=self.residuals.device).manual_seed(0)
        weights = torch.randn(
            self.residuals.shape,
            dtype=self.residuals.dtype,
            device=self.residuals.device,
            generator=generator,
        )
        expected = self._pulled_back(weights)
        found = self.operator.rows.whole.rmatmul(weights[None])
        largest = max(float(g.norm()) for g in expected.values())
        allowed = AGREEMENT.get(self.residuals.dtype, 1e-3) * largest
        wrong = [name for name, g in expected.items() if not float((found[name][0] - g).norm()) <= allowed]
        self._agreed.add(arrangement)
        if not wrong:
            return True
        for tape in self._curvature.tapes:
            for name in wrong:
                tape.uncovered[name] = "points that depend on one another"
        announce(
            f"points depend on one another through {', '.join(wrong)}: per-example gradients are taken for these, "
            "which is slower"
        )
        return False

    def _pulled_back(self, weights: Tensor) -> dict[str, Tensor]:
        """Jᵀw by autograd."""
        found = self._backward(weights)
        return {
            name: found[name] if name in found else torch.zeros_like(p)
            for name, p in self._parameters.items()
        }

    def _backward(self, weights: Tensor, create_graph: bool = False) -> dict[str, Tensor]:
        """Jᵀw of the parameters that the residuals depend on; the residuals' graph is kept."""
        by_block = [
            w.view(b.values.mT.shape).mT
            for w, b in zip(
                weights.split([b.values.numel() for b in self._blocks]), self._blocks, strict=True
            )
        ]
        found = torch.autograd.grad(
            [b.values for b in self._blocks],
            list(self._parameters.values()),
            by_block,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
        return {name: g for name, g in zip(self._parameters, found, strict=True) if g is not None}

    @property
    def largest(self) -> float:
        """The largest eigenvalue of F, where singular values are known; else its Rayleigh quotient at the gradient."""
        if isinstance(self.operator, Rectangular):
            return float(self.operator.singular.values[0]) ** 2
        gradient = self.gradient()
        size = float(gradient.square().sum())
        return float(self.image(gradient).square().sum()) / size if size else 1.0

    def gradient(self) -> Float[Tensor, "P"]:
        """∇h = Jᵀr."""
        return self._gradient

    def gradient_norm(self) -> float:
        """‖∇h‖."""
        if isinstance(self.operator, Gram):
            return self.operator.gradient_norm(self.residuals)
        return float(self.gradient().norm())

    @functools.cached_property
    def _gradient(self) -> Tensor:
        if isinstance(self.operator, Rectangular):
            return self.residuals @ self.operator.jacobian
        if self.operator is not None:
            return self.space.flatten_rows(self.operator.rows.rmatmul(self.residuals[None]))[0]
        return self.space.flatten(self._pulled_back(self.residuals))

    def image(self, delta: Float[Tensor, "P"]) -> Float[Tensor, "M"]:
        """Jδ."""
        if self._solved is not None and delta is self._solved[0]:
            return self._solved[1]
        if isinstance(self.operator, Rectangular):
            return self.operator.jacobian @ delta
        if self.operator is not None:
            return self.operator.rows.matmul(self.space.unflatten_rows(delta[None]))[0]
        # Jᵀw is linear in w, so the derivative of δᵀ(Jᵀw) in w is Jδ, wherever it is taken.
        parts = self.space.unflatten(delta)
        with torch.enable_grad():
            weights = torch.zeros_like(self.residuals, requires_grad=True)
            pulled = self._backward(weights, create_graph=True)
            product = torch.stack([(g * parts[name]).sum() for name, g in pulled.items()]).sum()
            return torch.autograd.grad(product, weights)[0]

    def solve(self, target: Float[Tensor, "M"], damping: float, order: float = 1.0) -> Float[Tensor, "P"]:
        """(F + λI)⁻¹ Jᵀ target, with F as the metric represents it.

        Args:
            target: the right-hand side of Jδ ≈ target.
            damping: λ.
            order: as in `RowOperator.dual_solve`; of no effect for metrics that keep no rows.
        """
        if self.operator is not None:
            image = None
            if order == 1:
                solution, image = self.operator.dual_step(target, damping)
            else:
                solution = self.operator.dual_solve(target, damping, order)
            estimate = self._curvature.estimates[0][1]
            if isinstance(estimate, RowEstimate):
                estimate.note(self.operator, damping)
            delta = self.space.flatten(solution)
            self._solved = None if image is None else (delta, image)
            return delta
        gradient = self._pulled_back(target)
        direction = self._curvature.direction(gradient, dict.fromkeys(gradient, damping), self._step)
        return -self.space.flatten(
            {
                name: direction[name] if name in direction else torch.zeros_like(g)
                for name, g in gradient.items()
            }
        )

    def solver(self, damping: float) -> dict[str, Any]:
        """What `solve` goes through, for `StepInfo`."""
        if self.operator is None:
            names = {type(metric).__name__.lower(): None for metric, _, _ in self._curvature.estimates}
            return {"solver": " and ".join(names)}
        rows, columns = len(self.operator.rows), self.space.numel
        return {
            "solver": f"{type(self.operator).__name__.lower()} {rows:,} × {columns:,}",
            "rank": self.operator.effective_rank(damping),
            "condition": self.operator.condition,
        }

    def at(self, delta: Float[Tensor, "P"]) -> Float[Tensor, "M"] | None:
        """r(θ + δ), with the same random draws as r(θ); None where it is not finite.

        Raises:
            StepError: there are more or fewer residuals than before.
        """
        try:
            with self._trying(), torch.no_grad():
                self.move(delta)
                blocks = self._trial()
        except NonFiniteError:
            return None
        before, after = ([(b.name, tuple(b.values.shape)) for b in bs] for bs in (self._blocks, blocks))
        if before != after:
            raise StepError(
                f"the closure returned residuals {dict(before)} and then, within the same step, {dict(after)}; draw "
                "new points between steps, not inside the closure"
            )
        return _joined(blocks)

    def along(self, delta: Float[Tensor, "P"], lengths: Float[Tensor, "K"]) -> Float[Tensor, "K"]:
        """½‖r(θ + tδ)‖² for several lengths t, together if the closure can be batched.

        The least of them is looked at again by itself: a closure that holds a parameter outside the model would be
        blind to the exchange.
        """
        if APART not in self._agreed:
            losses = self._together(delta, lengths)
            if losses is not None:
                best = int(losses.argmin())
                alone = half_square(self.at(lengths[best] * delta))
                allowed = AGREEMENT.get(delta.dtype, 1e-3) * self.loss
                if alone == losses[best] or abs(alone - float(losses[best])) <= allowed:
                    losses[best] = alone
                    return losses
            self._agreed.add(APART)
        return super().along(delta, lengths)

    def _together(self, delta: Tensor, lengths: Tensor) -> Tensor | None:
        parts = self.space.unflatten(delta)
        direction = {name: self._rates[name] * part for name, part in parts.items()}
        with self._trying():
            each = evaluated_along(
                self._model, self._closure, self._base, direction, lengths, len(self.residuals)
            )
        return None if each is None else lengths.new_tensor([self._loss_of(one) for one in each])

    def _loss_of(self, returned: Any) -> float:
        try:
            return half_square(_joined(self._likelihood.blocks(returned, trained=False)))
        except NonFiniteError:
            return math.inf

    @contextmanager
    def _trying(self) -> Iterator[None]:
        """The random draws of r(θ); afterwards parameters, buffers and generator are as they were."""
        torch.set_rng_state(self._random)
        try:
            yield
        finally:
            torch.set_rng_state(self._after)
            for name, p in self._parameters.items():
                p.data.copy_(self._base[name])
            for buffer, value in self._buffers:
                buffer.copy_(value)

    def _trial(self) -> tuple[ResidualBlock, ...]:
        with torch.set_grad_enabled(self._curvature.needs_graph):
            try:
                return self._likelihood.blocks(self._closure(), trained=False)
            except RuntimeError as error:  # torch.autograd.grad inside the closure
                if self._curvature.needs_graph or "does not require grad" not in str(error):
                    raise
        self._curvature.needs_graph = True
        with torch.enable_grad():
            return self._likelihood.blocks(self._closure(), trained=False)

    def move(self, delta: Float[Tensor, "P"]) -> None:
        """θ ← θ + δ, each group's part times its lr."""
        for name, part in self.space.unflatten(delta).items():
            # By .data, for autograd: at θ, where a trial leaves it, the graph holds as it did.
            self._parameters[name].data.copy_(self._base[name]).add_(part, alpha=self._rates[name])


def _columns(block: ResidualBlock) -> Tensor:
    return block.target.new_zeros(len(block.target), 0) if block.removed is None else block.removed


def _joined(blocks: tuple[ResidualBlock, ...]) -> Tensor:
    return torch.cat([block.target for block in blocks])


class _NoBackward(TorchFunctionMode):
    """Refuses a backward pass inside a closure that is to return residuals."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.backward or func is torch.autograd.backward:
            raise StepError(
                "the closure calls backward(), but this optimiser takes the residuals themselves: return them, and "
                "leave the loss and its backward pass out"
            )
        return func(*args, **(kwargs or {}))
