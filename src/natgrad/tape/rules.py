"""How a parameter acts: one rule for each kind of call that the tape understands.

A rule reads the arguments of a torch function and says which parameters acted as a linear map, on which input, and
how positions of that input map to rows of the map. A rule sees the function that was called, never a module class,
so that `F.linear(x, self.w)` counts like `nn.Linear`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
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
    def within(self, before: int, after: int) -> Geometry:
        """The same, of a call that used a slice of the weight."""

    @abc.abstractmethod
    def unbatched(self, raw: Tensor) -> bool:
        """Whether an input has no batch dimension."""


@dataclass(frozen=True)
class LinearGeometry(Geometry):
    """y = x Wᵀ + b over any leading dimensions; positions that share the weight are summed over.

    Attributes:
        columns: vectors are columns: y = W x.
        examples_second: a position comes first, and then an example, as in recurrent networks and attention.
        before: how many positions come before an example, where `tape.axes` found it out.
    """

    name: str = "linear"
    groups: int = 1
    beside: tuple[int, int] = (0, 0)
    columns: bool = False
    examples_second: bool = False
    before: int | None = None

    def inputs(self, raw: Tensor, examples: int) -> Float[Tensor, "batch shared f"]:
        x = raw.mT if self.columns and raw.dim() > 1 else raw
        if self.before is None and not self.examples_second:
            return _by_example(x, examples)
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) % examples:  # not the batch
            return rows[None]
        before = len(rows) // examples if self.before is None else self.before
        return rows.view(before, examples, -1, x.shape[-1]).transpose(0, 1).flatten(1, 2)

    def signals(self, raw: Tensor, examples: int) -> Float[Tensor, "batch shared f"]:
        return _widened(self.inputs(raw, examples), self.beside)

    def within(self, before: int, after: int) -> Geometry:
        return replace(self, beside=(before, after))

    def unbatched(self, raw: Tensor) -> bool:
        return raw.dim() == 1


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

    def within(self, before: int, after: int) -> Geometry:
        return replace(self, beside=(before, after))

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
        transposed: the weight has its input axis first.
    """

    weight: Tensor
    bias: Tensor | None
    raw_input: Tensor
    geometry: Geometry
    transposed: bool = False


def _by_example(x: Tensor, examples: int) -> Tensor:
    if x.dim() == 1:
        return x.reshape(1, 1, -1)
    if x.shape[0] != examples and x.shape[0] % examples == 0:
        return x.reshape(examples, -1, x.shape[-1])  # examples and positions were flattened together
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _widened(signals: Tensor, beside: tuple[int, int]) -> Tensor:
    """Zeros for the rows of the map that a call did not use."""
    return F.pad(signals, beside) if any(beside) else signals


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use | None:
    return Use(weight, bias, input, LinearGeometry()) if weight.dim() == 2 else None


def source(tensor: Tensor) -> Tensor:
    """What a tensor is a view of; itself if it is none."""
    return tensor if tensor._base is None else tensor._base


def _is_map(tensor: Any) -> bool:
    parameter = source(tensor)
    return tensor.dim() == 2 and isinstance(parameter, nn.Parameter) and parameter.requires_grad


def _matmul(input: Tensor, other: Tensor, **_: Any) -> Use | None:
    if _is_map(other):
        return Use(other, None, input, LinearGeometry("matmul"), transposed=True)
    return Use(input, None, other, LinearGeometry("matmul", columns=True)) if _is_map(input) else None


def _mm(input: Tensor, mat2: Tensor, **_: Any) -> Use | None:
    return _matmul(input, mat2)


def _mv(input: Tensor, vec: Tensor, **_: Any) -> Use | None:
    return _matmul(input, vec)


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1.0, alpha: float = 1.0, **_: Any
) -> Use | None:
    if beta != 1 or alpha != 1 or input.dim() != 1 or not _is_map(mat2):
        return None
    return Use(mat2, input, mat1, LinearGeometry("addmm"), transposed=True)


def _tuple(value: int | tuple[int, ...] | list[int], length: int) -> tuple[int, ...]:
    return (value,) * length if isinstance(value, int) else tuple(value) * (length // len(value))


def _convolution(spatial: int) -> Callable[..., Use]:
    def rule(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
    ) -> Use:
        kernel = tuple(weight.shape[2:])
        dilated = _tuple(dilation, spatial)
        if padding == "valid":
            padded = ((0, 0),) * spatial
        elif padding == "same":  # torch puts the odd one at the end
            totals = [d * (k - 1) for d, k in zip(dilated, kernel, strict=True)]
            padded = tuple((t // 2, t - t // 2) for t in totals)
        else:
            assert not isinstance(padding, str)
            padded = tuple((p, p) for p in _tuple(padding, spatial))
        geometry = ConvolutionGeometry(
            f"conv{spatial}d", kernel, _tuple(stride, spatial), padded, dilated, groups
        )
        return Use(weight, bias, input, geometry)

    return rule


def _transposed_convolution(spatial: int) -> Callable[..., Use]:
    def rule(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        dilation: int | tuple[int, ...] = 1,
    ) -> Use:
        kernel, dilated = tuple(weight.shape[2:]), _tuple(dilation, spatial)
        sides = zip(kernel, dilated, _tuple(padding, spatial), _tuple(output_padding, spatial), strict=True)
        padded = tuple((d * (k - 1) - p, d * (k - 1) - p + q) for k, d, p, q in sides)
        geometry = ConvolutionGeometry(
            f"conv_transpose{spatial}d",
            kernel,
            (1,) * spatial,
            padded,
            dilated,
            groups,
            spread=_tuple(stride, spatial),
        )
        return Use(weight, bias, input, geometry, transposed=True)

    return rule


RULES: dict[Callable[..., Tensor], Callable[..., Use | None]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _mm,
    Tensor.mm: _mm,
    torch.mv: _mv,
    Tensor.mv: _mv,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    torch.conv_transpose1d: _transposed_convolution(1),
    torch.conv_transpose2d: _transposed_convolution(2),
    torch.conv_transpose3d: _transposed_convolution(3),
}
