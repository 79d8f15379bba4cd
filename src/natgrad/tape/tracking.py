"""Where parameters go that act entry by entry or are looked up, from one function to the next.

A parameter may reach the batch through functions of its own: a slice of the positions, a class token that is expanded,
the exponential of a scale, an embedding of positions. Such tensors are followed, so that the call is found in which
they meet the batch; from there the score goes back to the parameter by the derivative of what lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from natgrad.tape.elementwise import ARITHMETIC, NORMALISATIONS, Factor

SIZING = frozenset(
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in ("expand", "expand_as", "repeat", "broadcast_to", "tile")
    if hasattr(owner, name)
)
"""Functions that may give a tensor one row for each example."""


class UnexplainedError(Exception):
    """A tensor acted by a function through which no score can be followed; its name is the message."""


@dataclass(frozen=True, eq=False)
class Lookup:
    """Rows of a table, taken by their indices.

    Attributes:
        table: the table.
        indices: which rows.
        padding: a row that gets no gradient, or None.
    """

    table: Tensor
    indices: Tensor
    padding: int | None = None


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Lookup | None:
    if scale_grad_by_freq:  # its gradient is no sum over examples
        return None
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    return Lookup(weight, input, padding_idx)


LOOKUPS: Mapping[Any, Callable[..., Lookup | None]] = {F.embedding: _embedding}
"""What is looked up among a function's arguments."""


@dataclass(eq=False)
class Track:
    """A tensor that was made of parameters alone, and what it did.

    Attributes:
        tensor: the tensor.
        edge: its place in the graph; None for a parameter.
        data: whether indices had a part in it, so that it may have a row for each example.
        sized: whether it was expanded, so that it may have one, too.
        uses: the calls that it entered.
    """

    tensor: Tensor
    edge: GradientEdge | None = None
    data: bool = False
    sized: bool = False
    uses: list[Used] = field(default_factory=list)

    @property
    def broadcast(self) -> bool:
        """Whether a call gave it rows that it hadn't: then its own are not the examples."""
        return any(use.broadcast for use in self.uses)

    def terminals(self, examples: int) -> Iterator[Terminal]:
        """The calls in which it meets the batch.

        Raises:
            UnexplainedError: one of them is not known.
        """
        direct = self.sized and self.tensor.dim() > 0 and len(self.tensor) == examples and not self.broadcast
        try:
            found = [one for use in self.uses for one in self._through(use, examples)]
        except UnexplainedError:
            if not direct or self.edge is None:
                raise
            found = [Terminal(self, None, self.edge)]
        yield from found

    def _through(self, use: Used, examples: int) -> Iterator[Terminal]:
        if use.meets_batch(examples):
            yield Terminal(self, use, use.edge)
        elif use.results:
            for track in use.results:
                yield from track.terminals(examples)
        else:
            raise UnexplainedError(use.function)


@dataclass(eq=False)
class Used:
    """A call that a followed tensor entered.

    Attributes:
        function: the function's name.
        shape: the result's.
        edge: the result's place in the graph.
        factor: ∂y/∂q where it acts entry by entry; None elsewhere.
        aligned: the shape in which it broadcasts to the result.
        lookup: what was looked up in it; None elsewhere.
        results: the result, or results, where they are followed in their turn.
        value: the result, where the tracker keeps it.
    """

    function: str
    shape: torch.Size
    edge: GradientEdge
    factor: Factor | None = None
    aligned: tuple[int, ...] = ()
    lookup: Lookup | None = None
    results: tuple[Track, ...] = ()
    value: Tensor | None = None

    @property
    def broadcast(self) -> bool:
        """Whether the result has a first axis that the tensor has not."""
        return self.factor is not None and len(self.shape) > 0 and self.aligned[0] == 1 != self.shape[0]

    def meets_batch(self, examples: int) -> bool:
        """Whether the result has a part for each example, of which what comes back is a score."""
        if self.lookup is not None:
            rows = self.lookup.indices.shape[0] if self.lookup.indices.dim() else 0
            return rows > 0 and rows % examples == 0 and not any(track.broadcast for track in self.results)
        if self.factor is None or not self.shape or (self.results and not self.results[0].data):
            return False
        return self.shape[0] > 0 and self.shape[0] % examples == 0 and self.aligned[0] == 1


@dataclass(frozen=True, eq=False)
class Terminal:
    """Where a followed tensor meets the batch.

    Attributes:
        track: the tensor.
        use: the call; None where the tensor itself has a row for each example.
        edge: where signals are read.
    """

    track: Track
    use: Used | None
    edge: GradientEdge

    def looks_up(self, table: Tensor) -> bool:
        """Whether it is a lookup in a table itself, and not in something made of it."""
        return self.track.tensor is table and self.use is not None and self.use.lookup is not None

    @property
    def function(self) -> str:
        """The call's name."""
        return "expand" if self.use is None else self.use.function

    @property
    def shape(self) -> torch.Size:
        """A signal's shape there."""
        return self.track.tensor.shape if self.use is None else self.use.shape

    @property
    def numel(self) -> int:
        """How many numbers a signal has there."""
        return self.shape.numel()


class Tracker:
    """Follows some parameters through one forward pass.

    Args:
        parameters: name → parameter.
        keeps: whether results are kept.
    """

    def __init__(self, parameters: Mapping[str, Tensor], keeps: bool = False) -> None:
        self._keeps = keeps
        self._parameters = dict(parameters)
        self._tracks: dict[int, Track] = {}
        self._ids = {id(p) for p in parameters.values()}

    def track(self, name: str) -> Track | None:
        """What was heard of a parameter; None where nothing was."""
        return self._tracks.get(id(self._parameters[name]))

    def heard(
        self, func: Any, name: str, tensors: Iterable[Tensor], args: Any, kwargs: Any, result: Any
    ) -> None:
        """A call, of which some tensors may be followed ones.

        Args:
            func: the function.
            name: what it is called.
            tensors: its arguments, without those that acted by a rule of linear maps.
            args: all of them.
            kwargs: likewise.
            result: what it returned.
        """
        given = list({id(t): t for t in tensors}.values())
        followed = [t for t in given if self._followed(t)]
        made = [t for t in tensors_in(result) if t.requires_grad]
        if not followed or not made:
            return
        edges = [get_gradient_edge(t) for t in made]
        operands = {}
        lookup = LOOKUPS[func](*args, **kwargs) if func in LOOKUPS else None
        normalises = func in NORMALISATIONS
        rule = NORMALISATIONS.get(func) or ARITHMETIC.get(func)
        if rule is not None and len(made) == 1:
            operands = {id(one.tensor): one for one in rule(*args, **kwargs)}
        tracks = [self._of(t) for t in followed]
        derived: tuple[Track, ...] = ()
        inputs = [t for t in given if lookup is None or t is not lookup.indices]
        if not normalises and len(inputs) == len(followed):
            data = lookup is not None or any(track.data for track in tracks)
            sized = func in SIZING or any(track.sized for track in tracks)
            derived = tuple(Track(t, edge, data, sized) for t, edge in zip(made, edges, strict=True))
            for track in derived:
                self._tracks[id(track.tensor)] = track
        for track in tracks:
            operand = operands.get(id(track.tensor))
            used = Used(name, made[0].shape, edges[0], results=derived)
            used.value = made[0].detach() if self._keeps else None
            if operand is not None and _count(args, kwargs, track.tensor) == 1:
                shape = tuple(track.tensor.shape) if operand.aligned is None else operand.aligned
                used.aligned = (1,) * (made[0].dim() - len(shape)) + shape
                used.factor = operand.factor
            elif lookup is not None and track.tensor is lookup.table:
                used.lookup = lookup
            track.uses.append(used)

    def _followed(self, tensor: Tensor) -> bool:
        known = self._tracks.get(id(tensor))
        return id(tensor) in self._ids or (known is not None and known.tensor is tensor)

    def _of(self, tensor: Tensor) -> Track:
        known = self._tracks.get(id(tensor))
        if known is None:
            known = self._tracks[id(tensor)] = Track(tensor)
        return known


def _count(args: Any, kwargs: Any, tensor: Tensor) -> int:
    return sum(t is tensor for t in tensors_in((args, tuple(kwargs.values()))))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among nested arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        yield from tensors_in(tuple(value.values()))
