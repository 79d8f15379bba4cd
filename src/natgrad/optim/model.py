"""The quadratic model of a step: exact Fisher products on a slice of the batch that the optimiser saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.likelihoods import Likelihood
from natgrad.steps import QuadraticModel
from natgrad.tape import Batch, jacobian_products


@dataclass(frozen=True)
class Basis:
    """The directions that a step may combine: parts of Δ with disjoint parameters, and the last step δ₀.

    Attributes:
        direction: Δ by name.
        parts: the names of each part of Δ.
        previous: δ₀ by name; empty before the first step.
    """

    direction: Mapping[str, Tensor]
    parts: Sequence[Sequence[str]]
    previous: Mapping[str, Tensor]

    @property
    def previous_index(self) -> int | None:
        """δ₀'s place among the directions."""
        return len(self.parts) if self.previous else None

    def vectors(self) -> list[dict[str, Tensor]]:
        """The directions; names that are left out are zero."""
        vectors = [{name: self.direction[name] for name in part} for part in self.parts]
        return [*vectors, dict(self.previous)] if self.previous else vectors

    def products(self, gradient: Mapping[str, Tensor], damping: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """(∇hᵀd_k) and (d_jᵀ diag(λ) d_k), in float64. Parts are disjoint, so few dot products are needed."""
        size = len(self.parts) + bool(self.previous)
        linear, gram = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
        last = self.previous_index
        for k, part in enumerate(self.parts):
            for name in part:
                d, weight = self.direction[name].reshape(-1), damping[name]
                linear[k] += float(torch.dot(gradient[name].reshape(-1), d))
                gram[k, k] += weight * float(torch.dot(d, d))
                if last is not None and name in self.previous:
                    gram[k, last] += weight * float(torch.dot(d, self.previous[name].reshape(-1)))
        if last is not None:
            gram[last, :last] = gram[:last, last]
            for name, value in self.previous.items():
                flat = value.reshape(-1)
                linear[last] += float(torch.dot(gradient[name].reshape(-1), flat))
                gram[last, last] += damping[name] * float(torch.dot(flat, flat))
        return linear, gram


def quadratic_model(
    basis: Basis,
    *,
    loss: float,
    gradient: Mapping[str, Tensor],
    damping: Mapping[str, float],
    network: nn.Module,
    likelihood: Likelihood,
    batches: Sequence[Batch],
    find_outputs: Callable[[Any], tuple[Tensor, ...]],
    fraction: float,
    turn: int,
) -> QuadraticModel:
    """M on the basis, with F from a slice of the batch.

    Args:
        damping: λ + η for each name.
        batches: the step's micro-batches, taken as one batch.
        fraction: the part of the batch that F is taken on.
        turn: which slice; consecutive turns take consecutive slices.
    """
    linear, gram = basis.products(gradient, damping)
    parameters = {name: p for name, p in network.named_parameters()}
    vectors = basis.vectors()
    fisher = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    pieces = _slices(batches, fraction, turn)
    taken, total = sum(piece.examples for piece in pieces), sum(batch.examples for batch in batches)
    for piece in pieces:
        outputs, images = jacobian_products(network, parameters, piece, vectors, find_outputs)
        # With a mean each piece counts by its share of the slice; a sum is scaled up to the whole batch.
        share = piece.examples / taken if likelihood.reduction == "mean" else total / taken
        fisher += share * _fisher_gram(likelihood, outputs, images, piece.targets)
    return QuadraticModel(loss, linear, fisher, gram)


def _fisher_gram(
    likelihood: Likelihood, outputs: tuple[Tensor, ...], images: Sequence[tuple[Tensor, ...]], targets: Any
) -> Tensor:
    """(J d_j)ᵀ H (J d_k)."""
    stacked = tuple(torch.stack(parts) for parts in zip(*images, strict=True))
    single = len(outputs) == 1
    product = likelihood.fisher_product(
        outputs[0] if single else outputs, stacked[0] if single else stacked, targets
    )
    products = (product,) if isinstance(product, Tensor) else product
    return sum(  # type: ignore[return-value]
        (v.flatten(1) @ h.flatten(1).mT).double().cpu() for v, h in zip(stacked, products, strict=True)
    )


def _slices(batches: Sequence[Batch], fraction: float, turn: int) -> list[Batch]:
    """A slice of the concatenated micro-batches, as one piece of each that it touches."""
    total = sum(batch.examples for batch in batches)
    size = max(1, min(total, round(fraction * total)))
    start = (turn * size) % (total - size + 1)
    pieces, offset = [], 0
    for batch in batches:
        low, high = max(start - offset, 0), min(start + size - offset, batch.examples)
        if low < high:
            pieces.append(batch.slice(low, high) if (low, high) != (0, batch.examples) else batch)
        offset += batch.examples
    return pieces
