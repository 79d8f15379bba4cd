"""How a parameter acts entry by entry: y = a ⊙ q + b, with q broadcast to y.

A rule says which operands of a torch function act so, and with which factor a = ∂y/∂q. Scores of q follow from what
comes back to y: Σ g ⊙ a over all that q is shared by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Factor = Callable[[], Tensor | float]
"""∂y/∂q, made when it is needed; it broadcasts to y."""


@dataclass(frozen=True)
class Operand:
    """A tensor that acted entry by entry.

    Attributes:
        tensor: q.
        factor: ∂y/∂q.
        aligned: the shape in which q broadcasts to y; its own by default.
    """

    tensor: Tensor
    factor: Factor
    aligned: tuple[int, ...] | None = None


Rule = Callable[..., Iterator[Operand]]


def _one() -> float:
    return 1.0


def _tensor_operands(*pairs: tuple[Any, Factor]) -> Iterator[Operand]:
    for value, factor in pairs:
        if isinstance(value, Tensor):
            yield Operand(value, factor)


def _detached(value: Tensor | float) -> Tensor | float:
    return value.detach() if isinstance(value, Tensor) else value


def _sum(input: Any, other: Any, *, alpha: float = 1.0, **_: Any) -> Iterator[Operand]:
    yield from _tensor_operands((input, _one), (other, lambda: alpha))


def _difference(input: Any, other: Any, *, alpha: float = 1.0, **_: Any) -> Iterator[Operand]:
    yield from _tensor_operands((input, _one), (other, lambda: -alpha))


def _reversed_difference(input: Any, other: Any, **_: Any) -> Iterator[Operand]:
    yield from _difference(other, input)


def _product(input: Any, other: Any, **_: Any) -> Iterator[Operand]:
    a, b = _detached(input), _detached(other)
    yield from _tensor_operands((input, lambda: b), (other, lambda: a))


def _quotient(input: Any, other: Any, *, rounding_mode: str | None = None, **_: Any) -> Iterator[Operand]:
    if rounding_mode is None:
        a, b = _detached(input), _detached(other)
        yield from _tensor_operands((input, lambda: 1.0 / b), (other, lambda: -a / b**2))


def _reversed_quotient(input: Any, other: Any, **_: Any) -> Iterator[Operand]:
    yield from _quotient(other, input)


def _scaled_product(
    input: Any, tensor1: Any, tensor2: Any, *, value: float = 1.0, **_: Any
) -> Iterator[Operand]:
    a, b = _detached(tensor1), _detached(tensor2)
    yield from _tensor_operands((input, _one), (tensor1, lambda: value * b), (tensor2, lambda: value * a))


def _scale_and_shift(
    normalised: Callable[[], Tensor], weight: Any, bias: Any, aligned: tuple[int, ...] | None = None
) -> Iterator[Operand]:
    for value, factor in ((weight, normalised), (bias, _one)):
        if isinstance(value, Tensor):
            yield Operand(value, factor, aligned)


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, **_: Any
) -> Iterator[Operand]:
    x = input.detach()
    yield from _scale_and_shift(lambda: F.layer_norm(x, normalized_shape, eps=eps), weight, bias)


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Iterator[Operand]:
    x = input.detach()
    yield from _scale_and_shift(lambda: F.rms_norm(x, normalized_shape, eps=eps), weight, None)


def _by_channel(input: Tensor) -> tuple[int, ...]:
    return (1, -1, *(1,) * (input.dim() - 2))


def _group_norm(
    input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, **_: Any
) -> Iterator[Operand]:
    x = input.detach()
    yield from _scale_and_shift(
        lambda: F.group_norm(x, num_groups, eps=eps), weight, bias, _by_channel(input)
    )


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    **_: Any,
) -> Iterator[Operand]:
    x = input.detach()
    # Running averages move in training, and are not read then.
    mean, var = (None, None) if training else (running_mean, running_var)
    yield from _scale_and_shift(
        lambda: F.batch_norm(x, mean, var, training=training, eps=eps), weight, bias, _by_channel(input)
    )


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterator[Operand]:
    x = input.detach()
    mean, var = (None, None) if use_input_stats else (running_mean, running_var)
    yield from _scale_and_shift(
        lambda: F.instance_norm(x, mean, var, use_input_stats=use_input_stats, eps=eps),
        weight,
        bias,
        _by_channel(input),
    )


def _spelt(rule: Rule, *names: str) -> dict[Any, Rule]:
    """One operation as a function, a method and an operator."""
    found = (getattr(owner, name) for owner in (torch, Tensor) for name in names if hasattr(owner, name))
    return dict.fromkeys(found, rule)


NORMALISATIONS: dict[Any, Rule] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
"""Their scale and shift act entry by entry; their input does not."""

ARITHMETIC: dict[Any, Rule] = {
    **_spelt(_sum, "add", "add_", "__add__", "__radd__", "__iadd__"),
    **_spelt(_difference, "sub", "subtract", "sub_", "__sub__", "__isub__"),
    **_spelt(_reversed_difference, "rsub", "__rsub__"),
    **_spelt(_product, "mul", "multiply", "__mul__", "__rmul__"),
    **_spelt(_quotient, "div", "divide", "true_divide", "__truediv__"),
    **_spelt(_reversed_quotient, "__rtruediv__"),
    **_spelt(_scaled_product, "addcmul", "addcmul_"),
}
"""Operators of which every operand acts entry by entry; not a product in place, which overwrites the other's factor."""
