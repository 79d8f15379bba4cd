"""When to look again: periods that adapt to how fast an average moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.errors import ConfigError

# Drift is the relative change of the average's entries on a fixed sample since the last look. Below LOW the period
# doubles, above HIGH it halves. It also stays below a quarter of the average's age, or another part of it:
# what is young moves, even if the noise of its first batches hides it.
LOW, HIGH, YOUTH = 0.15, 0.4, 4
# The longest period where steps are many and small, as with a learning rate: little moves between two looks.
SMALL_STEPS = 20
SAMPLE = 256


class Refresh:
    """Says at which steps an average is due, and lengthens or shortens its period by the drift that it sees.

    Args:
        period: a fixed period in steps, or None to adapt it between 1 and `longest`.
        longest: the longest period that adapting may choose.
        youth: adapting chooses a period of at most the average's age over this.
    """

    def __init__(self, period: int | None, longest: int = 5, youth: int = YOUTH) -> None:
        if period is not None and period < 1:
            raise ConfigError(f"a refresh period must be at least 1 step, or None to adapt it; got {period}")
        self._fixed = period
        self.longest, self._youth = longest, youth
        self.period = period or 1
        self._first: int | None = None
        self._last: int | None = None
        self._seen: dict[str, Tensor] = {}

    def due(self, step: int) -> bool:
        """Whether this step is a period or more after the last one that was taken. Asking changes nothing."""
        return self._last is None or step - self._last >= self.period or step == self._last

    def took(self, step: int) -> None:
        """Notes that the average was looked at in this step."""
        self._first = step if self._first is None else self._first
        self._last = step

    def observed(self, averages: Mapping[str, Tensor], other: float = 0.0) -> None:
        """Adapts the period to how far the averages moved since the last call.

        Args:
            averages: tensors by name.
            other: a relative change of something else that matters as much.
        """
        if self._fixed is not None:
            return
        drift = self._drift(averages)
        if drift is not None:
            drift = max(drift, other)
        if drift is None:
            return
        age = (self._last or 0) - (self._first or 0)
        if drift < LOW:
            self.period = max(1, min(2 * self.period, self.longest, age // self._youth))
        elif drift > HIGH:
            self.period = max(1, self.period // 2)

    def _drift(self, averages: Mapping[str, Tensor]) -> float | None:
        moved: list[Tensor] = []
        for name, value in averages.items():
            flat = value.detach().reshape(-1)
            now = flat[:: max(1, flat.numel() // SAMPLE)].clone()
            now /= now.norm().clamp_min(torch.finfo(now.dtype).tiny)
            if name in self._seen:
                moved.append((now - self._seen[name]).norm())
            self._seen[name] = now
        return float(torch.stack(moved).mean()) if moved else None

    def state_dict(self) -> dict[str, Any]:
        """The present period, when it was looked, and the sample that drift is measured from."""
        return {"period": self.period, "first": self._first, "last": self._last, "seen": dict(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.period, self._first, self._last = state["period"], state["first"], state["last"]
        self._seen = {name: value.clone() for name, value in state["seen"].items()}
