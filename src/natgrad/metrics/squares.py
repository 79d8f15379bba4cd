"""Σₙ of squared per-example scores in a Kronecker basis, without forming a score where one position allows.

With V = [W b], example n's score is Σₛ gₛ ãₛᵀ, and in a basis (U_G, U_A) it is U_Gᵀ (Σₛ gₛ ãₛᵀ) U_A.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.metrics.layers import Layer, columns_of
from natgrad.tape.elements import ElementColumns

# Scores are formed this many numbers at a time: what the cache of a processor core holds.
CHUNK = 2**19


def add_squares(
    total: Float[Tensor, "groups o i"],
    layer: Layer | ElementColumns,
    U_A: Float[Tensor, "groups i i"] | None,
    U_G: Float[Tensor, "groups o o"] | None,
    weight: float,
) -> None:
    """Total ← total + weight · Σ (U_Gᵀ (Σₛ gₛ ãₛᵀ) U_A)² over examples and passes, entry by entry.

    Args:
        total: what is added to, in place.
        layer: what the block did, with the signals of some passes.
        U_A: the basis of the inputs, one for each group; None for the identity.
        U_G: the basis of the outputs, one for each group; likewise.
        weight: what these passes count.
    """
    if isinstance(layer, ElementColumns):
        _add_table(total, layer, U_A, U_G, weight)
    elif layer.rows.simple:
        _add_products(total, layer, U_A, U_G, weight)
    elif len(layer.uses) == 1 and layer.positions < len(columns_of(layer.uses[0])) * layer.block.outputs:
        _add_rotated(total, layer, U_A, U_G, weight)
    else:
        _add_scores(total, layer, U_A, U_G, weight)


Basis = Tensor | None


def _add_products(total: Tensor, layer: Layer, U_A: Basis, U_G: Basis, weight: float) -> None:
    """One position: the square of an outer product is the outer product of squares, and passes add up in one factor."""
    (use,) = layer.uses
    inputs = use.reading.vectors(slice(None))[..., 0].transpose(0, 1)  # [groups, n, f]
    rotated = _with_bias(inputs, U_A, use.biased, total.shape[-1])
    signals = torch.stack([_times(g[..., 0].transpose(0, 1), U_G) for g in columns_of(use)])
    total.baddbmm_(signals.square_().sum(0).mT, rotated.square_(), alpha=weight)


def _add_rotated(total: Tensor, layer: Layer, U_A: Basis, U_G: Basis, weight: float) -> None:
    """Fewer positions than output columns: inputs are rotated, once for all passes."""
    (use,), outputs = layer.uses, layer.block.outputs
    columns = len(columns_of(use))
    for part in _parts(layer, columns * outputs * total.shape[-1]):
        inputs = use.reading.vectors(part).mT  # [n, groups, s, f]
        rotated = _with_bias(inputs, U_A, use.biased, total.shape[-1])
        signals = use.part(part)  # [n, c, groups, o, s]
        if U_G is not None:
            signals = U_G.mT @ signals
        scores = signals.transpose(1, 2).flatten(2, 3) @ rotated
        total.add_(scores.unflatten(2, (columns, outputs)).square_().sum((0, 2)), alpha=weight)


def _add_scores(total: Tensor, layer: Layer, U_A: Basis, U_G: Basis, weight: float) -> None:
    """Many positions, or several uses: scores are summed over them, and then rotated."""
    columns = len(columns_of(layer.uses[0]))
    for part in _parts(layer, columns * layer.block.outputs * total.shape[-1]):
        weights, bias = layer.rows.explicit(part)  # [n, groups, c, o, f], [n, groups, c, o]
        assert weights is not None
        scores = weights if bias is None else torch.cat((weights, bias[..., None]), -1)
        if U_A is not None:
            scores = scores @ U_A[:, None]
        if U_G is not None:
            scores = U_G[:, None].mT @ scores
        total.add_(scores.square_().sum((0, 2)), alpha=weight)


def _add_table(total: Tensor, table: ElementColumns, U_A: Basis, U_G: Basis, weight: float) -> None:
    """A table's score has a row for each word that was looked up. (Of one that is a linear map too, the products of
    both scores are left out.)
    """
    features = table.parameter[0].numel()
    basis = None if U_A is None else U_A[0, :features]
    if U_G is None:
        squares = table.squares_in(basis)
        total[0, :, : squares.shape[1]].add_(squares, alpha=weight)
        return
    step = max(1, CHUNK // table.parameter.numel())
    for start in range(0, table.examples, step):
        for column in range(table.columns):
            scores = table.score(column, slice(start, start + step)).flatten(2)
            rotated = U_G[0].mT @ _times(scores, basis)
            total[0, :, : rotated.shape[2]].add_(rotated.square_().sum(0), alpha=weight)


def _times(rows: Tensor, basis: Basis) -> Tensor:
    return rows if basis is None else rows @ basis


def _with_bias(
    rows: Float[Tensor, "... f"], basis: Basis, biased: bool, columns: int
) -> Float[Tensor, "... i"]:
    """Rows [ã] in a basis, where the homogeneous coordinate is the last of so many columns, if there is one."""
    features = rows.shape[-1]
    if basis is None:
        fill = rows.new_full((*rows.shape[:-1], columns - features), float(biased))
        return torch.cat((rows, fill), -1)
    rotated = rows @ basis[:, :features]
    return rotated.add_(basis[:, -1:]) if biased and features < columns else rotated


def _parts(layer: Layer, each: int) -> list[slice]:
    """Examples, so many at a time that `each` numbers for every one of them are a chunk."""
    step = max(1, CHUNK // each)
    return [slice(start, start + step) for start in range(0, layer.examples, step)]
