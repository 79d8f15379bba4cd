"""Functions made of others, and those that see the value alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad.pde.arithmetic import mul
from natgrad.pde.jet import RULES, Jet, key_of, plan_of, points, refuse, rule, together


@rule("mish")
def mish(input: Any, inplace: bool = False) -> Jet:
    """z tanh(softplus(z))."""
    result: Any = input * torch.tanh(F.softplus(input))
    return input.become(result) if inplace else result


@rule("relu6")
def relu6(input: Any, inplace: bool = False) -> Any:
    """Between 0 and 6."""
    result: Any = torch.clamp(input, 0, 6)
    return input.become(result) if inplace else result


@rule("hardtanh")
def hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    """Between two bounds."""
    result: Any = torch.clamp(input, min_val, max_val)
    return input.become(result) if inplace else result


@rule("prelu")
def prelu(input: Any, weight: Any) -> Any:
    """A slope for z ≤ 0 that is trained."""
    shape = (-1, *(1,) * (input.value.dim() - 2)) if len(weight) > 1 else ()
    return torch.where(input > 0, input, input * weight.reshape(shape))


@rule("softsign")
def softsign(input: Any) -> Any:
    """z / (1 + |z|)."""
    return input / (1 + torch.abs(input))


@rule("tanhshrink")
def tanhshrink(input: Any) -> Any:
    """z − tanh z."""
    return input - torch.tanh(input)


@rule("prod")
def prod(input: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """Over one dimension, factor by factor."""
    if dim is None:
        refuse("prod", "over all dimensions mixes the examples")
    factors = input.unbind(dim)
    result = factors[0]
    for factor in factors[1:]:
        result = result * factor
    return result.unsqueeze(dim) if keepdim else result


@rule("norm", "vector_norm")
def norm(input: Any, *args: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Euclidean; it has no derivative at 0."""
    order = args[0] if args else kwargs.pop("p", kwargs.pop("ord", 2))
    if len(args) > 1:
        dim, keepdim = args[1], args[2] if len(args) > 2 else keepdim
    if order not in (None, 2, 2.0, "fro") or any(value is not None for value in kwargs.values()):
        refuse("norm", "other than the Euclidean one has no rule in natgrad.pde")
    return torch.sqrt(torch.square(input).sum(dim, keepdim))


@rule("softmax")
def softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    """Stays the same when the maximum is subtracted, which needs no derivative then."""
    points("softmax", input, -1 if dim is None else dim)
    powers = torch.exp(input - input.value.amax(dim, keepdim=True).detach())
    return powers / powers.sum(dim, keepdim=True)


@rule("log_softmax")
def log_softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    """z − log Σ exp z."""
    points("log_softmax", input, -1 if dim is None else dim)
    shifted = input - input.value.amax(dim, keepdim=True).detach()
    return shifted - torch.log(torch.exp(shifted).sum(dim, keepdim=True))


@rule("layer_norm")
def layer_norm(
    input: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """(z − mean)/√(variance + ε), scaled and shifted."""
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    result = centred * torch.rsqrt(torch.square(centred).mean(dims, keepdim=True) + eps)
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


@rule("rms_norm")
def rms_norm(
    input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Any:
    """z/√(mean of squares + ε), scaled."""
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    result = input * torch.rsqrt(torch.square(input).mean(dims, keepdim=True) + eps)
    return result if weight is None else result * weight


@rule("batch_norm")
def batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """By the running averages: an affine map of each feature."""
    if training or running_mean is None:
        refuse("batch_norm", "in training mode mixes the examples (call model.eval())")
    shape = (-1, *(1,) * (input.value.dim() - 2))
    result = (input - running_mean.reshape(shape)) * torch.rsqrt(running_var + eps).reshape(shape)
    result = result if weight is None else result * weight.reshape(shape)
    return result if bias is None else result + bias.reshape(shape)


@rule("dropout")
def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Jet:
    """One mask for the value and its derivatives."""
    result = input
    if training and p > 0:
        result = mul(input, F.dropout(torch.ones_like(input.value), p, True))
    return input.become(result) if inplace else result


@rule("where")
def where(condition: Any, input: Any, other: Any) -> Jet:
    """One or the other, by a condition that has no derivative."""
    if isinstance(condition, Jet):
        refuse("where", "has a condition that is no comparison")
    jets = [tensor for tensor in (input, other) if isinstance(tensor, Jet)]
    plan, rank = plan_of("where", jets), jets[0].value.dim()
    values = [tensor.value if isinstance(tensor, Jet) else tensor for tensor in (input, other)]
    value: Tensor = torch.where(condition, values[0], values[1])
    if any(isinstance(t, Tensor) and t.dim() > rank for t in (condition, *values)) or value.dim() != rank:
        refuse("where", "puts a dimension before the examples'")
    found = iter(together(jets))
    streams = [next(found) if isinstance(tensor, Jet) else 0.0 for tensor in (input, other)]
    chosen = condition.unsqueeze(1) if condition.dim() == rank else condition
    result: Tensor = torch.where(chosen, streams[0], streams[1])
    return Jet(value, result.expand(*result.shape[:2], *value.shape[1:]), plan)


@rule("maximum")
def maximum(input: Any, other: Any) -> Any:
    """The greater; at a tie, the first."""
    return torch.where(input >= other, input, other)


@rule("minimum")
def minimum(input: Any, other: Any) -> Any:
    """The lesser; at a tie, the first."""
    return torch.where(input <= other, input, other)


def _bare(value: Any) -> Any:
    if isinstance(value, Jet):
        return value.value
    if isinstance(value, (tuple, list)):
        return type(value)(_bare(item) for item in value)
    return value


def _of_value(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function without derivatives: facts of a tensor, comparisons, tensors made to its likeness."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        return function(*_bare(args), **{key: _bare(value) for key, value in kwargs.items()})

    return apply


_FACTS = """
    shape dtype device layout ndim requires_grad is_leaf grad_fn is_cuda is_sparse is_quantized is_nested is_mkldnn
    is_meta is_cpu is_mps is_xpu data itemsize nbytes names
    size dim ndimension numel nelement __len__ is_floating_point is_complex is_contiguous is_signed element_size
    get_device is_same_size stride storage_offset data_ptr __repr__ __str__ __format__ detach __bool__ __float__
    __int__ item tolist
    zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty new_tensor
    gt lt ge le eq ne greater less greater_equal less_equal not_equal __gt__ __lt__ __ge__ __le__ __eq__ __ne__
    isnan isfinite isinf isclose allclose equal any all logical_not logical_and logical_or
    sign sgn floor ceil round trunc argmax argmin
"""
for _name in _FACTS.split():
    for _home in (torch, Tensor):
        _function = key_of(getattr(_home, _name, None))
        if _function is not None:
            RULES[_function] = _of_value(_function)


def _refuse_writing(target: Any, *args: Any) -> None:
    refuse("setting items", "has no rule in natgrad.pde (torch.stack and torch.cat have)")


rule("__setitem__")(_refuse_writing)
