"""How the optimiser sees the batch in an ordinary training loop: hooks on the model, on the loss and on its value.

On most steps the hooks only note what the model and the loss were called with. When curvature is due, the tape opens
before the model's forward pass. A batch counts when its backward pass begins, and not before: what is evaluated
between two steps leaves no trace, and `zero_grad` may stand before or after the forward pass. The signals are sent
back at that moment, while the graph is whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from natgrad.errors import EmptyError, OutputError
from natgrad.likelihoods import HeteroscedasticGaussian, Likelihood
from natgrad.likelihoods.base import bare
from natgrad.optim.hooks import Hook
from natgrad.tape import Batch, Tape, evaluate
from natgrad.tape.axes import settle
from natgrad.tape.calls import Call
from natgrad.tape.outputs import count_examples, find_outputs
from natgrad.tape.plain import original, plain_pass, within_compiled
from natgrad.tape.tape import Recording
from natgrad.tape.tracking import tensors_in
from natgrad.tape.unheard import leaves_of

Outputs = tuple[Tensor, ...]


@dataclass
class _Forward:
    """One forward pass of the model: what it was called with and returned, and its recording if there is one."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng_state: Tensor
    returned: Any = None
    recordings: list[Recording] | None = None
    compiled: bool = False


@dataclass
class _Answer:
    """A forward pass and the losses of its outputs, of which one alone may send a gradient back."""

    forward: _Forward
    taken_by: object = None


class Watcher:
    """Notes the batches of a step, and opens the tapes when curvature is due.

    Args:
        model: the model, whose forward pass is watched; compiled or not.
        loss: the torch loss module whose calls are watched, or None when only a likelihood is known.
        likelihood: the likelihood that the loss maps to.
        find_outputs: what the likelihood reads of what the model returns; found by itself if None.
        find_targets: what it compares them with, of what the model was called with; where no loss is watched.
        tapes: those that record when `due` says so.
        due: whether the present step's batch should be observed.
        observed: called with the outputs and the targets when curvature can be taken.
        begins: called when a backward pass begins; whether it is the first of a step.

    Attributes:
        batches: the micro-batches since the last `clear` whose backward pass has begun.
        losses: their losses, detached.
        rng_states: the states that their forward passes started from.
        user_outputs: what the user gave to find the outputs.
        twice: whether two losses of one forward pass sent gradients back.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module | None,
        likelihood: Likelihood,
        find_outputs: Callable[[Any], Any] | None,
        find_targets: Callable[..., Any] | None,
        tapes: list[Tape],
        due: Callable[[], bool],
        observed: Callable[[Outputs, Any, int], None],
        begins: Callable[[], bool],
    ) -> None:
        self.likelihood, self._model = likelihood, original(model)
        self.twice = False
        self.batches: list[Batch] = []
        self.losses: list[Tensor] = []
        self.rng_states: list[Tensor] = []
        self.user_outputs, self._find_targets = find_outputs, find_targets
        self._shape: Callable[[Outputs], Outputs] = _same
        self._tapes, self._due, self._observed = tapes, due, observed
        self._begins, self._backward = begins, -1
        self._forward: _Forward | None = None
        self._answer: _Answer | None = None
        self._heard: set[str] = set()
        self._open: ExitStack | None = None
        self._unbatched = False
        self.knows_loss = loss is not None
        self._paused = False
        self._hook(model.register_forward_pre_hook, Watcher._before_model)
        self._hook(model.register_forward_hook, Watcher._after_model, always_call=True)
        if loss is not None:
            self._hook(loss.register_forward_pre_hook, Watcher._before_loss)
            self._hook(loss.register_forward_hook, Watcher._after_loss)

    def _hook(self, register: Callable[..., Any], method: Callable[..., None], **options: Any) -> None:
        handle = register(Hook(self, method), with_kwargs=True, **options)
        weakref.finalize(self, handle.remove).atexit = False

    def clear(self) -> None:
        """Forgets the batches of the step; a forward pass that still waits for its backward pass is kept."""
        self.batches, self.losses, self.rng_states = [], [], []
        self.twice = False

    def stepped(self) -> None:
        """Forgets everything of a step that was taken or given up."""
        self.clear()
        self._heard, self._answer = set(), None

    def missing(self) -> str:
        """What did not happen since the last step, so that no batch was seen."""
        if "model" not in self._heard:
            return (
                "the model was not called since the last step, or its hooks were left out (if torch.compile took it "
                "before the optimiser was made, give NaturalGradient the compiled model)"
            )
        if self.knows_loss and "loss" not in self._heard:
            return "the model was called, but not the loss"
        return f"no gradient was sent back through {'the loss' if self.knows_loss else 'the outputs'}"

    @property
    def examples(self) -> int:
        """How many examples the step has so far."""
        return sum(batch.examples for batch in self.batches)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not watched."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def find_outputs(self, returned: Any) -> Outputs:
        """The likelihood's outputs among what the model returned.

        Raises:
            OutputError: they are not tensors; says what the model returned and what to pass.
        """
        return self._shape(find_outputs(returned, self.user_outputs, "natgrad.NaturalGradient"))

    def _ignoring(self) -> bool:
        # Inside torch.func's transforms tensors have no values to look at, and no .grad comes of them.
        return self._paused or not torch.is_grad_enabled() or _transforming()

    def _before_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._ignoring():
            return
        if _autocasting(args):  # products run the model without
            args, kwargs = tree_map(_full, (args, kwargs))
        self._heard.add("model")
        self._forward, self._answer = _Forward(args, kwargs, torch.get_rng_state()), None
        self._close()
        if self._due() and self._tapes:
            self._forward.compiled = within_compiled()
            if not self._forward.compiled:
                self._open = self._recording()

    def _recording(self) -> ExitStack:
        recording = ExitStack()
        recording.enter_context(plain_pass())
        for tape in self._tapes:
            recording.enter_context(tape.recording())
        return recording

    def _pass_again(self, forward: _Forward) -> tuple[Outputs, list[Recording]]:
        """The outputs of a plain pass, recorded: the one that the user made was compiled."""
        batch = Batch(forward.args, forward.kwargs, None, 1)
        with self.paused(), torch.enable_grad(), self._recording():
            outputs = evaluate(self._model, {}, batch, self.find_outputs, forward.rng_state)
        return outputs, [tape.take() for tape in self._tapes]

    def _after_model(self, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        recorded = self._open is not None
        self._close()
        if self._ignoring() or self._forward is None:
            return
        if returned is None:  # it raised
            self._forward = None
            return
        self._forward.returned = returned
        if recorded:
            self._forward.recordings = [tape.take() for tape in self._tapes]
        if not self.knows_loss:
            self._loss_within(self._forward)

    def _loss_within(self, forward: _Forward) -> None:
        """The loss is computed inside the model: it is known where the targets are."""
        self._shape, self._forward = _same, None
        outputs = self.find_outputs(forward.returned)
        _require_examples(outputs)
        targets = value = None
        if self._find_targets is not None:
            targets = self._find_targets(*forward.args, **forward.kwargs)
            with torch.no_grad():
                value = self.likelihood.loss(bare(outputs), targets)
        # The loss may have gone another way than the outputs that were found: it is among what was returned.
        roots = [z for z in tensors_in((*outputs, forward.returned)) if z.requires_grad]
        self._await_backward(_Answer(forward), roots, outputs, targets, value, _same)

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _before_loss(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Says what is wrong with outputs or targets in our words, before torch says it in its own."""
        if self._ignoring() or self._forward is None:
            return
        outputs, targets = self._read_loss(args, kwargs)
        _require_examples(outputs)
        if self._due():
            self.likelihood.check(bare(outputs), targets)

    def _after_loss(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> None:
        if self._ignoring() or not value.requires_grad:
            return
        if self._forward is not None:
            self._answer, self._forward = _Answer(self._forward), None
        elif self._answer is None or not self._concerns(value):  # the loss of another model
            return
        self._heard.add("loss")
        forward = self._answer.forward
        outputs, targets = self._read_loss(args, kwargs)
        self._shape = _same
        try:
            shape = _reshaping(self.find_outputs(forward.returned), outputs)
        except OutputError:  # no matter, unless the adaptive step asks for them: it raises this error again
            shape = _same
        self._await_backward(self._answer, [value], outputs, targets, value.detach(), shape)

    def _read_loss(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Outputs, Any]:
        given = dict(zip(("input", "target", "var"), args, strict=False)) | kwargs
        outputs = given["log_input"] if "log_input" in given else given["input"]
        targets = given["target"]
        if isinstance(self.likelihood, HeteroscedasticGaussian):
            variance = given["var"]
            if isinstance(variance, Tensor) and variance.requires_grad:
                return (outputs, variance), targets
            return (outputs,), (targets, variance)
        return (outputs,), targets

    def _concerns(self, value: Tensor) -> bool:
        """Whether a loss depends on the model's parameters."""
        own = {id(p) for p in self._model.parameters()}
        return any(id(leaf) in own for leaf in leaves_of(value))

    def _await_backward(
        self,
        answer: _Answer,
        roots: list[Tensor],
        outputs: Outputs,
        targets: Any,
        value: Tensor | None,
        shape: Callable[[Outputs], Outputs],
    ) -> None:
        """Lets the batch count as soon as a gradient reaches any of the roots; whoever holds them holds the batch."""
        me, asker = weakref.ref(self), object()
        waiting = [answer]

        def began(_: Tensor) -> None:
            watcher = me()
            if watcher is None or not waiting:
                return
            answer = waiting.pop()
            if answer.taken_by is None:
                answer.taken_by = asker
                watcher._began(answer.forward, outputs, targets, value, shape)
            else:
                watcher.twice = True

        for root in roots:
            root.register_hook(began)

    def _began(
        self,
        forward: _Forward,
        outputs: Outputs,
        targets: Any,
        value: Tensor | None,
        shape: Callable[[Outputs], Outputs],
    ) -> None:
        self._shape = shape
        if forward.compiled and forward.recordings is None and self._due():
            outputs, forward.recordings = self._pass_again(forward)
        backward = torch._C._current_graph_task_id()
        if backward != self._backward and self._begins():
            self.clear()  # what a GradScaler skipped, and `model.zero_grad()` dropped
        self._backward = backward
        if forward.recordings is not None:
            self._unbatched = any(
                _unbatched(forward, call) for recording in forward.recordings for call in recording.calls
            )
        examples = 1 if self._unbatched else count_examples(forward.args, forward.kwargs, outputs)
        self.batches.append(Batch(forward.args, forward.kwargs, targets, examples))
        self.rng_states.append(forward.rng_state)
        if value is not None:
            self.losses.append(value)
        finite = value is None or bool(torch.isfinite(value))
        if forward.recordings is None or not finite or not self._due():
            return  # a batch that is not finite must not enter an average
        for tape, recording in zip(self._tapes, forward.recordings, strict=True):
            tape.put(recording)
        try:
            with self.paused():
                settle(
                    self._tapes, self._model, self.batches[-1], outputs, self.find_outputs, forward.rng_state
                )
            self._observed(outputs, targets, examples)
        finally:
            for tape in self._tapes:
                tape.clear()


def _transforming() -> bool:
    """Whether a transform of torch.func is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _require_examples(outputs: Outputs) -> None:
    if any(z.numel() == 0 for z in outputs):
        raise EmptyError(
            f"the batch is empty: its outputs have shape {tuple(outputs[0].shape)}; leave it out"
        )


def _autocasting(args: tuple[Any, ...]) -> bool:
    """Whether the model is called under autocast."""
    kinds = {value.device.type for value in args if isinstance(value, Tensor)} or {"cpu"}
    return any(torch.is_autocast_enabled(kind) for kind in kinds)


def _full(value: Any) -> Any:
    """A tensor of a half type in float32; anything else as it is."""
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def _unbatched(forward: _Forward, call: Call) -> bool:
    """Whether a layer read one example without a batch dimension, and the model too."""
    first = next((v for v in (*forward.args, *forward.kwargs.values()) if isinstance(v, Tensor)), None)
    raw = call.raw_inputs
    return first is not None and first.dim() == raw.dim() and call.geometry.unbatched(raw)


def _same(outputs: Outputs) -> Outputs:
    return outputs


def _reshaping(returned: Outputs, outputs: Outputs) -> Callable[[Outputs], Outputs]:
    """How what the model returned becomes what the loss read: as it is, or by a reshape such as squeeze or flatten."""
    if len(returned) == len(outputs) and all(
        a is b or (a.shape == b.shape and torch.equal(a, b)) for a, b in zip(returned, outputs, strict=True)
    ):
        return _same
    if (
        len(returned) == len(outputs) == 1
        and returned[0].numel() == outputs[0].numel()
        and torch.equal(returned[0].detach().reshape(-1), outputs[0].detach().reshape(-1))
    ):
        tail = outputs[0].shape[1:]
        return lambda found: (found[0].reshape(-1, *tail),)
    given, returned_shapes = ([tuple(z.shape) for z in some] for some in (outputs, returned))

    def refuse(_: Outputs) -> Outputs:
        raise OutputError(
            f"the loss was given {given}, which is not what the model returned, {returned_shapes}; "
            "say how the one follows from the other with outputs=lambda returned: ..., or give lr="
        )

    return refuse
