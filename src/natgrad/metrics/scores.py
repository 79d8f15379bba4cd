"""Scores of a linear map, and the partial traces of its block of F that they give.

With V = [W b], example n's score is the matrix Xₙ = Σₛ gₛ ãₛᵀ [o, i], and the block of F is Σₙ vec(Xₙ) vec(Xₙ)ᵀ. Its
partial traces are Σ XᵀX over the outputs and Σ XXᵀ over the inputs.

Where an estimate will do, a few sums of scores with fair random signs stand for all of them: E[(Σ ±X) ⊗ (Σ ±X)] is
Σ X ⊗ X, so that whatever is quadratic in scores has the right expectation, partial traces and squares alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg import accumulate_gram
from natgrad.metrics.layers import Layer, columns_of

# Scores, or the inputs that make them, are formed so many numbers at a time: what the cache of a processor core holds.
CHUNK = 2**19


@dataclass(frozen=True)
class SignedSums:
    """Sums of scores over sets of neighbouring examples, and over their passes, with fair random signs.

    The square of such a sum has a standard deviation of at most √2 times its expectation: of `count` sums that are
    alike, the relative error is at most √(2/count), however many examples there are.

    Attributes:
        count: at most so many sums of a batch.
        generator: of the signs.
    """

    count: int
    generator: torch.Generator

    def pay(self, layer: Layer) -> bool:
        """Whether there are fewer of them than scores; those of a single position need not be formed at all."""
        return layer.examples > self.count and not layer.rows.simple

    def of(self, layer: Layer, draws: int) -> Float[Tensor, "draws g m o i"]:
        """The sums, with signs drawn anew so many times.

        What is measured in a basis needs other signs than the basis: one that is made of a few sums has their noise
        along its leading directions, and finds it there again.
        """
        first = columns_of(layer.uses[0])
        bits = torch.randint(2, (draws, len(first), layer.examples), generator=self.generator)
        parts = list(signed_sums(layer, (2 * bits - 1).to(first[0]), self.count))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def signed_sums(
    layer: Layer, signs: Float[Tensor, "draws c n"], count: int
) -> Iterator[Float[Tensor, "draws g m o i"]]:
    """Sums of scores over at most `count` sets of examples and over passes, each score with its sign."""
    draws = len(signs)
    for part, sets in _sets(layer, count):
        products: Tensor | None = None  # [groups, sets, draws o, f]
        edges: Tensor | None = None  # for the bias, [groups, sets, draws o, 1]
        for use in layer.uses:
            signals: Tensor | None = None  # [groups, n, s, draws, o]
            for g, own in zip(columns_of(use), signs[..., part].unbind(1), strict=True):
                signed = g[part].permute(1, 0, 3, 2)[:, :, :, None] * own.mT[:, None, :, None]
                signals = signed if signals is None else signals.add_(signed)
            assert signals is not None
            rows = signals.reshape(len(signals), sets, -1, draws * layer.block.outputs)
            inputs = use.reading.rows(part).reshape(len(rows), sets, -1, use.reading.features)
            product, edge = rows.mT @ inputs, rows.sum(-2)[..., None] * float(use.biased)
            products = product if products is None else products.add_(product)
            edges = edge if edges is None else edges.add_(edge)
        assert products is not None
        assert edges is not None
        whole = products if layer.block.bias is None else torch.cat((products, edges), -1)
        yield whole.unflatten(2, (draws, -1)).movedim(2, 0)


def one_by_one(layer: Layer) -> Iterator[Float[Tensor, "g m o i"]]:
    """The score of each example and pass, a chunk at a time."""
    columns, numbers = len(columns_of(layer.uses[0])), layer.block.outputs * layer.block.columns
    step = max(1, CHUNK // (columns * numbers))
    for start in range(0, layer.examples, step):
        part = slice(start, start + step)
        scores: Tensor | None = None  # [groups, n, c, o, i]
        for use in layer.uses:
            signals = use.part(part).permute(2, 0, 1, 3, 4)  # [groups, n, c, o, s]
            products = signals @ use.reading.rows(part)[:, :, None]
            if layer.block.bias is not None:
                products = torch.cat((products, signals.sum(-1, keepdim=True) * float(use.biased)), -1)
            scores = products if scores is None else scores.add_(products)
        assert scores is not None
        yield scores.flatten(1, 2)


def partial_traces(
    layer: Layer, sums: Float[Tensor, "g m o i"] | None, diagonal: tuple[bool, bool] = (False, False)
) -> tuple[Float[Tensor, "g ..."], Float[Tensor, "g ..."]]:
    """Σ XᵀX [g, i, i] and Σ XXᵀ [g, o, o] over examples and passes, or the diagonals.

    Args:
        layer: whose scores.
        sums: signed sums of them, if these are to stand for them.
        diagonal: whether the one, and the other, is wanted as its diagonal alone.
    """
    block, first = layer.block, columns_of(layer.uses[0])[0]
    inner, outer = (
        first.new_zeros(block.groups, *(side,) * (1 if alone else 2))
        for side, alone in zip((block.columns, block.outputs), diagonal, strict=True)
    )
    if sums is None and layer.rows.simple:
        inputs, signals = _weighted_factors(layer)
        _add_gram(inner, inputs)
        _add_gram(outer, signals)
    else:
        for scores in one_by_one(layer) if sums is None else (sums,):
            _add_gram(inner, scores.flatten(1, 2))
            _add_gram(outer, scores.mT.flatten(1, 2))
    return inner, outer


def _weighted_factors(layer: Layer) -> tuple[Float[Tensor, "g n i"], Float[Tensor, "g cn o"]]:
    """Of scores g ãᵀ the rows |g| ã and |ã| g, which have the same partial traces."""
    (use,) = layer.uses
    inputs = use.reading.rows(slice(None))[:, :, 0]  # [groups, n, f]
    if layer.block.bias is not None:
        inputs = torch.cat((inputs, inputs.new_full((*inputs.shape[:2], 1), float(use.biased))), -1)
    signals = torch.stack([g[..., 0].transpose(0, 1) for g in columns_of(use)], 1)  # [groups, c, n, o]
    lengths = signals.square().sum((1, 3)).sqrt()
    outer = signals * inputs.norm(dim=-1)[:, None, :, None]
    return inputs * lengths[..., None], outer.flatten(1, 2)


def _add_gram(total: Float[Tensor, "g ..."], rows: Float[Tensor, "g m d"]) -> None:
    """Total ← total + Σ x xᵀ over rows x, or the diagonal of it."""
    if total.ndim == 2:
        total += rows.square().sum(1)
        return
    for own, one in zip(total, rows, strict=True):
        accumulate_gram(own, one)


def _sets(layer: Layer, count: int) -> Iterator[tuple[slice, int]]:
    """Examples in sets of equal size but for the last, and how many sets they are: a chunk of inputs at a time."""
    reading, examples = layer.uses[0].reading, layer.examples
    size = -(-examples // count)
    together = max(1, CHUNK // (size * reading.groups * reading.features * reading.positions))
    whole = examples // size
    for first in range(0, whole, together):
        last = min(first + together, whole)
        yield slice(first * size, last * size), last - first
    if examples % size:
        yield slice(whole * size, examples), 1
