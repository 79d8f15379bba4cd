"""Which axis of a layer's input, or of what acts entry by entry, holds the examples, where its shape doesn't say.

The model's inputs have examples first. A layer may be given positions first, [T, N, E], or both flattened together,
and where T is a multiple of N no shape tells these from [N, T, E]. Then the model is run twice more, without dropout,
the second time with its examples in another order: a layer's input follows along the axis on which they lie. What was
found is kept, so that a model pays once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from natgrad.errors import OutputError
from natgrad.tape.calls import Call
from natgrad.tape.geometry import LinearGeometry
from natgrad.tape.jacobian import Batch, Outputs, evaluate
from natgrad.tape.outputs import examples_not_first
from natgrad.tape.tape import Tape
from natgrad.tape.tracking import Terminal

# An axis is found where what is left of the change is so small a part of it (squared); rounding leaves far less.
_EXPLAINED = 1e-2
# What is the same for all examples, such as a branch that starts from zero, is looked at so often.
TRIES = 3
UNKNOWN = "a linear map of which no axis follows the examples"


@dataclass(frozen=True)
class Axis:
    """Where examples lie among a tensor's axes.

    Attributes:
        index: the axis.
        positions_first: whether positions were flattened into it, and come before examples.
    """

    index: int
    positions_first: bool = False

    def before(self, sizes: Sequence[int], examples: int) -> int:
        """How many positions come before an example."""
        outer = math.prod(sizes[: self.index])
        return outer * (sizes[self.index] // examples) if self.positions_first else outer

    def rolled(self, x: Tensor, examples: int) -> Tensor:
        """The tensor with each example in the place of the next."""
        return x.reshape(self.before(x.shape, examples), examples, -1).roll(1, 1).reshape(x.shape)


FIRST = Axis(0)
UNDECIDED = Axis(-1)  # the same for all examples
Place = tuple[str, str, int]  # a parameter, how it acted, and the how-manieth time
Found = dict[Place, Axis | None]  # where the examples of a call are; None if nowhere


def candidates(sizes: Sequence[int], examples: int) -> list[Axis]:
    """The axes that may hold the examples."""
    found = []
    for index, size in enumerate(sizes):
        if size and size % examples == 0:
            found += [Axis(index)] if size == examples else [Axis(index), Axis(index, True)]
    return found


def settle(
    tapes: Sequence[Tape],
    model: nn.Module,
    batch: Batch,
    outputs: Outputs,
    find_outputs: Callable[[Any], Outputs],
    rng_state: Tensor | None = None,
) -> None:
    """Sees that the recorded linear maps are read along the axis that holds the examples.

    A parameter for which there is no such axis is listed as uncovered; so is one that acted entry by entry where
    examples are not first.

    Args:
        tapes: each with a recorded pass.
        model: the model.
        batch: what it was called with.
        outputs: what the likelihood reads.
        find_outputs: that, of what the model returns.
        rng_state: where the model's random draws start from.

    Raises:
        OutputError: the outputs have positions before examples.
    """
    examples = batch.examples
    if examples == 1:
        return
    waiting = [
        {place: met for place, met in _places(tape, examples) if met.is_open(examples)} for tape in tapes
    ]
    if not (any(waiting) or any(z.dim() and len(z) != examples for z in outputs)):
        return
    known = [_known(tape, own, examples) for tape, own in zip(tapes, waiting, strict=True)]
    if any(axes is None for axes in known):
        known = _probed(tapes, waiting, _Probe(model, batch, find_outputs, rng_state))
    for tape, own, axes in zip(tapes, waiting, known, strict=True):
        assert axes is not None
        _apply(tape, own, axes, examples)


@dataclass(frozen=True)
class _Met:
    """Where parameters met the batch: in a linear map, or entry by entry.

    Attributes:
        act: the call, or where signals are read.
        shape: of a linear map's input, vectors last; of a result.
        axes: how many axes may hold examples.
        value: that tensor, where it is kept.
    """

    act: Call | Terminal
    shape: torch.Size
    axes: int
    value: Tensor | None

    @property
    def sizes(self) -> torch.Size:
        return self.shape[: self.axes]

    def is_open(self, examples: int) -> bool:
        """Whether the shape leaves open where examples are."""
        geometry = self.act.geometry if isinstance(self.act, Call) else None
        found = candidates(self.sizes, examples)
        if isinstance(geometry, LinearGeometry) and geometry.examples_second:
            return False
        if isinstance(geometry, LinearGeometry) and geometry.groups > 1:
            return bool(found)  # experts may have been handed as many tokens as there are examples
        return found not in ([], [FIRST])


def _places(tape: Tape, examples: int) -> Iterator[tuple[Place, _Met]]:
    counts: dict[str, int] = {}
    for call in tape.calls:
        name, x, geometry = call.block.weight, call.raw_inputs, call.geometry
        counts[name] = counts.get(name, -1) + 1
        if isinstance(geometry, LinearGeometry):
            x = geometry.vectors(x)
            yield (name, "map", counts[name]), _Met(call, x.shape, x.dim() - 1, x)
        else:
            yield (name, "map", counts[name]), _Met(call, x.shape, 0 if geometry.unbatched(x) else 1, x)
    for name, ends in tape.resolve(examples).items():
        for k, end in enumerate(ends):
            if end.use is not None:  # else it is the same for all examples, and has a row for each
                yield (name, "entries", k), _Met(end, end.shape, len(end.shape) - 1, end.use.value)


def _key(own: Mapping[Place, _Met]) -> tuple[Any, ...]:
    """What tells one way through the model from another: which axis is which is a matter of its code, not of sizes."""
    return tuple((*place, len(met.shape)) for place, met in own.items())


def _known(tape: Tape, own: Mapping[Place, _Met], examples: int) -> Found | None:
    """What was found of the same calls in an earlier pass."""
    axes: Found | None = tape.axes.get(_key(own))
    fits = axes is not None and all(
        axes[place] in (None, *candidates(met.sizes, examples)) for place, met in own.items()
    )
    return axes if fits else None


@dataclass(frozen=True)
class _Probe:
    model: nn.Module
    batch: Batch
    find_outputs: Callable[[Any], Outputs]
    rng_state: Tensor | None

    def rolled(self, first_only: bool) -> _Probe:
        """The same with the examples in another order; `first_only` in the first tensor, as a mask may be as long."""
        leaves, spec = tree_flatten((self.batch.args, dict(self.batch.kwargs)))
        own = [
            k
            for k, x in enumerate(leaves)
            if isinstance(x, Tensor) and x.dim() and len(x) == self.batch.examples
        ]
        for k in own[: 1 if first_only else None]:
            leaves[k] = leaves[k].roll(1, 0)
        args, kwargs = tree_unflatten(leaves, spec)
        return replace(self, batch=replace(self.batch, args=args, kwargs=kwargs))

    def run(self, tapes: Sequence[Tape]) -> tuple[list[dict[Place, Tensor | None]], Outputs]:
        """What each call is given, by its place, and the outputs; in evaluation mode."""
        twins = [tape.twin() for tape in tapes]
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            outputs: Outputs = ()
            with torch.enable_grad(), ExitStack() as stack:
                for twin in twins:
                    stack.enter_context(twin.recording())
                stack.enter_context(
                    suppress(OutputError)
                )  # the loss was given something else than was returned
                outputs = evaluate(self.model, {}, self.batch, self.find_outputs, self.rng_state)
        finally:
            for module, training in modes:
                module.training = training
        given = [{place: met.value for place, met in _places(twin, self.batch.examples)} for twin in twins]
        return given, tuple(z.detach() for z in outputs)


def _probed(
    tapes: Sequence[Tape], waiting: Sequence[Mapping[Place, _Met]], probe: _Probe
) -> list[Found | None]:
    """Where examples are in the calls of each tape, kept where it is certain."""
    examples = probe.batch.examples
    before, outputs = probe.run(tapes)
    after, others = probe.rolled(first_only=False).run(tapes)
    if any(_axis(a, b, range(a.dim()), examples) is None for a, b in zip(outputs, others, strict=True)):
        after, others = probe.rolled(first_only=True).run(tapes)  # a mask as long as the batch was moved, too
    for a, b in zip(outputs, others, strict=True):
        axis = _axis(a, b, range(a.dim()), examples)
        if axis not in (None, FIRST, UNDECIDED):
            raise examples_not_first(a, examples)
    result: list[Found | None] = []
    for tape, own, x, y in zip(tapes, waiting, before, after, strict=True):
        found = {place: _between(x.get(place), y.get(place), met, examples) for place, met in own.items()}
        certain = {place: axis for place, axis in found.items() if axis is not UNDECIDED}
        alike = {own[place].sizes: axis for place, axis in certain.items() if axis is not None}
        axes = {
            place: alike.get(own[place].sizes, FIRST) if axis is UNDECIDED else axis
            for place, axis in found.items()
        }
        tries = tape.axes.setdefault(("tries", *_key(own)), [])
        tries.append(axes)
        if len(certain) == len(found) or len(tries) == TRIES:
            tape.axes[_key(own)] = axes
        result.append(axes)
    return result


def _between(x: Tensor | None, y: Tensor | None, met: _Met, examples: int) -> Axis | None:
    if x is None or y is None or not x.shape == y.shape == met.shape:  # evaluation mode goes another way
        return None
    return _axis(x, y, range(met.axes), examples)


def _axis(x: Tensor, y: Tensor, axes: range, examples: int) -> Axis | None:
    """The axis along which y has the examples of x rolled."""
    possible = candidates([x.shape[k] for k in axes], examples)
    x, y = x.double(), y.double()
    scale = float((x - y).square().sum())
    if scale <= 1e-8 * float(x.square().sum()):  # it did not move
        still = [axis for axis in possible if torch.allclose(axis.rolled(x, examples), x)]
        return UNDECIDED if still else None
    left = {axis: float((y - axis.rolled(x, examples)).square().sum()) for axis in possible}
    best = min(left, key=left.__getitem__, default=None)
    rest = [value for axis, value in left.items() if axis is not best]
    # Noise of the model's own stays where it was; it leaves the right axis ahead of others all the same.
    ahead = best is not None and left[best] <= max(_EXPLAINED * scale, 0.9 * min(rest, default=0.0))
    return best if ahead else None


def _apply(tape: Tape, own: Mapping[Place, _Met], axes: Found, examples: int) -> None:
    """Has each map read along its axis; what acts entry by entry is known only where examples are first."""
    changed: dict[int, Call] = {}
    for place, met in own.items():
        axis, act = axes[place], met.act
        if isinstance(act, Terminal):
            if axis != FIRST:
                tape.uncovered.setdefault(place[0], f"{act.function} where examples are not first")
        elif axis is not None and isinstance(act.geometry, LinearGeometry):
            before = axis.before(met.sizes, examples)
            changed[id(act)] = replace(act, geometry=replace(act.geometry, before=before))
        elif axis != FIRST:
            for name in act.block.names:
                tape.uncovered.setdefault(name, UNKNOWN)
    tape.calls[:] = [changed.get(id(call), call) for call in tape.calls]
