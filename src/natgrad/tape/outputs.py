"""What the likelihood reads of a forward pass, and the passes of signals that go back from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from natgrad.errors import OutputError
from natgrad.tape.passes import SignalPass
from natgrad.tape.tape import Tape

Outputs = tuple[Tensor, ...]


def find_outputs(returned: Any, find: Callable[[Any], Any] | None, asker: str) -> Outputs:
    """The likelihood's outputs among what the model returned.

    Args:
        returned: what the model returned.
        find: what the user gave to find them; None where the model returns them.
        asker: whose argument `outputs=` is, for the error: such as ``"natgrad.fisher"``.

    Raises:
        OutputError: they are not tensors; says what the model returned and what to pass.
    """
    found = returned if find is None else find(returned)
    outputs = tuple(found) if isinstance(found, (tuple, list)) else (found,)
    if not outputs or not all(isinstance(z, Tensor) for z in outputs):
        raise OutputError(
            f"the model returned {_describe(returned)}; say where the outputs are, such as "
            f"{asker}(..., outputs=lambda o: o.logits)"
        )
    return outputs


def count_examples(args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: Outputs) -> int:
    """How many examples a batch holds: the first dimension of the model's first tensor, if the outputs agree."""
    rows = outputs[0].shape[0] if outputs[0].dim() else 1
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() and value.shape[0] and rows % value.shape[0] == 0:
            return value.shape[0]
    return max(rows, 1)


def signal_passes(
    tape: Tape, outputs: Outputs, signals: Iterator[Any], examples: int
) -> Iterator[SignalPass]:
    """A pass back through the recorded graph for each of a likelihood's signals."""
    for signal in signals:
        yield SignalPass(tape, outputs, signal if isinstance(signal, tuple) else (signal,), examples)


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {', '.join(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(v).__name__ for v in value)}"
    return type(value).__name__
