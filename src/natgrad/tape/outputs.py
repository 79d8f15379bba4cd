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
    """How many examples a batch holds: the first dimension of the model's first tensor, if the outputs agree.

    Raises:
        OutputError: the outputs have as many, but along another axis.
    """
    rows = outputs[0].shape[0] if outputs[0].dim() else 1
    given = [
        v.shape[0] for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() and v.shape[0]
    ]
    for examples in given:
        if rows % examples == 0:
            return examples
    if given and given[0] in outputs[0].shape[1:-1]:
        raise examples_not_first(outputs[0], given[0])
    return max(rows, 1)


def examples_not_first(outputs: Tensor, examples: int) -> OutputError:
    """The error about outputs of which another axis holds the examples."""
    return OutputError(
        f"the batch holds {examples} examples (the first axis of the model's input), but they are not first in the "
        f"outputs {tuple(outputs.shape)}; let the model return them first, such as by outputs.transpose(0, 1)"
    )


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
