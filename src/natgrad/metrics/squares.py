"""Σₙ of squared per-example scores in a Kronecker basis, without forming a score where one position allows.

With V = [W b], example n's score is Σₛ gₛ ãₛᵀ, and in a basis (U_G, U_A) it is U_Gᵀ (Σₛ gₛ ãₛᵀ) U_A.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.metrics.layers import Layer, columns_of
from natgrad.operators.layerrows import Use
from natgrad.tape.elements import ElementColumns

# Scores are formed this many numbers at a time: what the cache of a processor core holds.
CHUNK = 2**19


def add_squares(
    total: Float[Tensor, "groups o i"],
    shown: Layer | ElementColumns | Float[Tensor, "groups m o i"],
    U_A: Float[Tensor, "groups i i"] | None,
    U_G: Float[Tensor, "groups o o"] | None,
    weight: float,
) -> None:
    """Total ← total + weight · Σ (U_Gᵀ (Σₛ gₛ ãₛᵀ) U_A)² over examples and passes, entry by entry.

    Args:
        total: what is added to, in place.
        shown: what the block did, with the signals of some passes; or sums of its scores that stand for them.
        U_A: the basis of the inputs, one for each group; None for the identity.
        U_G: the basis of the outputs, one for each group; likewise.
        weight: what these passes count.
    """
    if isinstance(shown, Tensor):
        turned = shown if U_A is None else (shown.flatten(1, 2) @ U_A).view_as(shown)
        turned = turned if U_G is None else U_G.mT[:, None] @ turned
        total.add_(turned.square().sum(1), alpha=weight)
    elif isinstance(shown, ElementColumns):
        _add_table(total, shown, U_A, U_G, weight)
    elif shown.rows.simple:
        _add_products(total, shown, U_A, U_G, weight)
    else:
        _add_scores(total, shown, U_A, U_G, weight)


Basis = Tensor | None


def _add_products(total: Tensor, layer: Layer, U_A: Basis, U_G: Basis, weight: float) -> None:
    """One position: the square of an outer product is the outer product of squares, and passes add up in one factor."""
    (use,) = layer.uses
    inputs = use.reading.vectors(slice(None))[..., 0].transpose(0, 1)  # [groups, n, f]
    rotated = _with_bias(inputs, U_A, use.biased, total.shape[-1])
    signals = torch.stack([_times(g[..., 0].transpose(0, 1), U_G) for g in columns_of(use)])
    total.baddbmm_(signals.square_().sum(0).mT, rotated.square_(), alpha=weight)


def _add_scores(total: Tensor, layer: Layer, U_A: Basis, U_G: Basis, weight: float) -> None:
    """Several positions: what is rotated on the side of the inputs is those, or the scores where these are fewer."""
    columns, outputs, size = len(columns_of(layer.uses[0])), layer.block.outputs, total.shape[-1]
    first = layer.positions < columns * outputs
    for part in _parts(layer, columns * outputs * size):
        scores: Tensor | None = None  # [groups, n, c o, i]
        for use in layer.uses:
            signals, inputs = _signals(use, part, U_G), use.reading.rows(part)
            if first and U_A is not None:
                rotated = _with_bias(inputs.flatten(1, 2), U_A, use.biased, size)
                inputs = rotated.unflatten(1, inputs.shape[1:3])
            products = signals @ inputs
            if products.shape[-1] < size:
                products = torch.cat((products, signals.sum(-1, keepdim=True) * float(use.biased)), -1)
            scores = products if scores is None else scores.add_(products)
        assert scores is not None
        if U_A is not None and not first:
            scores = (scores.flatten(1, 2) @ U_A).view_as(scores)
        total.add_(scores.unflatten(2, (columns, outputs)).square_().sum((1, 2)), alpha=weight)


def _signals(use: Use, part: slice, U_G: Basis) -> Float[Tensor, "groups n co s"]:
    """The signals of some examples in a basis, those of all passes in one axis."""
    signals = use.part(part).permute(2, 0, 1, 4, 3)  # [groups, n, c, s, o]
    if U_G is not None:
        signals = (signals.flatten(1, 3) @ U_G).view(signals.shape)
    return signals.mT.flatten(2, 3)


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
