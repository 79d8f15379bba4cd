"""Views of a parameter act as the parameter: slices of a packed weight, of some inputs too, and its transpose.

A view lies in its parameter's memory, so that offset and strides say which rows and columns of the linear map it is,
and whether the map is stored by columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from natgrad.tape.geometry import LinearGeometry, Use, stored
from natgrad.tape.records import Block


@dataclass(frozen=True)
class Place:
    """Which rows and columns of a parameter's linear map a call used.

    Attributes:
        start: the first row.
        transposed: the parameter is stored with its input axis first.
        column: the first column.
        flat: axes of the parameter are one in the map (see `linalg.kronecker`).
    """

    start: int
    transposed: bool
    column: int = 0
    flat: bool = False

    def fits(self, block: Block) -> bool:
        """Whether a block's map is laid out so."""
        return (self.transposed, self.flat) == (block.transposed, block.flat)


def places(use: Use, parameter: Tensor) -> Iterator[Place]:
    """The places of a call's weight in a parameter, of which it is a view: two only for one row or one column.

    Args:
        use: the call.
        parameter: the source of the call's weight.
    """
    weight = use.weight
    if use.outputs is not None:
        whole = weight.numel() == parameter.numel() and weight.permute(stored(weight)).is_contiguous()
        if whole and parameter.is_contiguous():
            shape = (
                (parameter.shape[0], use.outputs) if use.transposed else (use.outputs, parameter[0].numel())
            )
            yield Place(0, use.transposed, flat=use.geometry.groups > 1 or parameter.shape != shape)
    elif not isinstance(use.geometry, LinearGeometry):
        if weight.shape == parameter.shape and weight.stride() == parameter.stride():
            yield Place(0, use.transposed)
        elif not use.transposed and use.geometry.groups == 1 and weight.dim() == parameter.dim():
            starts = _starts(weight.flatten(1), parameter, False) if weight[0].is_contiguous() else ()
            yield from (place for place in starts if weight[0].shape == parameter[0].shape)
    elif weight is parameter and parameter.dim() > 1:
        yield Place(0, use.transposed)
    elif parameter.dim() > 1:
        used = weight.mT if use.transposed else weight
        if parameter[0].is_contiguous():
            yield from _starts(used, parameter, False)
        if parameter.dim() == 2:
            yield from _starts(used, parameter.mT, True)


def _starts(used: Float[Tensor, "o f"], whole: Tensor, transposed: bool) -> Iterator[Place]:
    """Where some rows and columns begin in a matrix, all in one memory; nowhere if they are no block of it."""
    matrix = whole.detach() if whole.dim() == 2 else whole.detach().flatten(1)
    offset, (by_row, by_column) = int(used.storage_offset() - matrix.storage_offset()), matrix.stride()
    if by_row >= by_column:
        start, left = divmod(offset, max(by_row, 1))
        column, left = divmod(left, max(by_column, 1))
    else:
        column, left = divmod(offset, by_column)
        start, left = divmod(left, max(by_row, 1))
    aligned = all(
        step == other or size == 1
        for step, other, size in zip(used.stride(), matrix.stride(), used.shape, strict=True)
    )
    fits = start + len(used) <= len(matrix) and column + used.shape[1] <= matrix.shape[1]
    if aligned and not left and fits:
        yield Place(start, transposed, column)


def is_part(bias: Tensor, parameter: Tensor, start: int, outputs: int) -> bool:
    """Whether a call's bias is the part of a parameter that belongs to the rows from `start`.

    Args:
        bias: the call's.
        parameter: its source.
        start: the first row that the call used.
        outputs: how many rows the map has in all.
    """
    offset = bias.storage_offset() - parameter.storage_offset()
    return parameter.shape == (outputs,) and bias.dim() == 1 and offset == start * parameter.stride(0)


def edge_of(result: Tensor) -> GradientEdge:
    """A result's place in the graph: an edge, as an in-place activation moves the tensor to another place.

    Of a product with tokens torch returns a view, and such an activation moves what it is a view of, too: signals are
    then read there, in the shape that this has.
    """
    base = result._base
    whole = base is not None and base.requires_grad and base.numel() == result.numel()
    if base is None or not whole or not (base.is_contiguous() and result.is_contiguous()):
        return get_gradient_edge(result)
    return get_gradient_edge(base)
