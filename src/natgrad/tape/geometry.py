"""How what a linear map was given and what it returned become rows: the geometry of a call."""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from natgrad.operators.readings import Patches


class Geometry(abc.ABC):
    """How a call's raw input and output become the layout ``[batch, shared, features]``.

    Attributes:
        name: the kind of call.
        groups: of a grouped convolution.
        beside: how many rows the map has before and after those of this call, which used a slice of the weight.
    """

    name: str
    groups: int
    beside: tuple[int, int]

    @abc.abstractmethod
    def inputs(self, raw: Tensor, examples: int) -> Tensor:
        """The rows that the weight multiplied: ``[batch, shared, groups · in]``."""

    @abc.abstractmethod
    def signals(self, raw: Tensor, examples: int) -> Tensor:
        """Back-propagated signals, row by row: ``[batch, shared, groups · out]``."""

    @abc.abstractmethod
    def within(self, beside: tuple[int, int], unread: tuple[int, int]) -> Geometry:
        """The same, of a call that used a slice of the weight.

        Args:
            beside: how many rows the map has before and after those of the slice.
            unread: how many inputs it has before and after those of the slice.
        """

    @abc.abstractmethod
    def unbatched(self, raw: Tensor) -> bool:
        """Whether an input has no batch dimension."""


@dataclass(frozen=True)
class Arrangement:
    """How the axes of a tensor become positions, and one axis of features.

    Attributes:
        order: for each axis that is wanted, which one it is; −1 for one that the tensor has not, and is constant along.
        sizes: how long they are.
        positions: how many of them are positions; the others are features.
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    positions: int

    def __call__(self, x: Tensor) -> Float[Tensor, "*positions f"]:
        """The tensor so arranged."""
        x = x.permute([k for k in self.order if k >= 0])
        for place, k in enumerate(self.order):
            if k < 0:
                x = x.unsqueeze(place)
        return x.expand(self.sizes).reshape(*self.sizes[: self.positions], -1)


@dataclass(frozen=True)
class LinearGeometry(Geometry):
    """y = x Wᵀ + b over any leading dimensions; positions that share the weight are summed over.

    Attributes:
        columns: vectors are columns: y = W x.
        examples_second: a position comes first, and then an example, as in recurrent networks and attention.
        before: how many positions come before an example, where `tape.axes` found it out.
        unread: how many inputs the map has before and after those of this call, which used a slice of the weight.
        read: how the input's axes are arranged, where vectors are not simply its last axis.
        written: likewise the result's.
    """

    name: str = "linear"
    groups: int = 1
    beside: tuple[int, int] = (0, 0)
    columns: bool = False
    examples_second: bool = False
    before: int | None = None
    unread: tuple[int, int] = (0, 0)
    read: Arrangement | None = None
    written: Arrangement | None = None

    def vectors(self, raw: Tensor) -> Float[Tensor, "*positions f"]:
        """An input with its vectors last."""
        return self._arranged(raw, self.read)

    def inputs(self, raw: Tensor, examples: int) -> Float[Tensor, "batch shared f"]:
        return _widened(self._by_example(self.vectors(raw), examples), self.unread)

    def signals(self, raw: Tensor, examples: int) -> Float[Tensor, "batch shared f"]:
        return _widened(self._by_example(self._arranged(raw, self.written), examples), self.beside)

    def _arranged(self, raw: Tensor, arrangement: Arrangement | None) -> Tensor:
        if arrangement is not None:
            return arrangement(raw)
        return raw.mT if self.columns and raw.dim() > 1 else raw

    def _by_example(self, x: Tensor, examples: int) -> Tensor:
        if self.before is None and not self.examples_second:
            return _by_example(x, examples)
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) % examples:  # not the batch
            return rows[None]
        before = len(rows) // examples if self.before is None else self.before
        return rows.view(before, examples, -1, x.shape[-1]).transpose(0, 1).flatten(1, 2)

    def within(self, beside: tuple[int, int], unread: tuple[int, int]) -> Geometry:
        return replace(self, beside=beside, unread=unread)

    def unbatched(self, raw: Tensor) -> bool:
        return raw.dim() == 1 if self.read is None else self.read.positions == 0


@dataclass(frozen=True)
class ConvolutionGeometry(Geometry):
    """A convolution: each output position reads one patch, and every patch shares the weight.

    A transposed one reads patches too, with stride 1, of an image of which the pixels are `spread` apart with zeros
    between. It meets the kernel's taps in reverse order: in their order where image and result are read backwards.

    Attributes:
        padding: (before, after) for each spatial dimension; of the spread image in a transposed convolution.
        spread: the stride of a transposed convolution; None of any other.
    """

    name: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    beside: tuple[int, int] = (0, 0)
    spread: tuple[int, ...] | None = None

    def reading(self, raw: Tensor) -> Patches:
        """The patches."""
        spatial = len(self.kernel)
        x = raw if raw.dim() == spatial + 2 else raw[None]
        if self.spread is not None:
            sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], self.spread, strict=True)]
            wide = x.new_zeros(*x.shape[:2], *sizes)
            there = tuple(slice(None, None, step) for step in (1, 1, *self.spread))
            wide[there] = x
            x = wide
        if any(before or after for before, after in self.padding):
            x = F.pad(x, [side for pair in reversed(self.padding) for side in pair])
        if self.spread is not None:
            x = x.flip(tuple(range(2, 2 + spatial)))
        flat = (1,) * (2 - spatial)  # a signal in time is an image one pixel high
        return Patches(
            x.reshape(*x.shape[:2], *flat, *x.shape[2:]),
            flat + self.kernel,
            flat + self.stride,
            flat + self.dilation,
            self.groups,
        )

    def inputs(self, raw: Tensor, examples: int) -> Float[Tensor, "batch shared f"]:
        patches = self.reading(raw).vectors(slice(None))
        return _by_example(patches.flatten(1, 2).transpose(1, 2), examples)

    def signals(self, raw: Tensor, examples: int) -> Float[Tensor, "batch shared f"]:
        g = raw if raw.dim() == len(self.kernel) + 2 else raw[None]
        if self.spread is not None:
            g = g.flip(tuple(range(2, g.dim())))
        return _widened(_by_example(g.flatten(2).transpose(1, 2), examples), self.beside)

    def within(self, beside: tuple[int, int], unread: tuple[int, int]) -> Geometry:
        assert not any(unread)  # slices of channels that are read have no place in `tape.views`
        return replace(self, beside=beside)

    def unbatched(self, raw: Tensor) -> bool:
        return raw.dim() == len(self.kernel) + 1


@dataclass(frozen=True)
class Use:
    """One call in which parameters acted by a rule.

    Attributes:
        weight: a parameter, or a view of one.
        bias: likewise.
        raw_input: what the weight multiplied.
        geometry: how that becomes rows.
        transposed: the weight has its input axis first; its input axes, as it is stored, if it has more than two.
        outputs: how many outputs the map has, of all groups, where axes of the weight are one; None where its shape
            says so.
    """

    weight: Tensor
    bias: Tensor | None
    raw_input: Tensor
    geometry: Geometry
    transposed: bool = False
    outputs: int | None = None


def source(tensor: Tensor) -> Tensor:
    """What a tensor is a view of; itself if it is none."""
    return tensor if tensor._base is None else tensor._base


def stored(tensor: Tensor) -> list[int]:
    """A tensor's axes in the order in which they lie in memory."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _by_example(x: Tensor, examples: int) -> Tensor:
    if x.dim() == 1:
        return x.reshape(1, 1, -1)
    if x.shape[0] != examples and x.shape[0] % examples == 0:
        return x.reshape(examples, -1, x.shape[-1])  # examples and positions were flattened together
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _widened(rows: Tensor, beside: tuple[int, int]) -> Tensor:
    """Zeros for what the map has beside the part that a call used."""
    return F.pad(rows, beside) if any(beside) else rows
