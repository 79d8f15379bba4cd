"""The geometry that F makes of parameter space, measured on data: lengths of paths, and the true divergence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.errors import ConfigError, VectorError
from natgrad.information.data import BATCH_SIZE
from natgrad.information.survey import Sight, Survey, trainable
from natgrad.likelihoods import Likelihood
from natgrad.likelihoods.base import bare, leaves
from natgrad.operators import ParameterSpace
from natgrad.tape import evaluate, jacobian_products

Point = Tensor | Mapping[str, Tensor]


class Divergence(NamedTuple):
    """KL(p_θ ‖ p_{θ+δ}) over the data, with the loss's own reduction, in nats.

    Attributes:
        true: what it is.
        predicted: ½ δᵀFδ, what it is to second order.
    """

    true: Float[Tensor, ""]
    predicted: Float[Tensor, ""]


def kl(
    model: nn.Module,
    likelihood: nn.Module | Likelihood,
    data: Any,
    delta: Point,
    *,
    params: Iterable[str | nn.Parameter] | None = None,
    outputs: Callable[[Any], Any] | None = None,
    weights: Float[Tensor, "N"] | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
) -> Divergence:
    """How far a step δ takes the predictions: the true divergence, beside what the exact F predicts.

    Neither forms a matrix: the one takes two forward passes, the other a forward-mode derivative.

    Args:
        model, likelihood, data, params, outputs, weights, batch_size, seed: as in `natgrad.fisher`.
        delta: δ, flat in the order of `params`, or by name.

    Raises:
        VectorError: δ does not lie in the space of the parameters.
        EmptyError, ConfigError, OutputError, TargetError, NonFiniteError, UnsupportedLossError: as `natgrad.fisher`.
    """
    parameters = trainable(model, params)
    step = _named(ParameterSpace.of(parameters), delta)
    moved = {name: p.detach() + step[name] for name, p in parameters.items()}
    survey = Survey.of(model, likelihood, data, outputs, weights, batch_size, seed, "natgrad.kl")

    def look(sight: Sight) -> Tensor:
        other = evaluate(model, moved, sight.batch, survey.find_outputs, sight.rng_state)
        events = survey.likelihood.divergence(bare(sight.outputs), bare(other), sight.batch.targets)
        true = _by_example(events, sight)
        return torch.stack([true, 0.5 * _square(survey, sight, parameters, step)])

    true, predicted = _total(*survey.gather(look))
    return Divergence(true, predicted)


def length(
    model: nn.Module,
    likelihood: nn.Module | Likelihood,
    data: Any,
    path: Float[Tensor, "points P"] | Sequence[Point],
    *,
    nodes: int = 3,
    params: Iterable[str | nn.Parameter] | None = None,
    outputs: Callable[[Any], Any] | None = None,
    weights: Float[Tensor, "N"] | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
) -> Float[Tensor, ""]:
    """The Riemannian length ∫ √(θ̇ᵀ F(θ) θ̇) dt of a polyline, with the exact F at every node of the quadrature.

    Each segment is integrated by Gauss and Legendre's rule, which is exact for polynomials of degree 2·nodes − 1. The
    data is gone through once.

    Args:
        model, likelihood, data, params, outputs, weights, batch_size, seed: as in `natgrad.fisher`.
        path: the corners, flat in the order of `params`, or by name. The model's own parameters don't matter.
        nodes: of each segment.

    Raises:
        VectorError: a corner does not lie in the space of the parameters.
        ConfigError: fewer than two corners, or no node; else as `natgrad.fisher`.
        EmptyError, OutputError, TargetError, NonFiniteError, UnsupportedLossError: as `natgrad.fisher`.
    """
    if len(path) < 2:
        raise ConfigError(f"a path has two corners or more; this has {len(path)}")
    if nodes < 1:
        raise ConfigError(f"nodes={nodes} must be at least 1")
    parameters = trainable(model, params)
    space = ParameterSpace.of(parameters)
    corners = [_named(space, corner) for corner in path]
    places, shares = _gauss_legendre(nodes)
    segments = [(a, {n: b[n] - a[n] for n in a}) for a, b in itertools.pairwise(corners)]
    survey = Survey.of(model, likelihood, data, outputs, weights, batch_size, seed, "natgrad.length")

    def look(sight: Sight) -> Tensor:
        squares = [
            _square(survey, sight, {n: torch.add(a[n], d[n], alpha=t) for n in a}, d)
            for a, d in segments
            for t in places
        ]
        return torch.stack(squares)

    speeds = _total(*survey.gather(look, corners[0])).clamp_min(0).sqrt().view(len(segments), nodes)
    return (speeds @ torch.tensor(shares, dtype=speeds.dtype, device=speeds.device)).sum()


def _total(values: list[Tensor], scales: list[float]) -> Tensor:
    """The sum of the batches' numbers, each times what its batch counts."""
    return torch.stack([scale * value for value, scale in zip(values, scales, strict=True)]).sum(0)


def _square(
    survey: Survey, sight: Sight, parameters: Mapping[str, Tensor], step: Mapping[str, Tensor]
) -> Float[Tensor, ""]:
    """δᵀFδ on a batch = (Jδ)ᵀ H (Jδ), in float64."""
    torch.set_rng_state(sight.rng_state)
    outputs, (image,) = jacobian_products(survey.model, parameters, sight.batch, [step], survey.find_outputs)
    product = survey.likelihood.fisher_product(bare(outputs), bare(image), sight.batch.targets)
    pairs = zip(leaves(product), image, strict=True)
    return torch.stack([_by_example(h.double() * v.double(), sight) for h, v in pairs]).sum()


def _by_example(values: Tensor, sight: Sight) -> Float[Tensor, ""]:
    """The sum of numbers that belong to examples, each with its weight."""
    if sight.weights is None:
        return values.sum()
    return values.reshape(sight.batch.examples, -1).sum(1) @ sight.weights.to(values.dtype)


def _named(space: ParameterSpace, point: Point) -> dict[str, Tensor]:
    if isinstance(point, Mapping):
        space.check(point)
        return {name: point[name].detach() for name in space.names}
    if point.ndim != 1:
        raise VectorError(f"a point is a flat vector [P] or a mapping; this has {point.ndim} axes")
    return space.unflatten(point.detach())


def _gauss_legendre(nodes: int) -> tuple[list[float], list[float]]:
    """Nodes in (0, 1) and weights of the rule (Golub & Welsch 1969): eigenvalues of the Jacobi matrix."""
    k = torch.arange(1, nodes, dtype=torch.float64)
    off = k / (4 * k.square() - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return ((values + 1) / 2).tolist(), vectors[0].square().tolist()
