"""Weights of more than two axes: `torch.einsum`, and products of many matrices at once, as linear maps in groups.

A contraction of an input with one parameter is a linear map. The parameter's axes are those of its inputs (summed
over), those of its outputs, and those that come before both, along which it is a stack of maps: groups, as in a
grouped convolution. Where input or result lack a group's axis, each group reads the same, or adds to the same.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.tape.geometry import Arrangement, LinearGeometry, Use, source, stored

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Roles:
    """What the axes of a weight do.

    Attributes:
        groups: those that come first.
        inputs: those that are summed over.
        outputs: the others.
        transposed: the inputs come before the outputs.
    """

    groups: Axes
    inputs: Axes
    outputs: Axes
    transposed: bool


def _roles(weight: Axes, given: Axes, result: Axes) -> Roles | None:
    """The roles, with as few groups as there can be; None where the weight is no stack of matrices."""
    for k in range(len(weight)):
        rest = weight[k:]
        if any(axis in given and axis in result for axis in rest):
            continue
        inputs = tuple(axis for axis in rest if axis in given)
        outputs = tuple(axis for axis in rest if axis in result)
        if inputs and outputs and rest in (inputs + outputs, outputs + inputs):
            return Roles(weight[:k], inputs, outputs, rest == inputs + outputs)
    return None


def contraction(name: str, terms: tuple[Axes, Axes, Axes], weight: Tensor, given: Tensor) -> Use | None:
    """A contraction as a linear map; None where it is none.

    Args:
        name: what the call is called.
        terms: the names of the axes of the weight, of the input and of the result.
        weight: the parameter.
        given: the input.
    """
    of_weight, of_input, of_result = terms
    sizes = dict(zip(of_weight, weight.shape, strict=True))
    if weight.dim() > 2:
        of_weight = tuple(of_weight[k] for k in stored(weight))
    known = set(of_weight) | set(of_input)
    if any(len(set(term)) < len(term) for term in terms) or not known >= set(of_result):
        return None  # a diagonal
    if any(sizes.setdefault(a, size) != size for a, size in zip(of_input, given.shape, strict=True)):
        return None  # an axis of length one stands for all
    positions = tuple(axis for axis in of_input if axis not in of_weight)
    roles = _roles(of_weight, of_input, of_result)
    summed = any(axis not in of_result for axis in positions)
    if roles is None or summed or any(a not in of_input + of_result for a in of_weight):
        return None

    def arranged(own: Axes, features: Axes) -> Arrangement:
        wanted = (*positions, *roles.groups, *features)
        order = tuple(own.index(axis) if axis in own else -1 for axis in wanted)
        return Arrangement(order, tuple(sizes[axis] for axis in wanted), len(positions))

    geometry = LinearGeometry(
        name,
        math.prod(sizes[axis] for axis in roles.groups),
        read=arranged(of_input, roles.inputs),
        written=arranged(of_result, roles.outputs),
    )
    if weight.dim() == 2:
        return Use(weight, None, given, geometry, roles.transposed)
    outputs = geometry.groups * math.prod(sizes[axis] for axis in roles.outputs)
    return Use(weight, None, given, geometry, roles.transposed, outputs)


def trained(tensor: Any) -> bool:
    """Whether a tensor is a parameter that is trained, or a view of one."""
    return isinstance(tensor, Tensor) and isinstance(source(tensor), nn.Parameter) and tensor.requires_grad


def einsum(equation: Any, *operands: Any) -> Use | None:
    """`torch.einsum` of two tensors, of which one is a parameter."""
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or sum(map(trained, operands)) != 1:
        return None
    terms = _terms(equation.replace(" ", ""), [operand.dim() for operand in operands])
    if terms is None:
        return None
    (first, second), result = terms
    if trained(operands[0]):
        return contraction("einsum", (first, second, result), operands[0], operands[1])
    return contraction("einsum", (second, first, result), operands[1], operands[0])


def _terms(equation: str, dims: Sequence[int]) -> tuple[list[Axes], Axes] | None:
    """The names of the axes of both operands and of the result, with those that an ellipsis stands for."""
    given, arrow, result = equation.partition("->")
    terms = given.split(",")
    if len(terms) != 2:
        return None
    hidden = [
        dim - len(term.replace("...", "")) if "..." in term else 0
        for term, dim in zip(terms, dims, strict=True)
    ]
    if all("..." in term for term in terms) and hidden[0] != hidden[1]:
        return None  # they broadcast
    if not arrow:
        letters = given.replace(",", "").replace(".", "")
        result = "..." * ("..." in given) + "".join(a for a in sorted(set(letters)) if letters.count(a) == 1)
    several = tuple(f"...{k}" for k in range(max(hidden)))

    def axes(term: str) -> Axes:
        before, dots, after = term.partition("...")
        return (*before, *(several if dots else ()), *after)

    return [axes(term) for term in terms], axes(result)


def matmul(input: Tensor, other: Tensor) -> Use | None:
    """A product of stacks of matrices, of which one is a parameter of three axes."""
    for weight, given, columns in ((other, input, False), (input, other, True)):
        if not trained(weight) or weight.dim() != 3 or given.dim() < 2:
            continue
        outer = tuple(string.ascii_uppercase[: max(given.dim() - 3, 0)])
        stacked = ("e",) if given.dim() > 2 else ()
        of_weight, of_input = (("e", "o", "i"), ("i", "n")) if columns else (("e", "i", "o"), ("n", "i"))
        of_result = ("o", "n") if columns else ("n", "o")
        return contraction(
            "matmul" if given.dim() != 3 else "bmm",
            (of_weight, (*outer, *stacked, *of_input), (*outer, "e", *of_result)),
            weight,
            given,
        )
    return None


def bmm(input: Tensor, mat2: Tensor, **_: Any) -> Use | None:
    """`torch.bmm`."""
    return matmul(input, mat2)


def baddbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1.0, alpha: float = 1.0, **_: Any
) -> Use | None:
    """`torch.baddbmm`; what is added is no bias of the block, as it has an axis more."""
    use = matmul(batch1, batch2)
    if use is None or beta != 1 or alpha != 1:
        return None
    return Use(use.weight, input, use.raw_input, use.geometry, use.transposed, use.outputs)


CONTRACTIONS: dict[Callable[..., Tensor], Callable[..., Use | None]] = {
    torch.einsum: einsum,
    torch.bmm: bmm,
    Tensor.bmm: bmm,
    torch.baddbmm: baddbmm,
    Tensor.baddbmm: baddbmm,
}
"""The rule of each function."""
