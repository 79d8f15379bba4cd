"""The tape: which parameters acted in a forward pass, on what, and with which back-propagated signals.

It listens to torch functions, not to module classes: while it records, every call whose arguments hold a trainable
parameter is seen. Calls that a rule covers become records; the others are listed, never silently skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from natgrad.tape.calls import Call, call_of, outputs_of
from natgrad.tape.columns import LayerColumns, send_back
from natgrad.tape.decompose import POSITIONS_FIRST, audible_parts_of
from natgrad.tape.elements import ElementColumns
from natgrad.tape.finite import require_finite
from natgrad.tape.geometry import Use, source
from natgrad.tape.loudness import loudness, unscaled
from natgrad.tape.records import Block, LayerRecord
from natgrad.tape.rules import RULES
from natgrad.tape.tracking import Terminal, Tracker, UnexplainedError, tensors_in
from natgrad.tape.unheard import PASSIVE, differentiated, leaves_of, transforms, unwrapped
from natgrad.tape.views import is_part, places


@dataclass(frozen=True)
class Recording:
    """What was heard of one forward pass: the linear maps, and where the other parameters went."""

    calls: list[Call]
    tracker: Tracker


class _Listener(TorchFunctionMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for kind in types:
            if getattr(kind, "decomposes_torch_functions", False):
                with (
                    self,
                    self._tape._within("_in_parts", True),
                ):  # heard are the functions that this one is made of
                    return kind.__torch_function__(func, types, args, kwargs or {})
        parts = None if transforms() else audible_parts_of(func, args)
        if parts is not None:
            with self, self._tape._within("_examples_second", func in POSITIONS_FIRST):
                return parts(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self._tape._heard(func, args, kwargs or {}, result)
        return result


class Tape:
    """Records how the parameters of a model act.

    Args:
        parameters: name → parameter; only these are followed.
        keeps: whether results of what acts entry by entry are kept, too.

    Attributes:
        blocks: weight name → `Block`, for every block seen so far; it only grows.
        elements: parameter name → the function by which it acted entry by entry, or was looked up; it only grows.
        uncovered: parameter name → the function that used it outside any rule.
        calls: of linear maps in the recorded pass.
        axes: where `tape.axes` found examples in earlier passes.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], keeps: bool = False) -> None:
        self._names = {id(p): name for name, p in parameters.items()}
        self._parameters = dict(parameters)
        self.blocks: dict[str, Block] = {}
        self.elements: dict[str, str] = {}
        self.uncovered: dict[str, str] = {}
        self.calls: list[Call] = []
        self.axes: dict[Any, Any] = {}
        self._keeps, self._tracker = keeps, Tracker(parameters, keeps)
        self._examples_second = False  # whether positions come before examples in what linear maps are given
        self._in_parts = False  # whether a function of a tensor subclass is taken apart

    @contextmanager
    def recording(self) -> Iterator[Tape]:
        """Listens to a forward pass; what was recorded before is dropped."""
        self.clear()
        with _Listener(self):
            yield self

    def records(
        self,
        outputs: Sequence[Tensor],
        signals: Sequence[Tensor],
        examples: int,
        names: Iterable[str] | None = None,
    ) -> list[LayerRecord]:
        """Sends signals backwards from the outputs and returns each call's record.

        No weight gradient is computed and no ``.grad`` is touched; the graph is kept for the user's backward pass.

        Args:
            outputs: the model's outputs, part of the recorded graph.
            signals: a tensor of the same shape for each output.
            examples: how many examples the batch holds.
            names: names of the blocks wanted; all by default.

        Raises:
            NonFiniteError: an input or a signal is not finite; says of which block.
        """
        self.resolve(examples)
        wanted = self.blocks.keys() if names is None else set(names)
        calls = [call for call in self.calls if call.block.weight in wanted]
        found = self._sent_back(
            outputs, [signals], [call.edge for call in calls], sum(call.nbytes for call in calls)
        )
        reached = [(call, back[0]) for call, back in zip(calls, found, strict=True) if back is not None]
        require_finite((call.block.weight, x) for call, g in reached for x in (call.raw_inputs, g))
        return [
            LayerRecord(
                call.block, call.geometry, call.raw_inputs, g.reshape(call.shape), examples, call.has_bias
            )
            for call, g in reached
        ]

    def columns(
        self,
        outputs: Sequence[Tensor],
        signals: Sequence[Sequence[Tensor]],
        examples: int,
        names: Iterable[str] | None = None,
    ) -> tuple[list[LayerColumns], list[ElementColumns]]:
        """Sends several sets of signals backwards, as `records` does one; what comes back is not looked at.

        Args:
            outputs: the model's outputs, part of the recorded graph.
            signals: for each pass, a tensor of the same shape for each output.
            examples: how many examples the batch holds.
            names: names of the parameters wanted; all by default.

        Returns:
            What every call of a linear map was sent, and every parameter that acted entry by entry or was looked up.
        """
        wanted = self._parameters.keys() if names is None else set(names)
        calls = [call for call in self.calls if call.block.weight in wanted]
        ends = {name: ends for name, ends in self.resolve(examples).items() if name in wanted}
        flat = [(name, end) for name, own in ends.items() for end in own]
        edges = [call.edge for call in calls] + [end.edge for _, end in flat]
        nbytes = sum(call.nbytes for call in calls) + sum(8 * end.numel for _, end in flat)
        found = self._sent_back(outputs, signals, edges, nbytes)
        layers = [
            LayerColumns(
                call.block,
                call.geometry,
                call.raw_inputs,
                tuple(g.reshape(call.shape) for g in columns),
                examples,
                call.has_bias,
            )
            for call, columns in zip(calls, found, strict=False)
            if columns is not None
        ]
        reached: dict[str, list[tuple[Terminal, tuple[Tensor, ...]]]] = {}
        for (name, end), columns in zip(flat, found[len(calls) :], strict=False):
            if columns is not None:
                reached.setdefault(name, []).append((end, columns))
        elements = [
            ElementColumns(
                name,
                self._parameters[name],
                tuple(end for end, _ in own),
                tuple(columns for _, columns in own),
                examples,
            )
            for name, own in reached.items()
        ]
        return layers, elements

    def resolve(self, examples: int) -> dict[str, list[Terminal]]:
        """Where the parameters that act by no linear map met the batch; those of which it can't be told are listed.

        Args:
            examples: how many examples the batch holds.
        """
        found: dict[str, list[Terminal]] = {}
        for name, parameter in self._parameters.items():
            track = self._tracker.track(name)
            if track is None or name in self.uncovered:
                continue
            try:
                ends = list(track.terminals(examples))
            except UnexplainedError as error:
                self.uncovered[name] = str(error)
                continue
            own = self.blocks.get(name)
            table = (own is None or not own.transposed) and all(end.looks_up(parameter) for end in ends)
            if ends and self._in_a_map(name) and not table:
                self.uncovered[name] = f"{ends[0].function} beside a linear map"
            elif ends:
                found[name] = ends
                self.elements.setdefault(name, ends[0].function)
        return found

    def _in_a_map(self, name: str) -> bool:
        return any(name in block.names for block in self.blocks.values())

    def _sent_back(
        self,
        outputs: Sequence[Tensor],
        signals: Sequence[Sequence[Tensor]],
        edges: Sequence[GradientEdge],
        nbytes: int,
    ) -> list[tuple[Tensor, ...] | None]:
        """For each edge what every set of signals becomes there; None where no output depends on it."""
        live = [z for z in outputs if z.requires_grad]
        if not edges or not live:
            return [None] * len(edges)
        sent = [[s for z, s in zip(outputs, one, strict=True) if z.requires_grad] for one in signals]
        scale = self.loudness(sent)
        if scale != 1.0:
            sent = [[s * scale for s in one] for one in sent]
        found = send_back(live, edges, sent, nbytes)
        return [
            None if back[0] is None else tuple(unscaled(g.detach(), scale) for g in back if g is not None)
            for back in zip(*found, strict=True)
        ]

    def loudness(self, signals: Sequence[Sequence[Tensor]]) -> float:
        """What signals are to be multiplied with on their way through the recorded pass; 1 except through float16."""
        return loudness(signals) if any(call.half for call in self.calls) else 1.0

    @property
    def column_bytes(self) -> int:
        """What the signals of one backward pass take in memory."""
        return sum(call.nbytes for call in self.calls)

    def take(self) -> Recording:
        """Hands the recorded pass over, so that the next one can be recorded before this one is read."""
        taken = Recording(self.calls, self._tracker)
        self.clear()
        return taken

    def put(self, taken: Recording) -> None:
        """Makes a pass that was taken the present one again."""
        self.calls, self._tracker = taken.calls, taken.tracker

    def clear(self) -> None:
        """Drops the recorded pass, and with it its graph."""
        self.calls, self._tracker = [], Tracker(self._parameters, self._keeps)

    def twin(self) -> Tape:
        """A tape of the same parameters that keeps results, on which nothing was recorded."""
        return Tape(self._parameters, keeps=True)

    def covers(self, name: str) -> bool:
        """Whether curvature of a parameter is complete: it acted, and only by rules."""
        known = name in self.elements or self._in_a_map(name)
        return known and name not in self.uncovered

    def is_map(self, name: str) -> bool:
        """Whether a parameter is covered, and a linear map alone."""
        return self.covers(name) and name not in self.elements

    def explains(self, name: str) -> bool:
        """Whether a parameter is covered, and all that acted together with it."""
        together = next((block.names for block in self.blocks.values() if name in block.names), (name,))
        return all(map(self.covers, together))

    def _heard(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        self._tell_unheard(func, args, kwargs, result)
        rule = RULES.get(func)
        rest: Any = (args, tuple(kwargs.values()))
        if rule is not None and not transforms():
            use = rule(*args, **kwargs)
            if use is not None and self._note(use, result):
                # A parameter as input acts outside the rule, and takes the weight with it: no row is an example's.
                rest = (use.raw_input,)
                if self._name(use.raw_input) is not None:
                    rest = (use.raw_input, use.weight)
                elif use.bias is not None and self._name(use.bias) is None:
                    rest = (use.raw_input, use.bias)  # perhaps made of a parameter
        # In a function that was taken apart a first axis need not be the batch's: only linear maps are known there.
        if transforms() or self._in_parts:
            for tensor in tensors_in(rest):
                name = self._name(tensor)
                if name is not None and _acts(result, self._parameters[name]):
                    self.uncovered.setdefault(name, _name_of(func))
        else:
            self._tracker.heard(func, _name_of(func), tensors_in(rest), args, kwargs, result)

    def _name(self, tensor: Tensor) -> str | None:
        """The name of the parameter that a tensor is, or is a view of."""
        return self._names.get(id(source(tensor)))

    def _tell_unheard(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Lists parameters that act by derivatives of this call too, in nodes of the graph that no function made."""
        reason = transforms()
        if reason and func not in PASSIVE and next(tensors_in(result), None) is not None:
            for tensor in tensors_in((args, tuple(kwargs.values()))):
                self._uncover(unwrapped(tensor), reason)
        outputs = differentiated(func, args, kwargs)
        if outputs is not None:
            for tensor in leaves_of(outputs):
                self._uncover(tensor, "torch.autograd.grad")

    def _uncover(self, tensor: Tensor, reason: str) -> None:
        name = self._names.get(id(tensor))
        if name is not None:
            self.uncovered.setdefault(name, reason)

    @contextmanager
    def _within(self, circumstance: str, now: bool) -> Iterator[None]:
        """Where something holds of the functions that are heard, or does not."""
        before = getattr(self, circumstance)
        setattr(self, circumstance, now)
        try:
            yield
        finally:
            setattr(self, circumstance, before)

    def _note(self, use: Use, result: Tensor) -> bool:
        """Makes a call of it, unless its weight is no parameter's map."""
        weight = self._name(use.weight)
        if weight is None:
            return False
        parameter, known = source(use.weight), self.blocks.get(weight)
        place = next((p for p in places(use, parameter) if known is None or p.fits(known)), None)
        if place is None:
            return False
        groups, outputs = use.geometry.groups, outputs_of(use, place, parameter)
        if known is not None and (known.groups, known.outputs * groups) != (groups, outputs):
            return False
        bias = None if use.bias is None else self._name(use.bias)
        if use.bias is not None and bias is not None:
            fits = is_part(use.bias, source(use.bias), place.start, outputs)
            taken = known is None and any(bias in block.names for block in self.blocks.values())
            if not fits or taken or (known is not None and known.bias != bias):
                # A second bias on a shared weight has no place in the block.
                kind = use.geometry.name if known is None else known.rule
                self.uncovered.setdefault(bias, f"{kind} with the weight of another block")
                bias = None
        if known is None:
            inputs = parameter.numel() // outputs
            known = Block(
                weight,
                bias,
                use.geometry.name,
                groups,
                inputs,
                outputs // groups,
                place.transposed,
                place.flat,
            )
            self.blocks[weight] = known
        if isinstance(result, Tensor) and result.requires_grad:
            self.calls.append(call_of(known, use, place, result, bias is not None, self._examples_second))
        return True


def _acts(result: Any, parameter: Tensor) -> bool:
    """Whether a call passed a parameter on to the graph; asking for its shape, a view or a detached copy does not."""
    return any(t.grad_fn is not None and source(t) is not parameter for t in tensors_in(result))


def _name_of(func: Any) -> str:
    """A function's name; a property's, such as "T", where the call was ``Tensor.T.__get__``."""
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
