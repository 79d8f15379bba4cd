"""How a decided direction becomes a change of the parameters: momentum, the groups' lr, decoupled weight decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

# A parameter's group, the parameter, and its state, by its name.
At = Callable[[str], tuple[dict[str, Any], nn.Parameter, dict[str, Any]]]


def velocity_of(direction: Mapping[str, Tensor], at: At) -> dict[str, Tensor]:
    """v ← μv + Δ with the group's μ, kept in the state; Δ itself where μ = 0."""
    velocity: dict[str, Tensor] = {}
    for name, delta in direction.items():
        group, _, state = at(name)
        momentum = group["momentum"]
        if not momentum:
            state.pop("velocity", None)
            velocity[name] = delta
            continue
        if "velocity" not in state:
            state["velocity"] = delta.clone()
        else:
            state["velocity"].mul_(momentum).add_(delta)
        velocity[name] = state["velocity"]
    return velocity


def go(velocity: Mapping[str, Tensor], at: At) -> None:
    """θ ← (1 − lr·decay) θ + lr·v, by the operations of `torch.optim.SGD`."""
    for name, v in velocity.items():
        group, p, _ = at(name)
        if group["weight_decay"]:
            p.mul_(1.0 - group["lr"] * group["weight_decay"])
        p.add_(v, alpha=group["lr"])


def update_of(
    direction: Mapping[str, Tensor],
    parts: Sequence[Sequence[str]],
    alphas: Sequence[float],
    momentum: float,
    at: At,
) -> dict[str, Tensor]:
    """δ = lr (Σ_k α_k Δ_k + μδ₀) by name, where lr is the group's factor; kept in the state as the next δ₀."""
    update: dict[str, Tensor] = {}
    for names, alpha in zip(parts, alphas, strict=True):
        for name in names:
            group, _, state = at(name)
            if "last" not in state:
                state["last"] = direction[name].mul(alpha * group["lr"])
            else:
                state["last"].mul_(momentum * group["lr"]).add_(direction[name], alpha=alpha * group["lr"])
            update[name] = state["last"]
    return update


def add(
    update: Mapping[str, Tensor], parts: Sequence[Sequence[str]], alphas: Sequence[float], at: At
) -> None:
    """θ ← (1 − |α| lr·decay) θ + δ."""
    for names, alpha in zip(parts, alphas, strict=True):
        for name in names:
            group, p, _ = at(name)
            if group["weight_decay"]:
                p.mul_(1.0 - group["lr"] * abs(alpha) * group["weight_decay"])
            p.add_(update[name])


def forget(names: Iterable[str], at: At) -> None:
    """Drops δ₀ of parameters that did not move in this step: it would be an older step's."""
    for name in names:
        at(name)[2].pop("last", None)


def take_back(names: Iterable[str], at: At) -> None:
    """θ ← θ − δ₀, and what led to it is forgotten."""
    for name in names:
        _, p, state = at(name)
        if "last" in state:
            p.sub_(state.pop("last"))
        state.pop("gradient", None)
