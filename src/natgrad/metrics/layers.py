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
        most: int | None = None,
    ) -> float:
        """Total ← decay · total + Σ ã ãᵀ over examples and positions; or over examples, of the mean position.

        Args:
            total: square, with the homogeneous coordinate if the block has a bias; a vector if diagonal.
            decay: what remains of it.
            weights: a factor of each example; 1 if None.
            reduce: whether positions are averaged first.
            diagonal: whether the diagonal alone is wanted.
            most: examples are left out, evenly spaced, where there are more rows, but `ENOUGH` stay; None for all.

        Returns:
            How many rows were added, each counted by its weight.
        """
        roots = None if weights is None or len(weights) != self.examples else weights.sqrt()
        if most is not None:
            stride = _apart(self.examples, self.positions, most)
            uses = [dataclasses.replace(use, reading=use.reading.every(stride)) for use in self.uses]
            roots = None if roots is None else roots[::stride]
        else:
            uses = list(self.uses)
        count = float(len(uses[0].reading) if roots is None else roots.square().sum())
        if reduce and self.positions > 1:
            mean = torch.stack([_summed(use) for use in uses]).sum(0) / self.positions
            biased = sum(use.reading.positions for use in uses if use.biased) / self.positions
            _add_inputs(
                total, Positions(mean.flatten(1)[:, None], self.block.groups), biased, decay, roots, diagonal
            )
            return count
        for use in uses:
            _add_inputs(total, use.reading, float(use.biased), decay, roots, diagonal)
            decay = 1.0
        return count * self.positions

    def gram_of_signals(self, reduce: bool = False, diagonal: bool = False) -> Float[Tensor, "..."]:
        """Σ g gᵀ [*groups, o, o] over passes, examples and positions; or over passes and examples, of the sum over
        positions. If diagonal, the diagonal alone [o], of an ungrouped block.
        """
        block, first = self.block, columns_of(self.uses[0])[0]
        total = first.new_zeros(block.groups, *(block.outputs,) * (1 if diagonal else 2))
        if reduce and self.positions > 1:
            for parts in zip(*map(columns_of, self.uses), strict=True):
                together = torch.stack([g.sum(-1) for g in parts]).sum(0)
                _add_signals(total, together[..., None])
        else:
            for column in (column for use in self.uses for column in columns_of(use)):
                _add_signals(total, column)
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
    total: Tensor,
    reading: Reading,
    biased: float,
    decay: float,
    roots: Float[Tensor, "n"] | None,
    diagonal: bool,
) -> None:
    """Total ← decay · total + Σₙₛ wₙ ã ãᵀ, given √w; the homogeneous coordinate is the last row and column."""
    if diagonal:
        _add_input_squares(total, reading, biased, decay, roots)
        return
    features, size = reading.features, total.shape[-1]
    blocks = total.view(-1, size, size)
    inner = blocks[:, :features, :features]
    weighted = roots is not None
    if roots is None:
        roots = total.new_ones(len(reading))
    else:
        reading = _changed(reading, lambda x: x * roots.view(-1, *[1] * (x.ndim - 1)))
    if isinstance(reading, Patches):
        add_patch_moments(inner, reading, decay)
        sums = sum_of_patches(reading, roots) if size > features else None
    else:
        rows = reading.vectors(slice(None)).permute(1, 0, 3, 2)  # [groups, n, s, f]
        flat = [x.reshape(-1, features) for x in rows]
        for own, x in zip(inner, flat, strict=True):
            accumulate_gram(own, x, decay, 1.0)
        if size == features:
            sums = None
        elif weighted:
            sums = torch.einsum("n,gnsf->gf", roots, rows)
        else:
            sums = torch.stack([x.sum(0) for x in flat])
    if sums is not None:
        edge = blocks[:, :features, features].mul_(decay).add_(sums, alpha=biased)
        blocks[:, features, :features] = edge
        corner = roots.square().sum() * (reading.positions * biased**2)
        blocks[:, features, features] = decay * blocks[:, features, features] + corner


def _add_input_squares(
    total: Float[Tensor, "i"], reading: Reading, biased: float, decay: float, roots: Float[Tensor, "n"] | None
) -> None:
    """The same of the diagonal, for one group."""
    total.mul_(decay)
    step = max(1, CACHED // (reading.features * reading.positions))
    for start in range(0, len(reading), step):
        part = slice(start, start + step)
        squares = reading.vectors(part)[:, 0].square().sum(-1)
        weights = squares.new_ones(len(squares)) if roots is None else roots[part].square()
        total[: reading.features] += weights @ squares
        if len(total) > reading.features:
            total[-1] += weights.sum() * (reading.positions * biased**2)


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
