"""Fused functions as what they are made of, so that the tape hears the parts, and every part has all derivatives."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
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
        return (PACKED if _is_packed(args) else SEQUENCES)[func]
    return CELLS.get(func)


def audible_parts_of(func: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """The same for the tape; None also where it could not make use of the parts.

    Nothing says whose examples the rows of a packed sequence are. And what a checkpoint computes a second time, in the
    user's backward pass, has to save the same tensors as it did here.
    """
    if func is not F.multi_head_attention_forward and func in (SEQUENCES.keys() | CELLS.keys()):
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        checkpointed = hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
        if checkpointed or (func in SEQUENCES and _is_packed(args)):
            return None
    return parts_of(func, args)


def _is_packed(args: tuple[Any, ...]) -> bool:
    return isinstance(args[1], Tensor) and args[1].dim() == 1  # how many examples each position has


class Unfused(TorchFunctionMode):
    """While it is on, functions are made of their parts: kernels of recurrent networks have no forward mode."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return (parts_of(func, args) or func)(*args, **(kwargs or {}))
