"""How a parameter acts: one rule for each kind of call that the tape understands.

A rule reads the arguments of a torch function and says which parameters acted as a linear map, on which input, and
how positions of that input map to rows of the map. A rule sees the function that was called, never a module class,
so that `F.linear(x, self.w)` counts like `nn.Linear`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


class Geometry(abc.ABC):
    """How a call's raw input and output become the layout ``[batch, shared, features]``."""

    name: str
    groups: int

    @abc.abstractmethod
    def inputs(self, raw: Tensor, examples: int) -> Tensor:
        """The rows that the weight multiplied: ``[batch, shared, groups · in]``."""

    @abc.abstractmethod
    def signals(self, raw: Tensor, examples: int) -> Tensor:
        """Back-propagated signals, row by row: ``[batch, shared, groups · out]``."""

    @abc.abstractmethod
    def unbatched(self, raw: Tensor) -> bool:
        """Whether an input has no batch dimension."""


@dataclass(frozen=True)
class LinearGeometry(Geometry):
    """y = x Wᵀ + b over any leading dimensions; positions that share the weight are summed over."""

    name: str = "linear"
    groups: int = 1

    def inputs(self, raw: Float[Tensor, "*lead f"], examples: int) -> Float[Tensor, "batch shared f"]:
        return _by_example(raw, examples)

    def signals(self, raw: Float[Tensor, "*lead f"], examples: int) -> Float[Tensor, "batch shared f"]:
        return _by_example(raw, examples)

    def unbatched(self, raw: Tensor) -> bool:
        return raw.dim() == 1


@dataclass(frozen=True)
class ConvolutionGeometry(Geometry):
    """A convolution: each output position reads one patch, and every patch shares the weight."""

    name: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # (before, after) for each spatial dimension
    dilation: tuple[int, ...]
    groups: int

    def inputs(self, raw: Tensor, examples: int) -> Float[Tensor, "batch shared f"]:
        spatial = len(self.kernel)
        x = raw if raw.dim() == spatial + 2 else raw.unsqueeze(0)
        if any(before or after for before, after in self.padding):
            x = F.pad(x, [side for pair in reversed(self.padding) for side in pair])
        if spatial == 1:  # im2col exists for two spatial dimensions only
            x = x.unsqueeze(-2)
        kernel, stride, dilation = (
            (1, *v) if spatial == 1 else v for v in (self.kernel, self.stride, self.dilation)
        )
        patches = F.unfold(x, kernel, dilation=dilation, stride=stride)
        return _by_example(patches.transpose(1, 2), examples)

    def signals(self, raw: Tensor, examples: int) -> Float[Tensor, "batch shared f"]:
        g = raw if raw.dim() == len(self.kernel) + 2 else raw.unsqueeze(0)
        return _by_example(g.flatten(2).transpose(1, 2), examples)

    def unbatched(self, raw: Tensor) -> bool:
        return raw.dim() == len(self.kernel) + 1


@dataclass(frozen=True)
class Use:
    """One call in which parameters acted by a rule."""

    weight: Tensor
    bias: Tensor | None
    raw_input: Tensor
    geometry: Geometry


def _by_example(x: Tensor, examples: int) -> Tensor:
    if x.dim() == 1:
        return x.reshape(1, 1, -1)
    if x.shape[0] != examples and x.shape[0] % examples == 0:
        return x.reshape(examples, -1, x.shape[-1])  # examples and positions were flattened together
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use:
    return Use(weight, bias, input, LinearGeometry())


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


RULES: dict[Callable[..., Tensor], Callable[..., Use]] = {
    F.linear: _linear,
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
}
