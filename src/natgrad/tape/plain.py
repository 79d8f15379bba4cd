"""A model's plain pass: as it is written, whatever compiles it or saves its memory on other passes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint


def original(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given; any other as it is."""
    inner = getattr(model, "_orig_mod", None)
    return original(inner) if isinstance(inner, nn.Module) else model


def within_compiled() -> bool:
    """Whether the caller's caller runs where `torch.compile` takes what is called: no hook may open a tape there.

    The caller is called by a hook of a module, and what is looked for lies outside of that module's call.
    """
    frame: Any = sys._getframe(1)
    inside = False
    while frame is not None:
        home = frame.f_globals.get("__name__")
        inside = inside or home == "torch.nn.modules.module"
        # A compiled module's own call is outside of what is compiled: its hooks may do what they like.
        if inside and home == "torch._dynamo.eval_frame" and frame.f_code.co_name != "__call__":
            return True
        frame = frame.f_back
    return False


@contextmanager
def plain_pass() -> Iterator[None]:
    """Models that are called inside are not compiled, and their reentrant checkpoints are the other kind.

    The reentrant kind runs without a graph, so that nothing could be recorded, and knows no derivative of forward mode.
    """
    reentrant = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _NotReentrant  # type: ignore[misc,assignment]
    try:
        if "torch._dynamo" in sys.modules:
            with torch.compiler.set_stance("force_eager"):
                yield
        else:  # nobody compiles
            yield
    finally:
        checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]


class _NotReentrant:
    """What stands in for torch's function: the same results and gradients, within one graph."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        """The function's results."""
        return checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )
