"""The matrix in the outputs that a curvature product has between J and Jᵀ: of each example, as a product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.likelihoods import Likelihood
from natgrad.likelihoods.base import bare, leaves
from natgrad.tape.adjoint import batched_grad
from natgrad.tape.jacobian import Outputs

InOutputs = Callable[[Outputs, Outputs], Outputs]
"""H v in the outputs z: takes z, and K vectors with z's shapes after a leading axis."""


def of_likelihood(
    likelihood: Likelihood, targets: Any, weights: Float[Tensor, "n"] | None = None
) -> InOutputs:
    """The Fisher information in the outputs, exactly.

    Args:
        likelihood: p(y | z).
        targets: as in `Likelihood.fisher_product`.
        weights: a factor of each example's part.
    """

    def product(z: Outputs, vectors: Outputs) -> Outputs:
        found = leaves(likelihood.fisher_product(bare(z), bare(vectors), targets))
        return tuple(times(v, weights, leading=1) for v in found)

    return product


def of_signals(signals: Sequence[Outputs], examples: int) -> InOutputs:
    """Σ S Sᵀ within each example, of signals that were drawn or observed; weights are inside them.

    Args:
        signals: each with the outputs' shapes.
        examples: how many there are.
    """

    def product(z: Outputs, vectors: Outputs) -> Outputs:
        count = len(vectors[0])
        total = [torch.zeros_like(v).reshape(count, examples, -1) for v in vectors]
        for signal in signals:
            parts = [s.reshape(examples, -1) for s in signal]
            flat = [v.reshape(count, examples, -1) for v in vectors]
            forms = torch.stack([(v * s).sum(2) for v, s in zip(flat, parts, strict=True)]).sum(0)
            for one, s in zip(total, parts, strict=True):
                one.addcmul_(forms[:, :, None], s)
        return tuple(one.reshape(v.shape) for one, v in zip(total, vectors, strict=True))

    return product


def of_loss(likelihood: Likelihood, targets: Any, weights: Float[Tensor, "n"] | None = None) -> InOutputs:
    """The Hessian of the loss in the outputs: JᵀHJ is then the generalised Gauss–Newton matrix.

    Args:
        likelihood: of the loss.
        targets: y.
        weights: a factor of each example's part.
    """

    def product(z: Outputs, vectors: Outputs) -> Outputs:
        with torch.enable_grad():
            points = tuple(one.detach().requires_grad_() for one in z)
            loss = likelihood.loss(bare(points), targets)
            slopes = torch.autograd.grad(loss, points, create_graph=True)
            used = [k for k, s in enumerate(slopes) if s.requires_grad]
            found: list[Tensor | None] = [None] * len(points)
            if used:
                found = batched_grad(
                    [slopes[k] for k in used], list(points), [vectors[k] for k in used], len(vectors[0])
                )
        return tuple(
            torch.zeros_like(v) if one is None else times(one, weights, leading=1)
            for one, v in zip(found, vectors, strict=True)
        )

    return product


def times(value: Tensor, weights: Float[Tensor, "n"] | None, leading: int = 0) -> Tensor:
    """Each example's part of an output times its weight."""
    if weights is None:
        return value
    by_example = value.reshape(*value.shape[:leading], len(weights), -1)
    return (by_example * weights.to(value.dtype)[:, None]).reshape(value.shape)
