"""What no metric covers: a diagonal from the gradients themselves, as Adam's second moment is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# What a step leaves of the average; Adam's β₂ (Kingma & Ba 2015, arXiv 1412.6980), for fewer and longer steps.
DECAY = 0.95


class Remainder:
    """(F̂ + λ)⁻¹∇h with F̂ the mean square of past gradients, in units of the Fisher information.

    The gradient of a mean over N examples has the covariance F/N, so N times its mean square is an estimate of F's
    diagonal that needs no rule, and is too large by N(∇h)² where there is still a slope: such steps are short.
    """

    def __init__(self) -> None:
        self._squares: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._step: int | None = None

    def observe(self, gradient: Mapping[str, Tensor], examples: float, step: int) -> None:
        """Adds a step's gradients; once a step.

        Args:
            gradient: ∇h by name.
            examples: N; 1 where the loss is a sum over examples.
            step: the present step.
        """
        if step == self._step:
            return
        self._step = step
        for name, g in gradient.items():
            square = self._squares.setdefault(name, torch.zeros_like(g))
            square.mul_(DECAY).addcmul_(g, g, value=(1.0 - DECAY) * examples)
            self._weights[name] = DECAY * self._weights.get(name, 0.0) + 1.0 - DECAY

    def solve(
        self, gradient: Mapping[str, Tensor], damping: Mapping[str, float], power: float = 1.0
    ) -> dict[str, Tensor]:
        """(F̂ + λ)⁻ᵖ of a gradient, by name; the gradient itself where none was observed.

        Args:
            gradient: what is solved for.
            damping: λ by name.
            power: p.
        """
        return {
            name: g / (self._squares[name] / self._weights[name] + damping[name]).pow(power)
            if name in self._squares
            else g
            for name, g in gradient.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return {"squares": dict(self._squares), "weights": dict(self._weights), "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._squares = {name: square.clone() for name, square in state["squares"].items()}
        self._weights, self._step = dict(state["weights"]), state["step"]
