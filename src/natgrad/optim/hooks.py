"""A hook of a watched module, which neither a copy of the module nor a compiler takes along."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Hook:
    """Calls a watcher's method; it keeps no dropped optimiser alive, and in a copy of the module it does nothing."""

    def __init__(self, watcher: object, method: Callable[..., None]) -> None:
        self._watcher, self._method = weakref.ref(watcher), method

    @torch._disable_dynamo
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *result: Any
    ) -> None:
        watcher = self._watcher()
        if watcher is not None:
            self._method(watcher, args, kwargs, *result)

    def __reduce__(self) -> tuple[type[Idle], tuple[()]]:
        return Idle, ()


class Idle:
    """What a hook is in a copy of the module, by `copy.deepcopy` or `torch.save`."""

    def __call__(self, *args: Any) -> None:
        """Nothing: the copy is nobody's to watch."""
