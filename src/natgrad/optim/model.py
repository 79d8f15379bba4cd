"""What a step's quadratic model is made of: its directions, and exact Fisher products on a slice of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.likelihoods import Likelihood
from natgrad.likelihoods.base import bare, leaves
from natgrad.optim.watcher import Watcher
from natgrad.steps import QuadraticModel
from natgrad.tape import Batch, evaluate, jacobian_products

# A slice has at least so many events, such as labelled images or tokens: F of fewer is mostly noise. Half of them do
# where α is a mean over slices. Events of an example are much alike, and batch normalisation needs two, so a slice has
# at least so many examples too.
FEWEST_EVENTS, FEWEST_EXAMPLES = 32, 8


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


@dataclass(frozen=True)
class Probe:
    """A slice of the step's batch, on which the model's Jacobian and Fisher information are exact.

    Attributes:
        network: the model.
        likelihood: p(y | z).
        find_outputs: what the likelihood reads of what the model returns.
        pieces: the examples of each micro-batch that the slice touches.
        shares: what each piece counts, so that a weighted sum stands for the whole batch.
        rng_state: where the model's random draws start from.
    """

    network: nn.Module
    likelihood: Likelihood
    find_outputs: Callable[[Any], tuple[Tensor, ...]]
    pieces: Sequence[Batch]
    shares: Sequence[float]
    rng_state: Tensor = field(default_factory=torch.get_rng_state)

    @classmethod
    def of(
        cls,
        network: nn.Module,
        likelihood: Likelihood,
        watcher: Watcher,
        fraction: float,
        turn: int,
        events: int = FEWEST_EVENTS,
    ) -> Probe:
        """A slice of the step's micro-batches taken as one batch; consecutive turns take consecutive slices."""
        pieces = _slices(watcher.batches, fraction, turn, events)
        taken, total = sum(p.examples for p in pieces), sum(batch.examples for batch in watcher.batches)
        # With a mean each piece counts by its share of the slice; a sum is scaled up to the whole batch.
        mean = likelihood.reduction == "mean"
        shares = [piece.examples / taken if mean else total / taken for piece in pieces]
        return cls(network, likelihood, watcher.find_outputs, pieces, shares)

    def expand(self, vectors: Sequence[Mapping[str, Tensor]]) -> tuple[float, Tensor, Tensor]:
        """h, (∇hᵀd_k) and (d_jᵀFd_k) on the slice, in float64."""
        parameters = dict(self.network.named_parameters())
        size = len(vectors)
        loss, linear, fisher = (
            0.0,
            torch.zeros(size, dtype=torch.float64),
            torch.zeros(size, size, dtype=torch.float64),
        )
        for piece, share in zip(self.pieces, self.shares, strict=True):
            outputs, images = jacobian_products(self.network, parameters, piece, vectors, self.find_outputs)
            value, residuals = self._residuals(outputs, piece.targets)
            stacked = tuple(torch.stack(parts) for parts in zip(*images, strict=True))
            loss += share * value
            for image, residual in zip(stacked, residuals, strict=True):
                linear += share * (image.flatten(1) @ residual.flatten()).double().cpu()
            fisher += share * _fisher_gram(self.likelihood, outputs, stacked, piece.targets)
        return loss, linear, fisher

    def loss(self, parameters: Mapping[str, Tensor] | None = None) -> float:
        """h on the slice at the parameters' present values or at those given, with the same dropout as in `expand`."""
        total = 0.0
        for piece, share in zip(self.pieces, self.shares, strict=True):
            if piece.targets is None:
                return float("nan")
            outputs = evaluate(self.network, parameters or {}, piece, self.find_outputs, self.rng_state)
            total += share * float(self.likelihood.loss(bare(outputs), piece.targets))
        return total

    def _residuals(self, outputs: tuple[Tensor, ...], targets: Any) -> tuple[float, tuple[Tensor, ...]]:
        """h and ∂h/∂z; NaN and 0 where the loss was not seen."""
        if targets is None:
            return float("nan"), tuple(torch.zeros_like(z) for z in outputs)
        with torch.enable_grad():
            leaves = tuple(z.detach().requires_grad_() for z in outputs)
            value = self.likelihood.loss(bare(leaves), targets)
            return float(value.detach()), torch.autograd.grad(value, leaves)


@dataclass(frozen=True)
class Expansion:
    """The loss around θ to second order: for the whole batch, and for the slice alone.

    Attributes:
        model: M with the batch's slope and the slice's curvature.
        local: M of the slice, slope and curvature both.
        probe: the slice.
    """

    model: QuadraticModel
    local: QuadraticModel
    probe: Probe

    def error(self, c: Tensor) -> float:
        """What M misses after the step c was made: [h(θ+δ) − h(θ)] − [M(δ) − M(0)], measured on the slice.

        On the slice both sides are exact, so that what is left is the loss's own departure from its quadratic model:
        a fraction of a forward pass does, and the sampling noise of the batch cancels.
        """
        return self.probe.loss() - self.local.loss - self.local.change(c)


def expand(
    basis: Basis,
    probe: Probe,
    loss: float,
    gradient: Mapping[str, Tensor],
    damping: float,
    penalty: Mapping[str, float],
) -> Expansion:
    """The quadratic models on a basis.

    Args:
        basis: the directions.
        probe: the slice that F is taken on.
        loss: h(θ) of the whole batch.
        gradient: ∇h(θ) of the whole batch.
        damping: λ.
        penalty: η by name; the slice's loss is without it.
    """
    linear, ridge = basis.products(gradient, {name: damping + eta for name, eta in penalty.items()})
    trust = basis.products(gradient, dict.fromkeys(penalty, damping))[1] if any(penalty.values()) else ridge
    before, slope, fisher = probe.expand(basis.vectors())
    return Expansion(
        QuadraticModel(loss, linear, fisher, ridge), QuadraticModel(before, slope, fisher, trust), probe
    )


def _fisher_gram(
    likelihood: Likelihood, outputs: tuple[Tensor, ...], stacked: tuple[Tensor, ...], targets: Any
) -> Tensor:
    """(J d_j)ᵀ H (J d_k)."""
    products = leaves(likelihood.fisher_product(bare(outputs), bare(stacked), targets))
    return sum(  # type: ignore[return-value]
        (v.flatten(1) @ h.flatten(1).mT).double().cpu() for v, h in zip(stacked, products, strict=True)
    )


def _slices(batches: Sequence[Batch], fraction: float, turn: int, events: int = FEWEST_EVENTS) -> list[Batch]:
    """A slice of the concatenated micro-batches, as one piece of each that it touches."""
    total = sum(batch.examples for batch in batches)
    labels = sum(_labels(batch) for batch in batches)
    fewest = max(FEWEST_EXAMPLES, math.ceil(events * total / max(labels, 1)))
    size = min(total, max(fewest, round(fraction * total)))
    start = min(turn % -(-total // size) * size, total - size)  # windows side by side; the last may overlap
    pieces, offset = [], 0
    for batch in batches:
        low, high = max(start - offset, 0), min(start + size - offset, batch.examples)
        if low < high:
            pieces.append(batch.slice(low, high) if (low, high) != (0, batch.examples) else batch)
        offset += batch.examples
    return pieces


def _labels(batch: Batch) -> int:
    """How many labels a batch has: several an example where each token has one, else an example is an event."""
    targets = batch.targets
    several = isinstance(targets, Tensor) and not targets.is_floating_point()
    return max(batch.examples, targets.numel()) if several else batch.examples
