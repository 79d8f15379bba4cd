"""What each linear map did in a micro-batch, for the metrics that go layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.linalg import accumulate_gram
from natgrad.metrics.patches import CACHED, add_patch_moments, sum_of_patches
from natgrad.operators.layerrows import LayerRows, Use, positions_first
from natgrad.operators.readings import Patches, Positions, Reading
from natgrad.tape.columns import LayerColumns
from natgrad.tape.elements import ElementColumns
from natgrad.tape.passes import SignalPass
from natgrad.tape.records import Block

# Below so many outputs, products of single examples take less memory than their signals.
SMALL = 32
# Positions of one example are much alike, so that so many examples stay however many positions each has.
ENOUGH = 32


@dataclasses.dataclass(frozen=True)
class SignedSets:
    """Sums of neighbouring examples with their signs.

    Where these are fair and random E[Σₘ y yᵀ] = Σₙ x xᵀ for the sums y of rows x.

    Attributes:
        signs: 1 or −1 for each example.
        size: examples in a set; the last one may have fewer.
    """

    signs: Float[Tensor, "n"]
    size: int

    @classmethod
    def of(cls, signs: Float[Tensor, "n"], count: int) -> SignedSets:
        """At most `count` sets of equal size but for the last."""
        return cls(signs, -(-len(signs) // count))

    def sums(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "m ..."]:
        """Σ ±xₙ over each set."""
        # Signals may lie in memory position by position.
        order = sorted(range(1, x.ndim), key=x.stride, reverse=True)
        rows = x.permute(0, *order)
        flat = rows.reshape(len(x), -1)
        whole, rest = divmod(len(flat), self.size)
        cut = whole * self.size
        found = flat.new_empty(whole + (rest > 0), flat.shape[1])
        # A batch of products of one row reads everything once; a matrix of signs would take many times as long.
        torch.bmm(
            self.signs[:cut].view(whole, 1, self.size),
            flat[:cut].view(whole, self.size, flat.shape[1]),
            out=found[:whole, None],
        )
        if rest:
            torch.mm(self.signs[None, cut:], flat[cut:], out=found[whole:])
        inverse = [1 + order.index(k) for k in range(1, x.ndim)]
        return found.view(len(found), *rows.shape[1:]).permute(0, *inverse)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A block's uses in a micro-batch, with the signals of one pass or of several.

    Attributes:
        block: the parameters that acted.
        uses: how. Their examples are the micro-batch's; where one did not act on the batch, all positions of all uses
            are those of a single example, as nothing says which belong together.
        stride: one in so many of the micro-batch's examples is here.
    """

    block: Block
    uses: tuple[Use, ...]
    stride: int = 1

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return len(self.uses[0].reading)

    @property
    def positions(self) -> int:
        """How many positions of an example share the weight, over all uses."""
        return sum(use.reading.positions for use in self.uses)

    def with_passes_of(self, other: Layer) -> Layer:
        """The same micro-batch's uses, with the signals of further passes."""
        pairs = zip(self.uses, other.uses, strict=True)
        uses = (dataclasses.replace(a, signals=columns_of(a) + columns_of(b)) for a, b in pairs)
        return dataclasses.replace(self, uses=tuple(uses))

    @property
    def rows(self) -> LayerRows:
        """The block's rows of J."""
        return LayerRows(self.block.weight, self.block.bias, self.uses)

    def add_inputs(
        self,
        total: Float[Tensor, "..."],
        decay: float,
        weights: Float[Tensor, "n"] | None = None,
        reduce: bool = False,
        diagonal: bool = False,
        sets: SignedSets | None = None,
    ) -> float:
        """Total ← decay · total + Σ ã ãᵀ over examples and positions; or over examples, of the mean position.

        Args:
            total: square, with the homogeneous coordinate if the block has a bias; a vector if diagonal.
            decay: what remains of it.
            weights: a factor of each example; 1 if None.
            reduce: whether positions are averaged first.
            diagonal: whether the diagonal alone is wanted.
            sets: of examples, if their sums are to stand for these, position by position.

        Returns:
            How many rows the sum is over, each counted by its weight.
        """
        count, first = float(self.examples), columns_of(self.uses[0])[0]
        roots = None
        if weights is not None and len(weights) == self.examples:
            count, roots = float(weights.sum()), weights.sqrt()

        def summed(x: Tensor) -> Tensor:
            weighted = x if roots is None else x * roots.view(-1, *[1] * (x.ndim - 1))
            return weighted if sets is None else sets.sums(weighted)

        ones = summed(first.new_ones(self.examples))  # the homogeneous coordinate
        if reduce and self.positions > 1:
            mean = torch.stack([_summed(use) for use in self.uses]).sum(0).flatten(1) / self.positions
            biased = sum(use.reading.positions for use in self.uses if use.biased) / self.positions
            whole = Positions(summed(mean)[:, None], self.block.groups)
            _add_inputs(total, whole, ones * biased, decay, diagonal)
            return count
        for use in self.uses:
            reading = _changed(use.reading, summed)
            _add_inputs(total, reading, ones * float(use.biased), decay, diagonal)
            decay = 1.0
        return count * self.positions

    def gram_of_signals(
        self, reduce: bool = False, diagonal: bool = False, sets: SignedSets | None = None
    ) -> Float[Tensor, "..."]:
        """Σ g gᵀ [*groups, o, o] over passes, examples and positions; or over passes and examples, of the sum over
        positions.

        Args:
            reduce: whether positions are summed first.
            diagonal: whether the diagonal alone is wanted [o], of an ungrouped block.
            sets: as in `add_inputs`.
        """
        block, first = self.block, columns_of(self.uses[0])[0]
        total = first.new_zeros(block.groups, *(block.outputs,) * (1 if diagonal else 2))
        if reduce and self.positions > 1:
            for parts in zip(*map(columns_of, self.uses), strict=True):
                together = torch.stack([g.sum(-1) for g in parts]).sum(0)
                _add_signals(total, (together if sets is None else sets.sums(together))[..., None])
        else:
            for column in (column for use in self.uses for column in columns_of(use)):
                _add_signals(total, column if sets is None else sets.sums(column))
        return total if block.groups > 1 else total[0]


def layers_of(
    passes: Sequence[SignalPass],
    parameters: Mapping[str, nn.Parameter],
    stride: int = 1,
    most: int | None = None,
) -> tuple[list[Layer], list[ElementColumns]]:
    """The blocks that acted in a forward pass, with the signals of several passes back.

    Args:
        passes: at least one, of one forward pass.
        parameters: whose blocks are wanted.
        stride: one in so many examples of a block is taken.
        most: fewer of them where they have more positions together, but `ENOUGH`; None for no bound.

    Returns:
        The linear maps, and the parameters that acted entry by entry or were looked up, of all examples.
    """
    first = passes[0]
    calls: dict[Block, list[LayerColumns]] = {}
    signals = [one.signals for one in passes]
    found, elements = first.tape.columns(first.outputs, signals, first.examples, parameters.keys())
    for call in found:
        calls.setdefault(call.block, []).append(call)
    layers = []
    for block, own in calls.items():
        dtype = parameters[block.weight].dtype
        uses = [use for use in (call.use(dtype) for call in own) if use is not None]
        if len(uses) < len(own):
            layers.append(Layer(block, tuple(_as_one_example(call, dtype) for call in own)))
            continue
        whole, apart = Layer(block, tuple(uses)), stride
        if most is not None:
            apart *= _apart(-(-whole.examples // stride), whole.positions, most)
        layers.append(Layer(block, tuple(_thinned(use, apart) for use in uses), apart))
    return layers, elements


def columns_of(use: Use) -> tuple[Float[Tensor, "n g o s"], ...]:
    """The signals of each pass."""
    return use.signals if isinstance(use.signals, tuple) else use.signals.unbind(1)


def _apart(examples: int, positions: int, most: int) -> int:
    """The stride at which examples have about so many positions together, where they share a weight."""
    return max(1, min(examples * positions // most, examples // ENOUGH))


def _thinned(use: Use, stride: int) -> Use:
    if stride == 1:
        return use
    signals = tuple(column[::stride].clone() for column in columns_of(use))  # what is left out can go
    return Use(use.reading.every(stride).copied(), signals, use.biased)


def _as_one_example(call: LayerColumns, dtype: torch.dtype) -> Use:
    geometry, groups = call.geometry, call.geometry.groups
    inputs = geometry.inputs(call.raw_inputs.to(dtype), call.examples)
    signals = [geometry.signals(g.to(dtype), call.examples) for g in call.raw_signals]
    return Use(
        Positions(inputs.reshape(1, -1, inputs.shape[-1]), groups),
        tuple(g.reshape(1, -1, groups, call.block.outputs).permute(0, 2, 3, 1) for g in signals),
        call.has_bias,
    )


def _changed(reading: Reading, change: Callable[[Tensor], Tensor]) -> Reading:
    if isinstance(reading, Patches):
        return dataclasses.replace(reading, images=change(reading.images))
    assert isinstance(reading, Positions)
    return Positions(change(reading.values), reading.groups)


def _summed(use: Use) -> Float[Tensor, "n g f"]:
    """Inputs summed over positions."""
    reading, step = use.reading, len(use.reading)
    if isinstance(reading, Patches):
        step = max(1, CACHED // (reading.groups * reading.features * reading.positions))
    parts = [slice(start, start + step) for start in range(0, len(reading), step)]
    return torch.cat([reading.vectors(part).sum(-1) for part in parts])


def _add_inputs(
    total: Tensor, reading: Reading, ones: Float[Tensor, "n"], decay: float, diagonal: bool
) -> None:
    """Total ← decay · total + Σₙₛ ã ãᵀ; the homogeneous coordinate, the same at all positions of an example, is the
    last row and column.
    """
    features, size = reading.features, total.shape[-1]
    if diagonal:
        _add_input_squares(total, reading, ones, decay)
        return
    blocks = total.view(-1, size, size)
    inner = blocks[:, :features, :features]
    if isinstance(reading, Patches):
        add_patch_moments(inner, reading, decay)
        sums = sum_of_patches(reading, ones) if size > features else None
    else:
        rows = reading.vectors(slice(None)).permute(1, 0, 3, 2)  # [groups, n, s, f]
        for own, x in zip(inner, rows, strict=True):
            accumulate_gram(own, x.reshape(-1, features), decay, 1.0)
        sums = torch.einsum("n,gnsf->gf", ones, rows) if size > features else None
    if sums is not None:
        edge = blocks[:, :features, features].mul_(decay).add_(sums)
        blocks[:, features, :features] = edge
        corner = ones.square().sum() * reading.positions
        blocks[:, features, features] = decay * blocks[:, features, features] + corner


def _add_input_squares(
    total: Float[Tensor, "i"], reading: Reading, ones: Float[Tensor, "n"], decay: float
) -> None:
    """The same of the diagonal, for one group."""
    total.mul_(decay)
    step = max(1, CACHED // (reading.features * reading.positions))
    for start in range(0, len(reading), step):
        part = slice(start, start + step)
        total[: reading.features] += reading.vectors(part)[:, 0].square().sum((0, -1))
    if len(total) > reading.features:
        total[-1] += ones.square().sum() * reading.positions


def _add_signals(total: Float[Tensor, "g ..."], signals: Float[Tensor, "n g o s"]) -> None:
    """Total ← total + Σₙₛ g gᵀ, or its diagonal where that is what total is."""
    if total.ndim == 2:
        total += signals.square().sum((0, 3))
        return
    by_position = positions_first(signals)
    for k, own in enumerate(total):
        g = signals[:, k]
        if by_position:
            accumulate_gram(own, g.transpose(1, 2).flatten(0, 1), 1.0, 1.0)
        elif len(own) <= SMALL:
            own += torch.bmm(g, g.mT).sum(0)
        else:
            own.addbmm_(g, g.mT)
