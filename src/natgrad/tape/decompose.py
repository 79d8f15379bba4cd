"""Fused functions as what they are made of, so that the tape hears the parts, and every part has all derivatives."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from natgrad.tape.recurrent import CELLS, PACKED, SEQUENCES


def _attention(*args: Any, **kwargs: Any) -> Any:
    """torch's own code, of which each function is heard: it would hand over itself, as one function, otherwise."""
    own = F.multi_head_attention_forward
    told = {**own.__globals__, "has_torch_function": lambda _: False}
    plain = types.FunctionType(own.__code__, told, own.__name__, own.__defaults__)
    plain.__kwdefaults__ = own.__kwdefaults__
    return plain(*args, **kwargs)


POSITIONS_FIRST = frozenset((F.multi_head_attention_forward,))
"""Functions that are given positions first, and then examples, whatever their module was given."""


def parts_of(func: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """A function of the same value made of others, to rounding; None if there is none.

    Args:
        func: a torch function.
        args: what it is called with.
    """
    if func is F.multi_head_attention_forward:
        return _attention
    if func in SEQUENCES:
        return (PACKED if is_packed(func, args) else SEQUENCES)[func]
    return CELLS.get(func)


def is_packed(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a recurrent network is given packed sequences, of which nothing says whose examples they are."""
    return func in SEQUENCES and isinstance(args[1], Tensor) and args[1].dim() == 1


class Unfused(TorchFunctionMode):
    """While it is on, functions are made of their parts: kernels of recurrent networks have no forward mode."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return (parts_of(func, args) or func)(*args, **(kwargs or {}))
