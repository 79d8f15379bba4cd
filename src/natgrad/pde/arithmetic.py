"""Sums, products, quotients and powers of jets, and linear maps of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad.pde.elementwise import applied, exp, log, power, reciprocal
from natgrad.pde.jet import Jet, in_place, plan_of, refuse, rule, together


def beside(name: str, constant: Any, jet: Jet) -> Any:
    """A tensor without derivatives, or a number, so that it broadcasts over streams as it does over the value."""
    if not isinstance(constant, Tensor) or constant.dim() < jet.value.dim():
        return constant
    if constant.dim() > jet.value.dim():
        refuse(
            name,
            f"of shapes {tuple(jet.value.shape)} and {tuple(constant.shape)} puts a dimension before the examples'",
        )
    return constant.unsqueeze(1)


def widened(value: Tensor, streams: Tensor) -> Tensor:
    """Streams that broadcast as the value did."""
    wanted = (*streams.shape[:2], *value.shape[1:])
    return streams if streams.shape == wanted else streams.expand(wanted)


def same_rank(name: str, a: Jet, b: Jet) -> None:
    """Raises where broadcasting would set examples of one against features of the other."""
    if a.value.dim() != b.value.dim():
        refuse(name, f"of shapes {tuple(a.value.shape)} and {tuple(b.value.shape)} mixes the examples")


def bilinear(name: str, function: Callable[[Any, Any], Tensor], a: Jet, b: Jet) -> Jet:
    """Leibniz: (a b)_k = a_k b + a b_k,  (a b)_kk = a_kk b + 2 a_k b_k + a b_kk."""
    plan = plan_of(name, [a, b])
    value = function(a.value, b.value)
    left, right = together([a, b])
    streams = function(left, b.value.unsqueeze(1)) + function(a.value.unsqueeze(1), right)
    if plan.seconds:
        cross = 2 * plan.combine(function(plan.select(a.first), plan.select(b.first)))
        if streams.shape[1] == plan.directions:
            streams = torch.cat([streams, cross], 1)
        else:
            lower, upper = streams.split([plan.directions, plan.seconds], 1)
            streams = torch.cat([lower, upper + cross], 1)
    return Jet(value, streams, plan)


def add(input: Any, other: Any, *, alpha: float = 1) -> Jet:
    """a + αb."""
    if isinstance(input, Jet) and isinstance(other, Jet):
        same_rank("add", input, other)
        plan = plan_of("add", [input, other])
        left, right = together([input, other])
        value = torch.add(input.value, other.value, alpha=alpha)
        return Jet(value, torch.add(left, right, alpha=alpha), plan)
    if isinstance(input, Jet):
        beside("add", other, input)
        value = torch.add(input.value, other, alpha=alpha)
        return Jet(value, widened(value, input.streams), input.plan)
    beside("add", input, other)
    value = input + alpha * other.value
    streams = other.streams if alpha == 1 else alpha * other.streams
    return Jet(value, widened(value, streams), other.plan)


def sub(input: Any, other: Any, *, alpha: float = 1) -> Jet:
    """a − αb."""
    return add(input, other, alpha=-alpha)


def negative(input: Jet) -> Jet:
    """−a."""
    return Jet(-input.value, -input.streams, input.plan)


def mul(input: Any, other: Any) -> Jet:
    """a b."""
    if isinstance(input, Jet) and isinstance(other, Jet):
        same_rank("mul", input, other)
        return bilinear("mul", torch.mul, input, other)
    jet, constant = (input, other) if isinstance(input, Jet) else (other, input)
    return Jet(jet.value * constant, jet.streams * beside("mul", constant, jet), jet.plan)


def div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Jet:
    """a / b."""
    if rounding_mode is not None:
        refuse("div", "with rounding has no rule in natgrad.pde")
    if isinstance(other, Jet):
        return mul(input, applied(other, reciprocal(other.value)))
    return Jet(input.value / other, input.streams / beside("div", other, input), input.plan)


def pow(input: Any, exponent: Any) -> Jet:
    """a^b."""
    if isinstance(input, Jet) and not isinstance(exponent, Jet):
        beside("pow", exponent, input)
        return applied(input, power(input.value, exponent))
    if isinstance(input, Jet):
        logarithm = mul(exponent, applied(input, log(input.value)))
    elif isinstance(input, Tensor):
        logarithm = mul(exponent, torch.log(input))
    else:
        logarithm = mul(exponent, float(torch.tensor(input, dtype=torch.float64).log()))
    return applied(logarithm, exp(logarithm.value))


def flipped(function: Callable[..., Jet]) -> Callable[..., Jet]:
    """The rule for __rsub__ and its like."""

    def other_way(input: Any, other: Any, **kwargs: Any) -> Jet:
        return function(other, input, **kwargs)

    return other_way


for _function, _names in {
    add: ("add", "__add__", "__radd__"),
    sub: ("sub", "subtract", "__sub__"),
    mul: ("mul", "multiply", "__mul__", "__rmul__"),
    div: ("div", "divide", "true_divide", "__truediv__", "__div__"),
    pow: ("pow", "float_power", "__pow__"),
}.items():
    rule(*_names)(_function)
    _plain = [name for name in _names if not name.startswith("__")]
    rule(*(f"{name}_" for name in _plain))(in_place(_function))
    rule(*(f"__i{name.removeprefix('__')}" for name in _names if name.startswith("__")))(in_place(_function))
rule("neg", "negative", "__neg__")(negative)
rule("neg_", "negative_")(in_place(negative))
rule("rsub", "__rsub__")(flipped(sub))
rule("__rdiv__", "__rtruediv__")(flipped(div))
rule("__rpow__")(flipped(pow))


@rule("addcmul")
def addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Jet:
    """a + c b₁ b₂."""
    product = tensor1 * tensor2
    return add(input, product if value == 1 else value * product)


@rule("linear")
def linear(input: Any, weight: Any, bias: Any = None) -> Jet:
    """W z + b: one call with the bias, and one without for all streams."""
    if isinstance(weight, Jet) or isinstance(bias, Jet):
        refuse("linear", "has a weight that depends on the model's inputs")
    if input.value.dim() < 2:
        refuse("linear", "of a tensor [N] mixes the examples; unsqueeze(-1) it")
    return Jet(F.linear(input.value, weight, bias), F.linear(input.streams, weight), input.plan)


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Jet]:
    def apply(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Jet:
        name = function.__name__
        if isinstance(weight, Jet) or isinstance(bias, Jet):
            refuse(name, "has a weight that depends on the model's inputs")
        if input.value.dim() != weight.dim():
            refuse(name, "of an input without a batch dimension mixes the examples")
        value = function(input.value, weight, bias, *args, **kwargs)
        streams = function(input.streams.flatten(0, 1), weight, None, *args, **kwargs)
        return Jet(value, streams.unflatten(0, input.streams.shape[:2]), input.plan)

    return apply


for _name in ("conv1d", "conv2d", "conv3d"):
    rule(_name)(_convolution(getattr(torch, _name)))


@rule("matmul", "mm", "bmm", "__matmul__")
def matmul(input: Any, other: Any) -> Jet:
    """A B, along the last two dimensions."""
    if isinstance(input, Jet) and isinstance(other, Jet):
        if input.value.dim() < 3 or input.value.dim() != other.value.dim():
            refuse("matmul", "of two results without a batch dimension mixes the examples")
        return bilinear("matmul", torch.matmul, input, other)
    if isinstance(input, Jet):
        if input.value.dim() < 2:
            refuse("matmul", "of a tensor [N] mixes the examples")
        streams = input.streams @ beside("matmul", other, input) if other.dim() > 2 else input.streams @ other
        return Jet(input.value @ other, streams, input.plan)
    if other.value.dim() < 3:
        refuse("matmul", "with a matrix on the left mixes the examples")
    left = beside("matmul", input, other) if input.dim() > 2 else input
    return Jet(input @ other.value, left @ other.streams, other.plan)


rule("__rmatmul__")(flipped(matmul))


@rule("addmm")
def addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Jet:
    """β C + α A B."""
    product = mat1 @ mat2
    product = product if alpha == 1 else alpha * product
    return add(product, input if beta == 1 else beta * input)


@rule("einsum")
def einsum(equation: str, *operands: Any) -> Jet:
    """One or two jets in a sum over letters; the examples' letter is the first of the jets and of the result."""
    tensors = (
        list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else [*operands]
    )
    jets = [k for k, tensor in enumerate(tensors) if isinstance(tensor, Jet)]
    compact = equation.replace(" ", "")
    inputs, arrow, output = compact.partition("->")
    terms = inputs.split(",")
    if not arrow or "." in compact or len(jets) > 2:
        refuse("einsum", "has a rule in natgrad.pde for one or two jets, with '->' and without '...'")
    stream = next(letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in compact)
    if any(terms[k][:1] != output[:1] or terms[k].count(output[:1]) > 1 for k in jets):
        refuse("einsum", f"({equation!r}) mixes the examples")

    def contract(*parts: Tensor) -> Tensor:
        """Parts stand for the jets; those with a dimension more are streams."""
        given, spelt = list(tensors), list(terms)
        for k, part in zip(jets, parts, strict=True):
            given[k] = part
            if part.dim() > len(terms[k]):
                spelt[k] = terms[k][0] + stream + terms[k][1:]
        carried = any(len(a) > len(b) for a, b in zip(spelt, terms, strict=True))
        return torch.einsum(
            ",".join(spelt) + "->" + (output[0] + stream + output[1:] if carried else output), *given
        )

    found = [tensors[k] for k in jets]
    if len(found) == 1:
        return Jet(contract(found[0].value), contract(found[0].streams), found[0].plan)
    return bilinear("einsum", contract, *found)
