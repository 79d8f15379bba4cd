"""Which axis of a layer's input holds the examples, where its shape doesn't say.

The model's inputs have examples first. A layer may be given positions first, [T, N, E], or both flattened together,
and where T is a multiple of N no shape tells these from [N, T, E]. Then the model is run twice more, without dropout,
the second time with its examples in another order: a layer's input follows along the axis on which they lie. What was
found is kept, so that a model pays once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from natgrad.errors import OutputError
from natgrad.tape.jacobian import Batch, Outputs, evaluate
from natgrad.tape.outputs import examples_not_first
from natgrad.tape.rules import LinearGeometry
from natgrad.tape.tape import Call, Tape

# An axis is found where what is left of the change is so small a part of it (squared); rounding leaves far less.
_EXPLAINED = 1e-2
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
Place = tuple[str, int]  # a weight, and the how-manieth of its uses
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

    A parameter for which there is no such axis is listed as uncovered.

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
    waiting = [{place: call for place, call in _places(tape) if _open(call, examples)} for tape in tapes]
    if examples == 1 or not (any(waiting) or any(z.dim() and len(z) != examples for z in outputs)):
        return
    known = [_known(tape, own, examples) for tape, own in zip(tapes, waiting, strict=True)]
    if any(axes is None for axes in known):
        probe = _Probe(model, batch, find_outputs, rng_state)
        known = _probed(tapes, waiting, probe)
    for tape, own, axes in zip(tapes, waiting, known, strict=True):
        assert axes is not None
        _apply(tape, own, axes, examples)


def _key(own: Mapping[Place, Call]) -> tuple[Any, ...]:
    """What tells one way through the model from another: which axis is which is a matter of its code, not of sizes."""
    return tuple((*place, call.raw_inputs.dim()) for place, call in own.items())


def _known(tape: Tape, own: Mapping[Place, Call], examples: int) -> Found | None:
    """What was found of the same calls in an earlier pass."""
    axes: Found | None = tape.axes.get(_key(own))
    fits = axes is not None and all(
        axes[place] in (None, *candidates(_sizes(call), examples)) for place, call in own.items()
    )
    return axes if fits else None


def _places(tape: Tape) -> Iterator[tuple[Place, Call]]:
    """Each call by its weight, and the how-manieth use of it this is."""
    counts: dict[str, int] = {}
    for call in tape.calls:
        name = call.block.weight
        counts[name] = counts.get(name, -1) + 1
        yield (name, counts[name]), call


def _rows(call: Call) -> tuple[Tensor, int]:
    """A call's input with its vectors last, and how many axes come before these."""
    x, geometry = call.raw_inputs, call.geometry
    if isinstance(geometry, LinearGeometry):
        return (x.mT if geometry.columns and x.dim() > 1 else x), x.dim() - 1
    return x, 0 if geometry.unbatched(x) else 1


def _sizes(call: Call) -> torch.Size:
    x, axes = _rows(call)
    return x.shape[:axes]


def _open(call: Call, examples: int) -> bool:
    known = isinstance(call.geometry, LinearGeometry) and call.geometry.examples_second
    return not known and candidates(_sizes(call), examples) not in ([], [FIRST])


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

    def run(self, tapes: Sequence[Tape]) -> tuple[list[dict[Place, Tensor]], Outputs]:
        """What each call is given, by its place, and the outputs; in evaluation mode."""
        twins = [tape.twin() for tape in tapes]
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            with torch.enable_grad(), ExitStack() as stack:
                for twin in twins:
                    stack.enter_context(twin.recording())
                (returned,) = evaluate(self.model, {}, self.batch, lambda found: (found,), self.rng_state)
        finally:
            for module, training in modes:
                module.training = training
        given = [{place: _rows(call)[0] for place, call in _places(twin)} for twin in twins]
        try:
            outputs = tuple(z.detach() for z in self.find_outputs(returned))
        except OutputError:  # the loss was given something else: what the model returned says nothing of it
            outputs = ()
        return given, outputs


def _probed(
    tapes: Sequence[Tape], waiting: Sequence[Mapping[Place, Call]], probe: _Probe
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
        found = {
            place: _axis(x[place], y[place], range(len(_sizes(call))), examples)
            if place in x and place in y and x[place].shape == y[place].shape == _rows(call)[0].shape
            else None
            for place, call in own.items()
        }
        certain = {place: axis for place, axis in found.items() if axis is not UNDECIDED}
        shapes = {_sizes(own[place]): axis for place, axis in certain.items() if axis is not None}
        axes = {
            place: shapes.get(_sizes(own[place]), FIRST) if axis is UNDECIDED else axis
            for place, axis in found.items()
        }
        if len(certain) == len(found):
            tape.axes[_key(own)] = axes
        result.append(axes)
    return result


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
    return best if best is not None and left[best] <= _EXPLAINED * scale else None


def _apply(tape: Tape, own: Mapping[Place, Call], axes: Found, examples: int) -> None:
    """Has each call read along its axis; what acts entry by entry is known only where examples are first."""
    changed: dict[int, Call] = {}
    for place, call in own.items():
        axis, geometry = axes[place], call.geometry
        if axis is not None and isinstance(geometry, LinearGeometry):
            sizes = _sizes(call)
            changed[id(call)] = replace(call, geometry=replace(geometry, before=axis.before(sizes, examples)))
        elif axis != FIRST:
            axis = None
        if axis is None:
            for name in call.block.names:
                tape.uncovered.setdefault(name, UNKNOWN)
    tape.calls[:] = [changed.get(id(call), call) for call in tape.calls]
    if all(axis == FIRST for axis in axes.values()):
        return
    for name, ends in tape.resolve(examples).items():
        if any(candidates(end.shape[:-1], examples) != [FIRST] for end in ends):
            tape.uncovered.setdefault(name, f"{ends[0].function} where examples are not first")
