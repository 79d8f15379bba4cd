"""One batch's rows J of a Fisher information matrix F = JᵀJ, layer by layer.

A linear map's part of the row of a signal column c and an example n is Σₛ g[c, n, s] ⊗ a[n, s], a sum over positions
of outer products. So it is kept as what the map read and the signals that came back to it, and is never formed: a
product with K vectors is two matrix products, whatever the number of columns,

    J v:  Σₛ g[c, n, s]ᵀ V a[n, s]          Jᵀ w:  Σₙₛ (Σ_c w[c, n] g[c, n, s]) a[n, s]ᵀ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.operators.readings import Reading

Rows = dict[str, Tensor]

# Numbers in one intermediate result: few enough that they stay in a cache, many enough for matrix products.
PORTION = 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """One use of a linear map.

    Attributes:
        reading: what the map read.
        signals: what came back to its outputs, the loss's constants inside: g[n, c, g, o, s], in which strides are
            free as long as c, g and o are in this order; or its columns c apart, each [n, g, o, s].
        biased: whether the bias was added.
    """

    reading: Reading
    signals: Tensor | tuple[Tensor, ...]
    biased: bool = True

    @property
    def columns(self) -> int:
        """c."""
        return len(self.signals) if isinstance(self.signals, tuple) else self.signals.shape[1]

    def stored(self) -> Use:
        """The same with signals that nobody else can change."""
        return dataclasses.replace(self, signals=self.part(slice(None)))

    def part(self, examples: slice) -> Float[Tensor, "n c g o s"]:
        """The signals of some examples."""
        if isinstance(self.signals, Tensor):
            return self.signals[examples]
        columns = [column[examples] for column in self.signals]
        if positions_first(columns[0]):
            return torch.stack([g.permute(0, 3, 1, 2) for g in columns], 2).permute(0, 2, 3, 4, 1)
        return torch.stack(columns, 1)


def positions_first(signals: Tensor) -> bool:
    """Whether positions vary more slowly than features, as in a linear map's signals and not in a convolution's."""
    return signals.shape[-1] == 1 or signals.stride(-1) != 1


@dataclasses.dataclass(frozen=True, eq=False)
class LayerRows:
    """A linear map's part of J: its weight and bias, of which one may be left out.

    Attributes:
        weight: the weight's name; None where J has no such part.
        bias: likewise.
        uses: one or several, in which parts add up.
        transposed: the weight is stored with its input axis first (see `linalg.kronecker`).
    """

    weight: str | None
    bias: str | None
    uses: tuple[Use, ...]
    transposed: bool = False

    @property
    def simple(self) -> bool:
        """Whether each row is a single outer product, of which squares and inner products factor."""
        return len(self.uses) == 1 and self.uses[0].reading.positions == 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(g, o, f)."""
        reading, use = self.uses[0].reading, self.uses[0]
        one = use.signals[0] if isinstance(use.signals, tuple) else use.signals
        return reading.groups, one.shape[-2], reading.features

    def stored(self) -> LayerRows:
        """The same with signals that nobody else can change."""
        return dataclasses.replace(self, uses=tuple(use.stored() for use in self.uses))

    def chunks(self, each: int) -> Iterator[slice]:
        """Examples, so many at a time that `each` numbers for every one of them are a portion."""
        count, step = len(self.uses[0].reading), max(1, PORTION // max(each, 1))
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))

    def matmul(self, rows: Rows) -> Float[Tensor, "K c n"]:
        """J v for K vectors."""
        g, o, _ = self.sizes
        name = self.weight or self.bias
        assert name is not None
        K, use = len(rows[name]), self.uses[0]
        result = rows[name].new_zeros(K, use.columns, len(use.reading))
        maps = None if self.weight is None else self._maps(rows[self.weight])
        shift = None if self.bias is None else rows[self.bias].reshape(1, K, g, o, 1)
        for use in self.uses:
            if maps is None and not use.biased:
                continue
            for part in self.chunks(K * g * o * use.reading.positions):
                if maps is None:
                    assert shift is not None
                    forms = use.part(part).sum(4).flatten(2) @ shift.reshape(K, -1).mT
                else:
                    images = use.reading.apply(maps, part)
                    if shift is not None and use.biased:
                        images += shift
                    forms = _inner(use.part(part), images)
                result[:, :, part] += forms.permute(2, 1, 0)
        return result

    def rmatmul(self, weights: Float[Tensor, "K c n"]) -> Rows:
        """Jᵀ w for K vectors."""
        g, o, f = self.sizes
        K = len(weights)
        maps, shift = weights.new_zeros(K, g, o, f), weights.new_zeros(K, g * o)
        for use in self.uses:
            for part in self.chunks(K * g * o * use.reading.positions):
                combined = weights[:, :, part].permute(2, 0, 1).contiguous()  # else bmm goes one by one
                signals = _combined(combined, use.part(part))
                if self.weight is not None:
                    maps += use.reading.gather(signals, part)
                if self.bias is not None and use.biased:
                    shift += signals.sum((0, 4)).flatten(1)
        found: Rows = {}
        if self.weight is not None:
            found[self.weight] = self._stored(maps).flatten(1)
        if self.bias is not None:
            found[self.bias] = shift
        return found

    def _maps(self, weights: Float[Tensor, "K ..."]) -> Float[Tensor, "K g o f"]:
        """K weights as they are stored, as linear maps."""
        g, o, f = self.sizes
        if not self.transposed:
            return weights.reshape(len(weights), g, o, f)
        taps = self.uses[0].reading.taps
        return weights.reshape(len(weights), g, f // taps, o, taps).transpose(2, 3).flatten(3)

    def _stored(self, maps: Float[Tensor, "*K g o f"]) -> Float[Tensor, "*K g x y"]:
        """Linear maps in the order in which their weights are stored."""
        if not self.transposed:
            return maps
        return maps.unflatten(-1, (-1, self.uses[0].reading.taps)).transpose(-3, -2).flatten(-2)

    def explicit(self, part: slice, outputs: slice = slice(None)) -> tuple[Tensor | None, Tensor | None]:
        """The rows themselves of some examples: those of the map [n, g, c, o, f], and of the bias [n, g, c, o]."""
        weight: Tensor | None = None
        bias: Tensor | None = None
        for use in self.uses:
            signals = use.part(part)[:, :, :, outputs].transpose(1, 2)  # [n, g, c, o, s]
            if self.weight is not None:
                products = signals.flatten(2, 3) @ use.reading.vectors(part).mT
                products = products.view(*signals.shape[:4], -1)
                weight = products if weight is None else weight.add_(products)
            if self.bias is not None:
                sums = signals.sum(4) * float(use.biased)
                bias = sums if bias is None else bias + sums
        return weight, bias

    def squares(self) -> Rows:
        """The diagonal of JᵀJ."""
        g, o, f = self.sizes
        use = self.uses[0]
        signals = use.signals if isinstance(use.signals, Tensor) else use.signals[0]
        maps, shift = signals.new_zeros(g, o, f), signals.new_zeros(g, o)
        if self.simple:  # the square of an outer product is the outer product of squares
            squares = _summed_squares(use)[..., 0]
            if self.weight is not None:
                inputs = use.reading.vectors(slice(None))[..., 0].square()
                maps = squares.permute(1, 2, 0) @ inputs.transpose(0, 1)
            if use.biased:
                shift = squares.sum(0)
        else:
            for part in self.chunks(use.columns * g * o * (f + use.reading.positions)):
                weight, bias = self.explicit(part)
                if weight is not None:
                    maps += weight.square_().sum((0, 2))
                if bias is not None:
                    shift += bias.square().sum((0, 2))
        found = {} if self.weight is None else {self.weight: self._stored(maps)}
        return found if self.bias is None else found | {self.bias: shift}

    def flat(self, part: slice) -> dict[str, Float[Tensor, "c n p"]]:
        """The rows themselves of some examples, by parameter."""
        weight, bias = self.explicit(part)
        stored = None if weight is None else self._stored(weight.movedim(2, 0))
        found = {self.weight: stored, self.bias: None if bias is None else bias.movedim(2, 0)}
        return {name: own.flatten(2) for name, own in found.items() if name is not None and own is not None}

    def map_tensors(
        self, change: Callable[[Tensor], Tensor], reading: Callable[[Reading], Reading]
    ) -> LayerRows:
        """The same with other signals and readings."""
        uses = []
        for use in self.uses:
            signals = change(use.part(slice(None)))
            uses.append(Use(reading(use.reading), signals, use.biased))
        return dataclasses.replace(self, uses=tuple(uses))


def _inner(signals: Float[Tensor, "n c g o s"], images: Float[Tensor, "n K g o s"]) -> Float[Tensor, "n c K"]:
    """Σ over groups, outputs and positions, in an order that copies neither."""
    n, c, K = len(signals), signals.shape[1], images.shape[1]
    if signals.shape[-1] == 1 or not positions_first(signals):
        return signals.reshape(n, c, -1) @ images.reshape(n, K, -1).mT
    left, right = (t.permute(0, 4, 1, 2, 3).flatten(3) for t in (signals, images))
    return (left @ right.mT).sum(1)


def _combined(
    weights: Float[Tensor, "n K c"], signals: Float[Tensor, "n c g o s"]
) -> Float[Tensor, "n K g o s"]:
    """Σ_c w[n, c] g[n, c], strides as those of the signals."""
    n, c, g, o, s = signals.shape
    if s == 1 or not positions_first(signals):
        return (weights @ signals.reshape(n, c, -1)).view(n, -1, g, o, s)
    by_position = signals.permute(0, 4, 1, 2, 3).flatten(3)
    return (weights[:, None] @ by_position).view(n, s, -1, g, o).permute(0, 2, 3, 4, 1)


def _summed_squares(use: Use) -> Float[Tensor, "n g o s"]:
    """Σ_c g²."""
    if isinstance(use.signals, Tensor):
        return use.signals.square().sum(1)
    total = use.signals[0].square()
    for column in use.signals[1:]:
        total.addcmul_(column, column)
    return total


@dataclasses.dataclass(frozen=True, eq=False)
class BatchRows:
    """One batch's rows of J.

    Attributes:
        columns: c.
        examples: n.
        layers: the linear maps' parts.
        rest: name → explicit rows of the other parameters.
        scale: a factor of all rows.
    """

    columns: int
    examples: int
    layers: tuple[LayerRows, ...]
    rest: dict[str, Float[Tensor, "c n *shape"]]
    scale: float = 1.0

    def __len__(self) -> int:
        return self.columns * self.examples

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept."""
        for layer in self.layers:
            for use in layer.uses:
                yield use.reading.state()[0]
                yield from (use.signals,) if isinstance(use.signals, Tensor) else use.signals
        yield from self.rest.values()

    def named_sums(self) -> dict[str, Tensor]:
        """A number for each part, by parameter, which is not finite if anything there is not."""
        sums = {}
        for layer in self.layers:
            parts = [t.sum() for use in layer.uses for t in (use.reading.state()[0], use.part(slice(None)))]
            sums[layer.weight or layer.bias or ""] = torch.stack(parts).sum()
        return sums | {name: own.sum() for name, own in self.rest.items()}

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def matmul(self, rows: Rows) -> Float[Tensor, "K m"]:
        """J v for K vectors."""
        first = next(iter(rows.values()))
        total = first.new_zeros(len(first), self.columns, self.examples)
        for layer in self.layers:
            total += layer.matmul(rows)
        forms = total.flatten(1)
        for name, own in self.rest.items():
            forms = (
                forms + rows[name].reshape(len(rows[name]), -1) @ own.flatten(0, 1).reshape(len(self), -1).mT
            )
        return forms * self.scale

    def rmatmul(self, weights: Float[Tensor, "K m"]) -> Rows:
        """Jᵀ w for K vectors, each parameter's part flat."""
        weights = weights * self.scale
        by_column = weights.view(len(weights), self.columns, self.examples)
        found: Rows = {}
        for layer in self.layers:
            found |= layer.rmatmul(by_column)
        return found | {
            name: weights @ own.flatten(0, 1).reshape(len(self), -1) for name, own in self.rest.items()
        }

    def squares(self) -> Rows:
        """The diagonal of JᵀJ."""
        found: Rows = {}
        for layer in self.layers:
            found |= layer.squares()
        found |= {name: own.square().sum((0, 1)) for name, own in self.rest.items()}
        return {name: value * self.scale**2 for name, value in found.items()}

    def explicit(self, part: slice) -> dict[str, Float[Tensor, "c n p"]]:
        """J itself for some examples, by parameter."""
        found: dict[str, Tensor] = {}
        for layer in self.layers:
            found |= {name: own * self.scale for name, own in layer.flat(part).items()}
        return found | {
            name: own[:, part].reshape(self.columns, -1, own[0, 0].numel()) * self.scale
            for name, own in self.rest.items()
        }

    def restrict(self, names: Sequence[str]) -> BatchRows:
        """The columns of J for some of the parameters."""
        layers = []
        for layer in self.layers:
            weight, bias = (name if name in names else None for name in (layer.weight, layer.bias))
            if weight is not None or bias is not None:
                layers.append(dataclasses.replace(layer, weight=weight, bias=bias))
        rest = {name: own for name, own in self.rest.items() if name in names}
        return dataclasses.replace(self, layers=tuple(layers), rest=rest)

    def to(self, dtype: torch.dtype, device: torch.device) -> BatchRows:
        """The same in another dtype, or on another device."""
        layers = tuple(
            layer.map_tensors(lambda g: g.to(device, dtype), lambda a: a.to(dtype, device))
            for layer in self.layers
        )
        rest = {name: own.to(device, dtype) for name, own in self.rest.items()}
        return dataclasses.replace(self, layers=layers, rest=rest)
