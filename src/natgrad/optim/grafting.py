"""The donor's step, and the natural gradient's direction at its length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from natgrad.optim.moves import At
from natgrad.steps import Grafted


def donor_step(
    gradient: Mapping[str, Tensor], size: Grafted, at: At
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """m̂ and −m̂/(√v̂ + ε) by name: Adam's averaged gradient and its step (Kingma & Ba 2015, algorithm 1).

    Args:
        gradient: ∇h by name.
        size: ε.
        at: where the averages are kept, and the groups' β₁ and β₂.
    """
    averaged, step = {}, {}
    for name, g in gradient.items():
        group, _, state = at(name)
        first, second = group["betas"]
        if "second" not in state:
            state["first"], state["second"], state["count"] = torch.zeros_like(g), torch.zeros_like(g), 0
        state["count"] += 1
        state["first"].lerp_(g, 1.0 - first)
        state["second"].mul_(second).addcmul_(g, g, value=1.0 - second)
        averaged[name] = state["first"] / (1.0 - first ** state["count"])
        root = (state["second"].sqrt() / math.sqrt(1.0 - second ** state["count"])).add_(size.eps)
        step[name] = averaged[name].div(root).neg_()
    return averaged, step


def grafted(
    direction: Mapping[str, Tensor], donor: Mapping[str, Tensor], layers: Iterable[Sequence[str]]
) -> dict[str, Tensor]:
    """Δ ‖a‖/‖Δ‖ in each layer, and the donor's step a elsewhere.

    Args:
        direction: Δ by name.
        donor: a by name.
        layers: the names that are scaled together.
    """
    step = dict(donor)
    for names in layers:
        length, there = (
            math.sqrt(sum(float(vectors[name].square().sum()) for name in names))
            for vectors in (donor, direction)
        )
        scale = length / there if there else 0.0
        step |= {name: direction[name] * scale for name in names}
    return step
