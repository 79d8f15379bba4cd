"""Whether what a pass brought is finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from natgrad.errors import NonFiniteError


def require_finite(values: Iterable[tuple[str, Tensor]]) -> None:
    """Sees that what was made of inputs and signals is finite: a sum shows it, and one number is read for all.

    Args:
        values: each with the parameter that it belongs to.

    Raises:
        NonFiniteError: says of which parameter.
    """
    sums = [(name, v.sum(dtype=torch.promote_types(v.dtype, torch.float32))) for name, v in values]
    if not sums or bool(torch.isfinite(torch.stack([s for _, s in sums]).sum())):
        return
    name = next((name for name, s in sums if not bool(torch.isfinite(s))), "a parameter")
    raise NonFiniteError(f"an input of {name}, or a signal sent back to its output, is not finite")
