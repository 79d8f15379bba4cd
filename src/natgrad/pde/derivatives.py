"""Derivatives of a network with respect to its inputs, at many points at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError, EmptyError, OutputError
from natgrad.pde import rules as rules  # without which there is no rule
from natgrad.pde.jet import Jet
from natgrad.pde.plan import Plan

Model: TypeAlias = Callable[[Any], Any]
Second: TypeAlias = str | Tensor | Sequence[Any] | None


@dataclass(frozen=True, eq=False)
class Derivatives:
    """What a network is at N points, and how it changes there.

    Attributes:
        value: u.
        gradient: ∂u/∂v_k; of the coordinates, if no directions were given.
        second: Σ_k w[l, k] ∂²u/∂v_k²; None if it was not asked for.
    """

    value: Float[Tensor, "n c"]
    gradient: Float[Tensor, "n k c"]
    second: Float[Tensor, "n l c"] | None


def derivatives(
    model: Model,
    x: Tensor,
    *,
    second: Second = None,
    directions: Tensor | None = None,
) -> Derivatives:
    """Carries derivatives forward through a model in Taylor mode.

    A stream of numbers goes along beside the value for each derivative that is asked for, and a sum of second
    derivatives takes one stream, not one for each term. A model is called once, as it is, on a jet that passes for a
    tensor. Results are differentiable with respect to parameters and points, as often as torch's functions are.

    A mixed derivative is a difference of two pure ones: with directions v = (1, 1) and (1, −1) and weights (¼, −¼),
    the second derivative is ∂²u/∂x∂y.

    Args:
        model: a module or function that maps [N, d] to [N, C], each example on its own.
        x: the points [N, d]; floating, N ≥ 1.
        second: weights w [L, K] of sums of second derivatives; or "laplacian" (one row of ones), or "diagonal" (the
            identity: all pure second derivatives apart).
        directions: v_k, the rows of [K, d]; the d coordinates by default.

    Raises:
        ConfigError: points, weights or directions of a wrong type or shape.
        EmptyError: no points.
        OutputError: the model returned something that is not [N, C], or does not depend on the points.
        TaylorRuleError: the model calls a function that has no rule, or that mixes examples.
    """
    require_points(x)
    N, d = x.shape
    if directions is None:
        directions = torch.eye(d, dtype=x.dtype, device=x.device)
    elif directions.dim() != 2 or directions.shape[1] != d or not len(directions):
        raise ConfigError(f"directions must be [K, {d}], one row each, but are {list(directions.shape)}")
    K = len(directions)
    plan = Plan.of(K, _weights(second, K))
    jet = Jet(x, directions.to(x).expand(N, K, d), plan)
    u = model(jet)
    if isinstance(u, Tensor) and not isinstance(u, Jet):
        raise OutputError(
            "the model's output does not depend on its inputs, so it has no derivatives by them"
        )
    if not isinstance(u, Jet):
        raise OutputError(f"the model must return one tensor [N, C], not {type(u).__name__}")
    if u.value.dim() != 2:
        raise OutputError(f"the model must return [N, C] (C = 1 for one function), not {list(u.value.shape)}")
    if len(u.value) != N:
        raise OutputError(f"the model returned {len(u.value)} rows for {N} points")
    streams = u.with_seconds()
    return Derivatives(u.value, streams[:, :K], streams[:, K:] if plan.seconds else None)


def require_points(x: Tensor) -> None:
    """Raises unless x are points of a space.

    Args:
        x: what was given for the points.

    Raises:
        ConfigError: not a floating tensor [N, d].
        EmptyError: no points.
    """
    if isinstance(x, Jet):
        raise ConfigError(
            "derivatives of derivatives are out of scope: use torch.autograd.grad or torch.func"
        )
    if not x.is_floating_point():
        raise ConfigError(
            f"points must be of a floating dtype, not {x.dtype}: x.to(torch.float64), for instance"
        )
    if x.dim() != 2 or not x.shape[1]:
        raise ConfigError(f"points must be [N, d], one row each, but are {list(x.shape)}")
    if not len(x):
        raise EmptyError("there are no points: x has shape " + str(list(x.shape)))


def _weights(second: Second, K: int) -> Sequence[Sequence[float]] | None:
    """W as numbers."""
    if second is None:
        return None
    if isinstance(second, str):
        if second == "laplacian":
            return [[1.0] * K]
        if second == "diagonal":
            return [[float(i == j) for j in range(K)] for i in range(K)]
        raise ConfigError(f'second must be "laplacian", "diagonal" or weights [L, {K}], not {second!r}')
    rows: Any = second.tolist() if isinstance(second, Tensor) else second
    if not (
        isinstance(rows, Sequence)
        and rows
        and all(isinstance(row, Sequence) and len(row) == K for row in rows)
        and all(isinstance(w, (int, float)) and math.isfinite(w) for row in rows for w in row)
    ):
        raise ConfigError(f"weights of second derivatives must be finite numbers [L, {K}], not {rows!r}")
    return rows
