"""h(θ) and ∇h(θ) of a step, read from what the user's loop left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.errors import NonFiniteError, StepError
from natgrad.optim.groups import Member
from natgrad.optim.watcher import Watcher

Group = Mapping[str, Any]


def gradient_of(members: Mapping[str, Member], groups: list[dict[str, Any]]) -> dict[str, Tensor]:
    """∇h by name, the penalty's part within: of the parameters that have a gradient and are not frozen.

    Raises:
        StepError: there is none.
    """
    gradient: dict[str, Tensor] = {}
    for name, member in members.items():
        group, p = groups[member.group], member.parameter
        if p.grad is not None and not group["frozen"]:
            gradient[name] = p.grad if not group["l2"] else p.grad.add(p, alpha=group["l2"])
    if not gradient:
        raise StepError("no parameter has a gradient: call loss.backward() before step(), or pass a closure")
    return gradient


def norm_of(gradient: Mapping[str, Tensor]) -> float:
    """‖∇h‖."""
    return float(torch.stack([n.double() for n in torch._foreach_norm(list(gradient.values()))]).norm())


def dot(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """⟨left, right⟩ over the names of the left one."""
    return float(sum(torch.dot(value.reshape(-1), right[name].reshape(-1)) for name, value in left.items()))


def penalty_of(groups: Iterable[Group]) -> float:
    """½ Σ η‖θ‖², in nats."""
    penalised = [group for group in groups if group["l2"]]
    return float(sum(0.5 * g["l2"] * sum(p.square().sum() for p in g["params"]) for g in penalised))


def loss_of(watcher: Watcher, returned: Tensor | float | None, additive: bool) -> float | None:
    """h(θ) without the penalty: the mean over micro-batches, or their sum if the loss sums; None if none was seen."""
    if watcher.losses:
        return _joined([float(value) for value in watcher.losses], additive)
    return float(returned.detach()) if isinstance(returned, Tensor) else returned


def _joined(values: list[float], additive: bool) -> float:
    return sum(values) if additive else sum(values) / len(values)


def not_finite(
    loss: float | None, norm: float, gradient: Mapping[str, Tensor], trouble: str | None
) -> str | None:
    """What is not finite, in words; None where all is well.

    Args:
        loss: h(θ), if it was seen.
        norm: ‖∇h‖.
        gradient: ∇h by name; looked at only where its norm is not finite.
        trouble: what was wrong with the curvature pass, or None.
    """
    if loss is not None and not math.isfinite(loss):
        what = f"the loss is {loss}"
    elif not math.isfinite(norm):
        what = "a gradient is not finite"
    elif trouble is not None:
        what = trouble
    else:
        return None
    names = [name for name, g in gradient.items() if not torch.isfinite(g).all()]
    return f"{what} (gradients of {', '.join(names[:3])}{', …' if names[3:] else ''})" if names else what


def require_batch(watcher: Watcher, loss: float | None, measured: bool) -> None:
    """Sees that the step's batch was seen, and its loss where it can be.

    Args:
        watcher: what saw it.
        loss: h(θ), if it was seen.
        measured: whether the step measures the batch, beside curvature.

    Raises:
        StepError: it was not, or there were two losses.
    """
    if watcher.twice:
        raise StepError(
            "gradients came back from two calls of the loss on one forward pass, and F would be that of the first: "
            "call the model once for each, or make one loss of both"
        )
    if not watcher.batches or (loss is None and watcher.knows_loss):
        why = "the adaptive step needs the batch" if measured else "curvature is due in this step"
        raise StepError(
            f"{why}, but {watcher.missing()}: call the model and the loss that you gave to NaturalGradient before "
            "step()" + (", or give lr= and a fixed damping" if measured else "")
        )


def require_finite_direction(slope: float) -> None:
    """Sees that a product with Δ is finite, before any parameter is touched.

    Raises:
        NonFiniteError: it is not.
    """
    if not math.isfinite(slope):
        raise NonFiniteError(
            "the natural gradient is not finite although the gradient is: raise the damping, or work in float64"
        )
