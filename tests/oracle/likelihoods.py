"""The Fisher information in output space, from its definition, one event at a time, and nothing shared with natgrad.

    H = c · diagₙ( wₙ Σ_y p(y | zₙ) ∇log p(y | zₙ) ∇log p(y | zₙ)ᵀ ),

with p from torch.distributions, scores from autograd, sums over y enumerated or by quadrature, weights in loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, distributions

Support = tuple[Tensor, Tensor]  # values of y, and what each counts for in an expectation


def categorical(z: Tensor) -> distributions.Categorical:
    """p(y | z) of one event with logits [C]."""
    return distributions.Categorical(logits=z, validate_args=False)


def bernoulli(z: Tensor) -> distributions.Bernoulli:
    """p(y | z) of one event with log-odds [1]."""
    return distributions.Bernoulli(logits=z[0], validate_args=False)


def poisson(z: Tensor) -> distributions.Poisson:
    """p(y | z) of one event with log-rate [1]."""
    return distributions.Poisson(z[0].exp(), validate_args=False)


def gaussian(z: Tensor) -> distributions.Normal:
    """p(y | z) of one event with mean [1] and variance 1."""
    return distributions.Normal(z[0], 1.0, validate_args=False)


def heteroscedastic(z: Tensor) -> distributions.Normal:
    """p(y | z) of one event with mean and variance [2]."""
    return distributions.Normal(z[0], z[1].sqrt(), validate_args=False)


def support(p: distributions.Distribution) -> Support:
    """Every value of y with its probability, or Gauss–Hermite nodes with their weights."""
    if isinstance(p, distributions.Normal):
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(20))
        return p.mean + p.stddev * nodes, weights / math.sqrt(2 * math.pi)
    top = {"Categorical": p.logits.numel() if hasattr(p, "logits") else 0, "Bernoulli": 2}.get(
        type(p).__name__, 120
    )
    y = torch.arange(top, dtype=torch.float64)
    return y, p.log_prob(y).exp()


def score_moments(family: Callable[[Tensor], distributions.Distribution], z: Tensor) -> tuple[Tensor, Tensor]:
    """E[score] and E[score scoreᵀ] of one event, score = ∇_z log p(y | z)."""
    values, mass = support(family(z))
    scores = torch.func.jacrev(lambda a: family(a).log_prob(values))(z)
    return mass @ scores, (scores * mass[:, None]).T @ scores


def fisher(
    family: Callable[[Tensor], distributions.Distribution],
    z: Tensor,
    events: Sequence[Sequence[int]],
    weights: Sequence[float],
) -> Tensor:
    """H of all events: z is flat, each event says which coordinates are its own, and c wₙ is its weight."""
    H = torch.zeros(z.numel(), z.numel(), dtype=z.dtype)
    for event, weight in zip(events, weights, strict=True):
        index = torch.tensor(event)
        H[index[:, None], index] += weight * score_moments(family, z[index])[1]
    return H


def categorical_events(shape: Sequence[int]) -> list[list[int]]:
    """The flat coordinates of each event of logits [N, C, ...], events in row-major order."""
    index = torch.arange(math.prod(shape)).view(*shape).movedim(1, -1)
    return index.reshape(-1, shape[1]).tolist()


def element_events(shape: Sequence[int]) -> list[list[int]]:
    """Each element an event."""
    return [[i] for i in range(math.prod(shape))]


def categorical_coefficients(
    targets: Tensor, classes: int, weight: Tensor | None, smoothing: float, ignore: int
) -> list[list[float]]:
    """tₖ of each event in row-major order: its loss is −Σₖ tₖ log pₖ before the reduction."""
    w = [1.0] * classes if weight is None else weight.tolist()
    if targets.is_floating_point():
        rows = targets.movedim(1, -1).reshape(-1, classes).tolist()
    else:
        rows = [[float(k == y) for k in range(classes)] for y in targets.flatten().tolist()]
    t = [[w[k] * ((1 - smoothing) * q[k] + smoothing / classes) for k in range(classes)] for q in rows]
    if not targets.is_floating_point():
        t = [
            [0.0] * classes if y == ignore else row
            for y, row in zip(targets.flatten().tolist(), t, strict=True)
        ]
    return t


def categorical_constant(
    targets: Tensor, weight: Tensor | None, ignore: int, reduction: str, events: int
) -> float:
    """C as torch has it: Σ w_y over what is not ignored for indices, the number of events for probabilities."""
    if reduction == "sum":
        return 1.0
    if targets.is_floating_point():
        return 1.0 / events
    return 1.0 / sum(
        (1.0 if weight is None else weight[y].item()) for y in targets.flatten().tolist() if y != ignore
    )


def bernoulli_weights(targets: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> list[float]:
    """w (q y + 1 − y) of each element."""
    w = torch.ones(()) if weight is None else weight
    q = torch.ones(()) if pos_weight is None else pos_weight
    triples = zip(
        *(a.expand(targets.shape).flatten().tolist() for a in (w, q)), targets.flatten().tolist(), strict=True
    )
    return [a * (b * y + 1 - y) for a, b, y in triples]


def hessian(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The Hessian of a scalar function of z, as a matrix on z flattened."""
    # Reverse over reverse: torch's forward mode scripts itself on first use, with a deprecation warning.
    return torch.func.jacrev(torch.func.jacrev(loss))(z).reshape(z.numel(), z.numel())
