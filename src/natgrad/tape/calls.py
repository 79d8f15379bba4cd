"""One call of a linear map, as the tape keeps it until signals come back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from natgrad.tape.geometry import Geometry, LinearGeometry, Use
from natgrad.tape.records import Block
from natgrad.tape.views import Place, edge_of


@dataclass(frozen=True)
class Call:
    """One covered call of the forward pass, still waiting for its signals."""

    block: Block
    geometry: Geometry
    raw_inputs: Tensor
    edge: GradientEdge
    shape: torch.Size  # of its result, and so of its signals
    has_bias: bool
    nbytes: int = 0  # of these
    half: bool = False  # whether these have few exponents, as float16


def outputs_of(use: Use, place: Place, parameter: Tensor) -> int:
    """How many outputs the whole map of a parameter has, of all groups.

    Args:
        use: a call.
        place: which part of the map its weight is.
        parameter: the source of the weight.
    """
    if place.flat and use.outputs is not None:
        return use.outputs
    return parameter.shape[1] * use.geometry.groups if place.transposed else parameter.shape[0]


def call_of(
    block: Block, use: Use, place: Place, result: Tensor, has_bias: bool, examples_second: bool = False
) -> Call:
    """What is kept of a call.

    Args:
        block: the whole map.
        use: the call.
        place: which part of the map its weight is.
        result: what it returned.
        has_bias: whether the block's bias was added.
        examples_second: whether positions come before examples.
    """
    groups = block.groups
    if use.outputs is not None:
        rows = use.outputs
    else:
        rows = use.weight.shape[1 if use.transposed else 0] * (groups if use.transposed else 1)
    read = use.weight.numel() * groups // rows
    geometry = use.geometry.within(
        (place.start, block.outputs * groups - place.start - rows),
        (place.column, block.inputs * groups - place.column - read),
    )
    if examples_second and isinstance(geometry, LinearGeometry):
        geometry = replace(geometry, examples_second=True)
    return Call(
        block,
        geometry,
        use.raw_input.detach(),
        edge_of(result),
        result.shape,
        has_bias,
        result.numel() * result.element_size(),
        result.dtype == torch.float16,
    )
