"""How a parameter acts: one rule for each kind of call that the tape understands.

A rule reads the arguments of a torch function and says which parameters acted as a linear map, on which input, and
how positions of that input map to rows of the map. A rule sees the function that was called, never a module class,
so that `F.linear(x, self.w)` counts like `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natgrad.tape.contractions import CONTRACTIONS
from natgrad.tape.contractions import matmul as stacked
from natgrad.tape.geometry import ConvolutionGeometry, LinearGeometry, Use, source


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use | None:
    return Use(weight, bias, input, LinearGeometry()) if weight.dim() == 2 else None


def _is_map(tensor: Any) -> bool:
    parameter = source(tensor)
    return tensor.dim() == 2 and isinstance(parameter, nn.Parameter) and parameter.requires_grad


def _matmul(input: Tensor, other: Tensor, **_: Any) -> Use | None:
    if _is_map(other):
        return Use(other, None, input, LinearGeometry("matmul"), transposed=True)
    if _is_map(input):
        return Use(input, None, other, LinearGeometry("matmul", columns=True))
    return stacked(input, other)


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


# What torch takes for each spatial dimension: one number for all, or a sequence.
Sizes = int | tuple[int, ...] | list[int]


def _tuple(value: Sizes, length: int) -> tuple[int, ...]:
    return (value,) * length if isinstance(value, int) else tuple(value) * (length // len(value))


def _convolution(spatial: int) -> Callable[..., Use]:
    def rule(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
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
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        dilation: Sizes = 1,
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
    **CONTRACTIONS,
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
