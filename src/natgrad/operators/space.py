"""Parameter space: which parameters there are, in which order, and how they lie in one flat vector."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from natgrad.errors import EmptyError, VectorError


@dataclasses.dataclass(frozen=True, init=False)
class ParameterSpace:
    """An ordered mapping name → shape. A flat vector is the concatenation in that order, each parameter by rows.

    Attributes:
        entries: the pairs (name, shape), in order.
    """

    entries: tuple[tuple[str, tuple[int, ...]], ...]

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Takes the shapes by name, in order.

        Raises:
            EmptyError: there is no parameter.
        """
        if not shapes:
            raise EmptyError("a parameter space needs at least one parameter; is every requires_grad False?")
        entries = tuple((name, tuple(int(size) for size in shape)) for name, shape in shapes.items())
        object.__setattr__(self, "entries", entries)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> ParameterSpace:
        """The space that these tensors are a point of, such as `dict(model.named_parameters())`."""
        return cls({name: tuple(tensor.shape) for name, tensor in tensors.items()})

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape, in order."""
        return dict(self.entries)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The parameters' names, in order."""
        return tuple(name for name, _ in self.entries)

    @functools.cached_property
    def slices(self) -> dict[str, slice]:
        """Name → where the parameter lies in a flat vector."""
        slices, start = {}, 0
        for name, shape in self.entries:
            stop = start + math.prod(shape)
            slices[name] = slice(start, stop)
            start = stop
        return slices

    @functools.cached_property
    def numel(self) -> int:
        """P, the number of coordinates."""
        return sum(math.prod(shape) for _, shape in self.entries)

    @functools.cached_property
    def label(self) -> str:
        """A short name for messages: the module that all parameters belong to, or the first name and how many more."""
        modules = {name.rpartition(".")[0] for name in self.names}
        if len(modules) == 1 and (module := modules.pop()):
            return module
        first, *more = self.names
        return f"{first} and {len(more)} more" if more else first

    def restrict(self, names: Iterable[str]) -> ParameterSpace:
        """The subspace of some of the parameters, in the order given.

        Raises:
            VectorError: a name that is not in this space.
        """
        names = tuple(names)
        self._refuse_unknown(names)
        return ParameterSpace({name: self.shapes[name] for name in names})

    def check(self, named: Mapping[str, Tensor]) -> None:
        """Sees that these tensors are a vector of this space: every parameter, no other, each of its shape.

        Raises:
            VectorError: says which name is missing, unknown or of the wrong shape.
        """
        self._refuse_unknown(named)
        missing = [name for name in self.names if name not in named]
        if missing:
            raise VectorError(
                f"the vector lacks {', '.join(map(repr, missing))}; it needs all {len(self.names)} parameters "
                "of the space (zeros where there is nothing)"
            )
        for name, shape in self.entries:
            if tuple(named[name].shape) != shape:
                raise VectorError(f"{name!r} has shape {tuple(named[name].shape)}, but {shape} in this space")

    def _refuse_unknown(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self.shapes]
        if unknown:
            near = difflib.get_close_matches(unknown[0], self.names, n=1)
            hint = (
                f"; did you mean {near[0]!r}?"
                if near
                else f"; the space has {', '.join(map(repr, self.names))}"
            )
            raise VectorError(f"the space has no parameter {', '.join(map(repr, unknown))}{hint}")

    def flatten(self, named: Mapping[str, Tensor]) -> Shaped[Tensor, "P"]:
        """The flat vector [P] of named tensors.

        Raises:
            VectorError: as `check`.
        """
        self.check(named)
        return torch.cat([named[name].reshape(-1) for name in self.names])

    def unflatten(self, flat: Shaped[Tensor, "P"]) -> dict[str, Tensor]:
        """The named tensors of a flat vector [P], as views of it.

        Raises:
            VectorError: the vector has another length.
        """
        return {name: rows[0] for name, rows in self.unflatten_rows(flat[None]).items()}

    def flatten_rows(self, named: Mapping[str, Tensor]) -> Float[Tensor, "K P"]:
        """K flat vectors from named tensors that have one more, leading axis: [K, *shape]. Not checked."""
        parts = [named[name].reshape(len(named[name]), math.prod(shape)) for name, shape in self.entries]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def unflatten_rows(self, rows: Shaped[Tensor, "K P"]) -> dict[str, Tensor]:
        """Named tensors [K, *shape] from K flat vectors, as views where that is possible.

        Raises:
            VectorError: the vectors have another length.
        """
        count, length = rows.shape
        if length != self.numel:
            raise VectorError(f"a vector of this space has {self.numel} entries, but this one has {length}")
        return {name: rows[:, self.slices[name]].reshape(count, *shape) for name, shape in self.entries}
