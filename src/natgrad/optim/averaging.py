"""An average of the iterates θ_t, in which the noise of the last steps cancels.

Steps that find their own length don't know when training will end, so that no schedule takes their noise away. The
polynomial-decay average (Shamir & Zhang 2013, arXiv 1212.1824), θ̄ ← θ̄ + (γ+1)/(t+γ+1) (θ_t − θ̄), does so at
every moment: it counts θ_t about as tᵞ, so that the beginning is soon forgotten. Martens & Grosse (2015,
arXiv 1503.05671) evaluate an average, too.

Where the next batches confirm the whole of each step there is no noise to cancel, and an average only lags behind, most
of all while the loss falls exponentially. So θ_t counts at least r⁴, with r the part that is confirmed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from natgrad.optim.moves import At

# With r², averages on `vit` and `resnet` follow an iterate that is still noisy.
SHARPNESS = 4


def weight_of(step: int, order: float, confirmed: float) -> float:
    """What θ_t counts when it joins the average: (γ+1)/(t+γ+1), or r⁴ where that is more.

    Args:
        step: t, from 0.
        order: γ.
        confirmed: r, the part of a step's slope that the next batch confirms; 0 where nothing is known of it.
    """
    return max((order + 1.0) / (step + order + 1.0), max(confirmed, 0.0) ** SHARPNESS)


def join(names: Iterable[str], at: At, weight: float) -> None:
    """θ̄ ← θ̄ + w(θ − θ̄), kept in the state; θ itself where there is none yet."""
    for name in names:
        _, p, state = at(name)
        if "average" in state:
            state["average"].lerp_(p, weight)
        else:
            state["average"] = p.detach().clone()


@contextmanager
def exchanged(names: Sequence[str], at: At, weight: float, buffers: Sequence[Tensor]) -> Iterator[None]:
    """Gives every parameter its average, with the present θ in it; at the end all is again as it was.

    Args:
        names: of the parameters.
        at: where they and their averages are.
        weight: what θ counts.
        buffers: what may be changed meanwhile, too.
    """
    before = [buffer.clone() for buffer in buffers]
    kept = {name: at(name)[1].detach().clone() for name in names}
    try:
        with torch.no_grad():
            for name in names:
                _, p, state = at(name)
                if "average" in state:
                    p.copy_(torch.lerp(state["average"], p, weight))
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                at(name)[1].copy_(value)
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)
