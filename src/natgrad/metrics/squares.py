"""Σₙ of squared per-example scores in a Kronecker basis, without forming a score where one position allows.

With V = [W b], example n's score is Σₛ gₛ ãₛᵀ, and in a basis (U_G, U_A) it is U_Gᵀ (Σₛ gₛ ãₛᵀ) U_A.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.metrics.layers import Layer, columns_of

# Scores are formed this many numbers at a time: what the cache of a processor core holds.
CHUNK = 2**19


def add_squares(
    total: Float[Tensor, "groups o i"],
    layer: Layer,
    U_A: Float[Tensor, "groups i i"],
    U_G: Float[Tensor, "groups o o"],
    weight: float,
) -> None:
    """Total ← total + weight · Σ (U_Gᵀ (Σₛ gₛ ãₛᵀ) U_A)² over examples and passes, entry by entry.

    Args:
        total: what is added to, in place.
        layer: what the block did, with the signals of some passes.
        U_A: the basis of the inputs, one for each group.
        U_G: the basis of the outputs, one for each group.
        weight: what these passes count.
    """
    if layer.rows.simple:
        _add_products(total, layer, U_A, U_G, weight)
    elif len(layer.uses) == 1 and layer.positions < len(columns_of(layer.uses[0])) * layer.block.outputs:
        _add_rotated(total, layer, U_A, U_G, weight)
    else:
        _add_scores(total, layer, U_A, U_G, weight)


def _add_products(total: Tensor, layer: Layer, U_A: Tensor, U_G: Tensor, weight: float) -> None:
    """One position: the square of an outer product is the outer product of squares, and passes add up in one factor."""
    (use,) = layer.uses
    inputs = use.reading.vectors(slice(None))[..., 0].transpose(0, 1)  # [groups, n, f]
    rotated = inputs @ U_A[:, : inputs.shape[-1]]
    if use.biased and inputs.shape[-1] < U_A.shape[-1]:
        rotated += U_A[:, -1:]
    signals = torch.stack([g[..., 0].transpose(0, 1) @ U_G for g in columns_of(use)])
    total.baddbmm_(signals.square_().sum(0).mT, rotated.square_(), alpha=weight)


def _add_rotated(total: Tensor, layer: Layer, U_A: Tensor, U_G: Tensor, weight: float) -> None:
    """Fewer positions than output columns: inputs are rotated, once for all passes."""
    (use,), outputs = layer.uses, layer.block.outputs
    features, columns = use.reading.features, len(columns_of(use))
    for part in _parts(layer, columns * outputs * U_A.shape[-1]):
        inputs = U_A[:, :features].mT @ use.reading.vectors(part)  # [n, groups, i, s]
        if use.biased and features < U_A.shape[-1]:
            inputs += U_A[:, -1, :, None]
        signals = U_G.mT @ use.part(part)  # [n, c, groups, o, s]
        scores = signals.transpose(1, 2).flatten(2, 3) @ inputs.mT
        total.add_(scores.unflatten(2, (columns, outputs)).square_().sum((0, 2)), alpha=weight)


def _add_scores(total: Tensor, layer: Layer, U_A: Tensor, U_G: Tensor, weight: float) -> None:
    """Many positions, or several uses: scores are summed over them, and then rotated."""
    columns, features = len(columns_of(layer.uses[0])), layer.uses[0].reading.features
    for part in _parts(layer, columns * layer.block.outputs * U_A.shape[-1]):
        weights, bias = layer.rows.explicit(part)  # [n, groups, c, o, f], [n, groups, c, o]
        assert weights is not None
        scores = weights @ U_A[:, None, :features]
        if bias is not None:
            scores += bias[..., None] * U_A[:, None, None, -1]
        total.add_((U_G[:, None].mT @ scores).square_().sum((0, 2)), alpha=weight)


def _parts(layer: Layer, each: int) -> list[slice]:
    """Examples, so many at a time that `each` numbers for every one of them are a chunk."""
    step = max(1, CHUNK // each)
    return [slice(start, start + step) for start in range(0, layer.examples, step)]
