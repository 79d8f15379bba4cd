"""A closure at several values of the parameters in one evaluation, by `torch.func.vmap`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.tape.adjoint import loops_allowed
from natgrad.tape.substitute import call_with

# So many residuals go together: more leave a processor's cache, and lose more than they gain. Nor is it worth while for
# fewer lengths than these at once.
AT_ONCE, FEWEST = 2**13, 12


class _Calls(nn.Module):
    """A closure in the form of a module, so that parameters of the model that it uses can be exchanged."""

    def __init__(self, model: nn.Module, closure: Callable[[], Any]) -> None:
        super().__init__()
        self.model, self._closure = model, closure

    def forward(self) -> Any:
        return self._closure()


def evaluated_along(
    model: nn.Module,
    closure: Callable[[], Any],
    start: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    lengths: Float[Tensor, "K"],
    residuals: int,
) -> list[Any] | None:
    """What a closure returns at θ + t·d for several lengths t; None if it can't be batched, or had better not be.

    Args:
        model: whose parameters the closure uses.
        closure: returns a tensor, or a dictionary of tensors.
        start: θ by name.
        direction: d by name.
        lengths: every t.
        residuals: how many numbers the closure returns.
    """
    chunk = AT_ONCE // max(residuals, 1)
    if chunk < min(FEWEST, len(lengths)):
        return None
    calls = _Calls(model, closure)

    def one(length: Tensor) -> Any:
        values = {f"model.{name}": torch.add(p, direction[name] * length) for name, p in start.items()}
        return call_with(calls, values, (), {})

    try:
        with torch.no_grad(), loops_allowed():
            found = torch.func.vmap(one, randomness="same", chunk_size=chunk)(lengths)
    except (
        RuntimeError,
        ValueError,
        TypeError,
    ):  # what vmap raises where an operation or a result does not suit it
        return None
    if isinstance(found, Mapping):
        return [{name: value[k] for name, value in found.items()} for k in range(len(lengths))]
    return [found[k] for k in range(len(lengths))]
