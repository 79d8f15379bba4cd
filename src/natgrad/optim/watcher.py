"""How the optimiser sees the batch in an ordinary training loop: two hooks, on the model and on the loss.

On most steps the hooks only note what the model and the loss were called with. When curvature is due, the tape opens
before the model's forward pass; the Fisher information needs outputs (and, for weights and masks, targets), so the
signals are sent back as soon as the loss has been called, before the user's own backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import OutputError
from natgrad.likelihoods import HeteroscedasticGaussian, Likelihood
from natgrad.tape import Batch, Tape

Outputs = tuple[Tensor, ...]


class Watcher:
    """Notes the batches of a step, and opens the tapes when curvature is due.

    Args:
        model: the model, whose forward pass is watched.
        loss: the torch loss module whose calls are watched, or None when only a likelihood is known.
        likelihood: the likelihood that the loss maps to.
        find_outputs: what the likelihood reads of what the model returns; found by itself if None.
        tapes: those that record when `due` says so.
        due: whether the present step's batch should be observed.
        observed: called with the outputs and the targets when curvature can be taken.

    Attributes:
        batches: the micro-batches since the last `clear`.
        losses: their losses, detached.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module | None,
        likelihood: Likelihood,
        find_outputs: Callable[[Any], Any] | None,
        tapes: list[Tape],
        due: Callable[[], bool],
        observed: Callable[[Outputs, Any, int], None],
    ) -> None:
        self.likelihood = likelihood
        self.batches: list[Batch] = []
        self.losses: list[Tensor] = []
        self.rng_states: list[Tensor] = []
        self._user_outputs = find_outputs
        self._shape: Callable[[Outputs], Outputs] = _same
        self._tapes, self._due, self._observed = tapes, due, observed
        self._call: tuple[tuple[Any, ...], dict[str, Any], Any, Tensor] | None = None
        self._open: ExitStack | None = None
        self._knows_loss = loss is not None
        self.paused = False
        me = weakref.ref(self)  # a hook must not keep a dropped optimiser alive
        _hook(model.register_forward_pre_hook, me, Watcher._before_model)
        _hook(model.register_forward_hook, me, Watcher._after_model, always_call=True)
        if loss is not None:
            _hook(loss.register_forward_hook, me, Watcher._after_loss)

    def clear(self) -> None:
        """Forgets the batches of the step."""
        self.batches, self.losses, self.rng_states, self._call = [], [], [], None
        for tape in self._tapes:
            tape.clear()

    def find_outputs(self, returned: Any) -> Outputs:
        """The likelihood's outputs among what the model returned.

        Raises:
            OutputError: they are not tensors; says what the model returned and what to pass.
        """
        found = returned if self._user_outputs is None else self._user_outputs(returned)
        outputs = tuple(found) if isinstance(found, (tuple, list)) else (found,)
        if not outputs or not all(isinstance(z, Tensor) for z in outputs):
            raise OutputError(
                f"the model returned {_describe(returned)}; say where the outputs are, such as "
                "natgrad.NaturalGradient(..., outputs=lambda o: o.logits)"
            )
        return self._shape(outputs)

    def _ignoring(self) -> bool:
        return self.paused or not torch.is_grad_enabled()

    def _before_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._ignoring():
            return
        self._call = (args, kwargs, None, torch.get_rng_state())
        if self._due():
            self._close()
            self._open = ExitStack()
            for tape in self._tapes:
                self._open.enter_context(tape.recording())

    def _after_model(self, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        self._close()
        if self._ignoring() or self._call is None or returned is None:
            return
        self._call = (args, kwargs, returned, self._call[3])
        if not self._knows_loss:
            self._shape = _same
            self._note(self.find_outputs(returned), None, None)

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _after_loss(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> None:
        if self._ignoring() or not value.requires_grad:
            return
        outputs, targets = self._read_loss(args, kwargs)
        if self._call is not None and self._call[2] is not None:
            self._shape = _same
            self._shape = _reshaping(self.find_outputs(self._call[2]), outputs)
        self._note(outputs, targets, value.detach())

    def _read_loss(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Outputs, Any]:
        given = dict(zip(("input", "target", "var"), args, strict=False)) | kwargs
        outputs, targets = given["input"], given["target"]
        if isinstance(self.likelihood, HeteroscedasticGaussian):
            variance = given["var"]
            if isinstance(variance, Tensor) and variance.requires_grad:
                return (outputs, variance), targets
            return (outputs,), (targets, variance)
        return (outputs,), targets

    def _note(self, outputs: Outputs, targets: Any, value: Tensor | None) -> None:
        call, self._call = self._call, None
        args, kwargs, _, rng_state = call if call is not None else ((), {}, None, torch.get_rng_state())
        examples = count_examples(args, kwargs, outputs)
        if call is not None:
            self.batches.append(Batch(args, kwargs, targets, examples))
            self.rng_states.append(rng_state)
        if value is not None:
            self.losses.append(value)
        finite = value is None or bool(torch.isfinite(value))
        if self._due() and finite:  # a batch that is not finite must not enter an average
            self._observed(outputs, targets, examples)
        for tape in self._tapes:
            tape.clear()


def count_examples(args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: Outputs) -> int:
    """How many examples a batch holds: the first dimension of the model's first tensor, if the outputs agree."""
    rows = outputs[0].shape[0] if outputs[0].dim() else 1
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() and value.shape[0] and rows % value.shape[0] == 0:
            return value.shape[0]
    return max(rows, 1)


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
    raise_shape = [tuple(z.shape) for z in outputs]

    def refuse(found: Outputs) -> Outputs:
        raise OutputError(
            f"the loss was given {raise_shape}, which is not what the model returned, "
            f"{[tuple(z.shape) for z in found]}; say how the one follows from the other with "
            "outputs=lambda returned: ..., or give lr="
        )

    return refuse


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {', '.join(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(v).__name__ for v in value)}"
    return type(value).__name__


def _hook(
    register: Callable[..., Any], me: weakref.ref[Watcher], method: Callable[..., None], **options: Any
) -> None:
    handle: list[Any] = []

    def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *result: Any) -> None:
        watcher = me()
        if watcher is not None:
            method(watcher, args, kwargs, *result)
        elif handle:
            handle.pop().remove()

    handle.append(register(call, with_kwargs=True, **options))
