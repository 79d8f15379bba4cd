"""Functions that move numbers about, and sums of them: the same for each stream, beside the examples' dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from natgrad.pde.jet import Jet, plan_of, points, refuse, rule, together


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """Given one by one or as one sequence."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], Sequence) else sizes


def _shaped(name: str, jet: Jet, value: Tensor) -> Jet:
    """The jet whose value has been reshaped so."""
    if value.shape[:1] != jet.value.shape[:1]:
        refuse(name, f"from {tuple(jet.value.shape)} to {tuple(value.shape)} mixes the examples")
    shape = (*jet.streams.shape[:2], *value.shape[1:])
    return Jet(value, jet.streams.reshape(shape), jet.plan)


@rule("reshape", "view")
def reshape(input: Jet, *shape: Any, **kwargs: Any) -> Jet:
    """Examples stay the first dimension."""
    return _shaped("reshape", input, input.value.reshape(*(shape or (kwargs["shape"],))))


@rule("reshape_as", "view_as")
def reshape_as(input: Tensor, other: Tensor) -> Tensor:
    """Examples stay the first dimension."""
    if not isinstance(input, Jet):
        return input.reshape(other.shape)
    return _shaped("reshape_as", input, input.value.reshape(other.shape))


@rule("flatten")
def flatten(input: Jet, start_dim: int = 0, end_dim: int = -1) -> Jet:
    """Some dimensions as one."""
    return _shaped("flatten", input, input.value.flatten(start_dim, end_dim))


@rule("ravel")
def ravel(input: Jet) -> Jet:
    """All dimensions as one: of [N, 1]."""
    return _shaped("ravel", input, input.value.ravel())


@rule("unflatten")
def unflatten(input: Jet, dim: int, sizes: Any) -> Jet:
    """One dimension as some."""
    return _shaped("unflatten", input, input.value.unflatten(dim, sizes))


@rule("squeeze")
def squeeze(input: Jet, *dim: Any, **kwargs: Any) -> Jet:
    """Without dimensions of size one; the examples' stays if none is named."""
    dims = _sizes(dim or tuple(kwargs.values())) or tuple(range(1, input.value.dim()))
    return _shaped("squeeze", input, input.value.squeeze(dims))


@rule("unsqueeze")
def unsqueeze(input: Jet, dim: int) -> Jet:
    """A dimension of size one."""
    place = points("unsqueeze", input, dim, inserted=True)
    return Jet(input.value.unsqueeze(dim), input.streams.unsqueeze(place), input.plan)


@rule("transpose", "swapaxes", "swapdims")
def transpose(input: Jet, dim0: int, dim1: int) -> Jet:
    """Two dimensions for each other."""
    a, b = (points("transpose", input, dim) for dim in (dim0, dim1))
    return Jet(input.value.transpose(dim0, dim1), input.streams.transpose(a, b), input.plan)


@rule("mT")
def matrix_transpose(input: Jet) -> Jet:
    """The last two dimensions for each other."""
    return transpose(input, -2, -1)


@rule("permute")
def permute(input: Jet, *dims: Any, **kwargs: Any) -> Jet:
    """Dimensions in another order, the examples' first."""
    order = [d % input.value.dim() for d in _sizes(dims or tuple(kwargs.values()))]
    if order[0] != 0:
        refuse("permute", "moves the examples from the first dimension")
    return Jet(
        input.value.permute(order), input.streams.permute(0, 1, *(d + 1 for d in order[1:])), input.plan
    )


@rule("expand")
def expand(input: Jet, *size: Any) -> Jet:
    """Dimensions of size one repeated."""
    value = input.value.expand(*size)
    if value.dim() != input.value.dim():
        refuse("expand", "puts a dimension before the examples'")
    return Jet(value, input.streams.expand(*input.streams.shape[:2], *value.shape[1:]), input.plan)


@rule("expand_as")
def expand_as(input: Tensor, other: Tensor) -> Tensor:
    """Dimensions of size one repeated."""
    if not isinstance(input, Jet):
        return input.expand(other.shape)
    return expand(input, *other.shape)


@rule("repeat")
def repeat(input: Jet, *sizes: Any) -> Jet:
    """Copies along dimensions other than the examples'."""
    times = _sizes(sizes)
    if len(times) != input.value.dim() or times[0] != 1:
        refuse("repeat", "of examples, or with more dimensions, has no rule in natgrad.pde")
    return Jet(input.value.repeat(times), input.streams.repeat(1, *times), input.plan)


def _joined(name: str, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Jet]]:
    """The values; and jets, those without derivatives with streams of zero."""
    found = [tensor for tensor in tensors if isinstance(tensor, Jet)]
    plan = plan_of(name, found)
    jets = []
    for tensor in tensors:
        if not isinstance(tensor, Jet):
            if tensor.shape[:1] != found[0].value.shape[:1]:
                refuse(
                    name, f"of {len(found[0].value)} examples and a tensor {tuple(tensor.shape)} mixes them"
                )
            zeros = tensor.new_zeros(len(tensor), plan.directions, *tensor.shape[1:])
            tensor = Jet(tensor, zeros, plan)
        jets.append(tensor)
    return [jet.value for jet in jets], jets


@rule("cat", "concat", "concatenate")
def cat(tensors: Sequence[Tensor], dim: int = 0) -> Jet:
    """Side by side."""
    values, jets = _joined("cat", tensors)
    place = points("cat", jets[0], dim)
    return Jet(torch.cat(values, dim), torch.cat(together(jets), place), plan_of("cat", jets))


@rule("stack")
def stack(tensors: Sequence[Tensor], dim: int = 0) -> Jet:
    """Side by side, along a dimension of their own."""
    values, jets = _joined("stack", tensors)
    place = points("stack", jets[0], dim, inserted=True)
    return Jet(torch.stack(values, dim), torch.stack(together(jets), place), plan_of("stack", jets))


@rule("hstack")
def hstack(tensors: Sequence[Tensor]) -> Jet:
    """Side by side; tensors [N] would come one behind the other."""
    return cat(tensors, 0 if tensors[0].dim() == 1 else 1)


@rule("column_stack")
def column_stack(tensors: Sequence[Tensor]) -> Jet:
    """Columns [N] or [N, c] side by side."""
    return cat([tensor.unsqueeze(1) if tensor.dim() == 1 else tensor for tensor in tensors], 1)


def _pieces(name: str, split: Callable[..., Sequence[Tensor]]) -> None:
    def apply(input: Jet, *args: Any, **kwargs: Any) -> tuple[Jet, ...]:
        named = dict(zip(() if name == "unbind" else ("count",), args, strict=False))
        rest = args[len(named) :]
        dim = kwargs.get("dim", rest[0] if rest else 0)
        sizes = [*named.values(), *(value for key, value in kwargs.items() if key != "dim")]
        place = points(name, input, dim)
        values, streams = split(input.value, *sizes, dim=dim), split(input.streams, *sizes, dim=place)
        return tuple(Jet(v, s, input.plan) for v, s in zip(values, streams, strict=True))

    rule(name)(apply)


_pieces("chunk", torch.chunk)
_pieces("split", torch.split)
_pieces("split_with_sizes", torch.split)
_pieces("unbind", torch.unbind)


@rule("narrow")
def narrow(input: Jet, dim: int, start: int, length: int) -> Jet:
    """A part of one dimension."""
    place = points("narrow", input, dim)
    return Jet(input.value.narrow(dim, start, length), input.streams.narrow(place, start, length), input.plan)


@rule("select")
def select(input: Jet, dim: int, index: int) -> Jet:
    """One place of one dimension."""
    place = points("select", input, dim)
    return Jet(input.value.select(dim, index), input.streams.select(place, index), input.plan)


@rule("index_select")
def index_select(input: Jet, dim: int, index: Tensor) -> Jet:
    """Some places of one dimension."""
    place = points("index_select", input, dim)
    return Jet(input.value.index_select(dim, index), input.streams.index_select(place, index), input.plan)


@rule("flip")
def flip(input: Jet, *dims: Any, **kwargs: Any) -> Jet:
    """Dimensions backwards."""
    order = _sizes(dims or tuple(kwargs.values()))
    places = [points("flip", input, dim) for dim in order]
    return Jet(input.value.flip(order), input.streams.flip(places), input.plan)


@rule("__getitem__")
def getitem(input: Tensor, index: Any) -> Jet:
    """Some features, as `u[:, 0]`; examples may be left out or put in another order, too."""
    if not isinstance(input, Jet):
        refuse("indexing", "by a result of the model has no rule in natgrad.pde")
    given = index if isinstance(index, tuple) else (index,)
    given = tuple(torch.tensor(k) if isinstance(k, list) else k for k in given)
    if any(isinstance(k, Jet) for k in given):
        refuse("indexing", "by a result of the model has no rule in natgrad.pde")
    taken = sum(_dimensions(k) for k in given if k is not None and k is not Ellipsis)
    if any(k is Ellipsis for k in given):
        at = next(i for i, k in enumerate(given) if k is Ellipsis)
        given = (*given[:at], *(slice(None),) * (input.value.dim() - taken), *given[at + 1 :])
    given = given or (slice(None),)
    head, tail = given[0], given[1:]
    if not isinstance(head, slice) and (not isinstance(head, Tensor) or head.dim() != 1):
        refuse("indexing", "must keep the examples as the first dimension")
    if isinstance(head, Tensor) and any(not isinstance(k, slice) for k in tail):
        refuse("indexing", "examples and features by one tensor mixes them")
    if sum(isinstance(k, Tensor) for k in tail) > 1 or (
        any(isinstance(k, Tensor) for k in tail) and any(isinstance(k, int) or k is None for k in tail)
    ):
        refuse("indexing", "by several tensors at once has no rule in natgrad.pde")
    index = (head, slice(None), *tail)
    return Jet(input.value[given], input.streams[index], input.plan)


def _dimensions(index: Any) -> int:
    """How many dimensions one part of an index reads."""
    return index.dim() if isinstance(index, Tensor) and index.dtype == torch.bool else 1


def _reduced(input: Jet, dim: Any, keepdim: bool, function: Callable[..., Tensor], name: str) -> Jet:
    if dim is None or (isinstance(dim, Sequence) and not dim):
        refuse(name, "over all dimensions mixes the examples")
    dims = tuple(dim) if isinstance(dim, Sequence) else (dim,)
    places = [points(name, input, d) for d in dims]
    return Jet(function(input.value, dims, keepdim), function(input.streams, places, keepdim), input.plan)


@rule("sum")
def sum_over(input: Jet, dim: Any = None, keepdim: bool = False) -> Jet:
    """Over dimensions other than the examples'."""
    return _reduced(input, dim, keepdim, torch.sum, "sum")


@rule("mean")
def mean(input: Jet, dim: Any = None, keepdim: bool = False) -> Jet:
    """Over dimensions other than the examples'."""
    return _reduced(input, dim, keepdim, torch.mean, "mean")


def _each(name: str) -> None:
    method = getattr(Tensor, name)

    def apply(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        args = tuple(arg.value if isinstance(arg, Jet) else arg for arg in args)
        if not isinstance(input, Jet):
            return method(input, *args, **kwargs)
        return Jet(method(input.value, *args, **kwargs), method(input.streams, *args, **kwargs), input.plan)

    rule(name)(apply)


for _name in ("contiguous", "clone", "to", "double", "float", "type_as", "cpu", "cuda"):
    _each(_name)
