"""Signals through float16, which knows no number below 6e-8: they go back multiplied, as a GradScaler has the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

# What the greatest number of a signal becomes: float16 then has room for factors of 250 above, and of 4e6 below.
GREATEST = 2.0**8


def loudness(signals: Sequence[Sequence[Tensor]]) -> float:
    """The power of two that brings the greatest number of the signals near `GREATEST`; 1 where there is none."""
    greatest = max((float(s.detach().abs().max()) for one in signals for s in one if s.numel()), default=0.0)
    if not 0.0 < greatest < math.inf:
        return 1.0
    return 2.0 ** round(math.log2(GREATEST / greatest))


def unscaled(signal: Tensor, scale: float) -> Tensor:
    """A signal that came back, without the factor, and in float32 where there was one."""
    return signal if scale == 1.0 else signal.float() / scale
