"""The Gram matrix K = JJᵀ of factored rows: every inner product of two rows, and no row.

A layer with one position gives a Hadamard product, K += (G Gᵀ) ∘ (A Aᵀ), and one with several the sum of these over
pairs of positions. Where pairs are many it is cheaper to form the layer's own rows, some outputs at a time; which is
decided by counting.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg import accumulate_gram
from natgrad.operators.layerrows import BatchRows, LayerRows

# The side of a tile of K: two of them, and the inputs' inner products beside, stay in a cache.
TILE = 768
# The most numbers of a layer's own rows that are there at once, unless K itself is larger.
OWN_ROWS = 2**24
# What a Hadamard product costs for each number of K, in multiplications.
HADAMARD = 8

Entry = tuple[int, BatchRows, LayerRows]
"""A layer in one batch, and where that batch's rows begin."""


def row_gram(batches: Sequence[BatchRows]) -> Float[Tensor, "M M"]:
    """K = JJᵀ, symmetric up to rounding."""
    starts = list(itertools.accumulate((len(batch) for batch in batches), initial=0))
    like = next(t for batch in batches for t in batch.tensors())
    total = torch.zeros(starts[-1], starts[-1], dtype=like.dtype, device=like.device)
    by_layer: dict[str, list[Entry]] = {}
    for start, batch in zip(starts, batches, strict=False):
        for layer in batch.layers:
            by_layer.setdefault(layer.weight or layer.bias or "", []).append((start, batch, layer))
    paired = []
    for name, entries in by_layer.items():
        if _pairs_are_cheaper(entries, starts[-1]):
            paired.append(name)
        else:
            _add_own_rows(total, entries)
    _add_rest(total, starts, batches)
    if paired:
        _add_pairs(total, [by_layer[name] for name in paired])
    return total


def _pairs_are_cheaper(entries: list[Entry], rows: int) -> bool:
    g, o, f = entries[0][2].sizes
    positions = max(sum(use.reading.positions for use in one.uses) for _, _, one in entries)
    examples = sum(b.examples for _, b, _ in entries)
    pairs = positions**2 * g * (rows**2 * (o + HADAMARD) + examples**2 * f)
    own = 2 * rows * positions * g * o * f + rows**2 * g * o * f
    return pairs <= own


def _add_own_rows(total: Tensor, entries: list[Entry]) -> None:
    g, o, f = entries[0][2].sizes
    rows, step = len(total), max(1, max(OWN_ROWS, len(total) ** 2) // (len(total) * g * (f + 1)))
    for first in range(0, o, step):
        outputs = slice(first, min(first + step, o))
        width = outputs.stop - first
        own = total.new_zeros(rows, g * width * (f + 1))
        for start, batch, layer in entries:
            mine = own[start : start + len(batch)].view(batch.columns, batch.examples, -1)
            for part in layer.chunks(batch.columns * g * width * (f + layer.uses[0].reading.positions)):
                weight, bias = layer.explicit(part, outputs)
                if weight is not None:
                    mine[:, part, : g * width * f] = weight.movedim(2, 0).flatten(2) * batch.scale
                if bias is not None:
                    mine[:, part, g * width * f :] = bias.movedim(2, 0).flatten(2) * batch.scale
        accumulate_gram(total, own.mT)


def _add_rest(total: Tensor, starts: list[int], batches: Sequence[BatchRows]) -> None:
    for name in dict.fromkeys(name for batch in batches for name in batch.rest):
        size = next(b.rest[name][0, 0].numel() for b in batches if name in b.rest)
        own = total.new_zeros(len(total), size)
        for start, batch in zip(starts, batches, strict=False):
            if name in batch.rest:
                own[start : start + len(batch)] = batch.rest[name].reshape(len(batch), -1) * batch.scale
        accumulate_gram(total, own.mT)


class _Block:
    """Some examples of one batch, and the factors of their rows."""

    def __init__(self, start: int, batch: BatchRows, layers: dict[int, LayerRows], part: slice) -> None:
        self.start, self.stop, self._batch, self._layers = start, start + len(batch), batch, layers
        self.part = part
        # Whole columns side by side, as many as make a tile.
        width = max(1, TILE // (part.stop - part.start))
        self.columns = [slice(c, min(c + width, batch.columns)) for c in range(0, batch.columns, width)]
        self.shape = (batch.columns, batch.examples)
        self._factors: dict[int, list[Factor]] = {}

    def factors(self, index: int) -> list[Factor]:
        """Those of one layer, for each use, group and position."""
        if index not in self._factors:
            layer = self._layers.get(index)
            self._factors[index] = [] if layer is None else list(self._of(layer))
        return self._factors[index]

    def _of(self, layer: LayerRows) -> Iterator[Factor]:
        for use in layer.uses:
            signals = use.part(self.part).permute(2, 4, 1, 0, 3).contiguous() * self._batch.scale
            inputs = use.reading.vectors(self.part).permute(1, 3, 0, 2)
            for g, s in itertools.product(range(signals.shape[0]), range(signals.shape[1])):
                own = None if layer.weight is None else inputs[g, s].contiguous()
                yield Factor(g, own, signals[g, s], layer.bias is not None and use.biased)


class Factor(NamedTuple):
    """What one position of one group has in the rows of some examples."""

    group: int
    inputs: Float[Tensor, "n f"] | None
    signals: Float[Tensor, "c n o"]
    biased: bool


def _add_pairs(total: Tensor, layers: list[list[Entry]]) -> None:
    batches: dict[int, tuple[BatchRows, dict[int, LayerRows]]] = {}
    pairs = 0
    for index, entries in enumerate(layers):
        for start, batch, layer in entries:
            batches.setdefault(start, (batch, {}))[1][index] = layer
        pairs += max(sum(use.reading.positions for use in layer.uses) for _, _, layer in entries) ** 2
    step = max(16, min(TILE, math.isqrt(OWN_ROWS // pairs)))
    blocks = [
        _Block(start, batch, own, slice(first, min(first + step, batch.examples)))
        for start, (batch, own) in sorted(batches.items())
        for first in range(0, batch.examples, step)
    ]
    for i, left in enumerate(blocks):
        for right in blocks[i:]:
            _add_tiles(total, left, right, len(layers))


def _add_tiles(total: Tensor, left: _Block, right: _Block, layers: int) -> None:
    """The inner products of two blocks' rows, and their mirror image."""
    terms = []
    for index in range(layers):
        for one, other in itertools.product(left.factors(index), right.factors(index)):
            both = one.biased and other.biased
            if one.group != other.group or (one.inputs is None and not both):
                continue  # different groups share no parameter
            if one.inputs is None or other.inputs is None:
                inner = one.signals.new_ones(1, 1)
            else:
                inner = torch.addmm(one.signals.new_full((1,), float(both)), one.inputs, other.inputs.mT)
            terms.append((one.signals, other.signals, inner[:, None]))
    there = total[left.start : left.stop, right.start : right.stop].view(*left.shape, *right.shape)
    back = total[right.start : right.stop, left.start : left.stop].view(*right.shape, *left.shape)
    for i, mine in enumerate(left.columns):
        for theirs in right.columns[i if left is right else 0 :]:
            tile: Tensor | None = None
            for g, h, inner in terms:
                g, h = g[mine], h[theirs]
                products = (g.flatten(0, 1) @ h.flatten(0, 1).mT).view(*g.shape[:2], *h.shape[:2])
                tile = products.mul_(inner) if tile is None else tile.addcmul_(products, inner)
            if tile is None:
                continue
            there[mine, left.part, theirs, right.part] += tile
            if left is not right or mine != theirs:
                back[theirs, right.part, mine, left.part] += tile.permute(2, 3, 0, 1)
