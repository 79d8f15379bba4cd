"""Conjugate gradients in a run: begun at the last step's solution, and ended when they make no more progress."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from natgrad.linalg import Convergence, conjugate_gradients
from natgrad.operators import MatrixFree

# The share of all that was gained which an iteration has to gain (Martens 2010, §4.4).
PROGRESS = 5e-4
LIMIT = 1000


def warm_solve(
    operator: MatrixFree,
    gradient: Mapping[str, Tensor],
    damping: float,
    last: Mapping[str, Tensor],
    progress: float = PROGRESS,
    limit: int = LIMIT,
) -> tuple[dict[str, Tensor], Convergence]:
    """(F + λI)⁻¹ ∇h, and how the iteration went.

    Args:
        operator: F, on the gradient's parameters.
        gradient: ∇h by name.
        damping: λ.
        last: the last solution by name, where it begins; zero for names that are not in it.
        progress: ends where an iteration gains less than this share of all that was gained; 0 for never.
        limit: the most iterations.
    """
    space = operator.space
    start = {name: last[name] if name in last else torch.zeros_like(g) for name, g in gradient.items()}
    solution, convergence = conjugate_gradients(
        operator._damped(damping),
        space.flatten(gradient)[None],
        tolerance=operator._tolerance,
        progress=progress,
        precondition=operator._precondition(damping),
        start=space.flatten(start)[None],
        limit=limit,
    )
    return {name: v.clone() for name, v in space.unflatten(solution[0]).items()}, convergence
