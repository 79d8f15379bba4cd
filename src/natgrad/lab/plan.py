"""What a race consists of: runs (legs), each with the same budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from natgrad.errors import ConfigError
from natgrad.lab.peers import Entrant


@dataclass(frozen=True)
class Budget:
    """How long each run lasts: a number of steps, or of seconds of training. Exactly one is given."""

    steps: int | None = None
    seconds: float | None = None
    evaluate_every: int = 10

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ConfigError("give either steps or seconds")
        if (self.steps or 1) < 1 or (self.seconds or 1.0) <= 0 or self.evaluate_every < 1:
            raise ConfigError("steps, seconds and evaluate_every must be positive")

    def evaluates(self, step: int) -> bool:
        """Whether the model is measured after a step: every so often, and closer at first, when most happens."""
        early = {math.ceil(self.evaluate_every * share) for share in (0.1, 0.2, 0.4, 0.7)}
        return step % self.evaluate_every == 0 or step in early

    def spent(self, step: int, seconds: float) -> float:
        """The fraction of the budget that is used up; 1 or more means the end."""
        return step / self.steps if self.steps is not None else seconds / (self.seconds or math.inf)


@dataclass(frozen=True)
class Leg:
    """One run of a race: an optimiser at one rate on one seed."""

    entrant: Entrant
    seed: int

    @property
    def name(self) -> str:
        """The run's folder name."""
        rate = "" if self.entrant.rate is None else f"-lr{self.entrant.rate:g}"
        return f"{self.entrant.name}{rate}-seed{self.seed}"

    @property
    def label(self) -> str:
        """What the live view calls it."""
        rate = "" if self.entrant.rate is None or self.entrant.pinned else f" @ {self.entrant.rate:g}"
        return f"{self.entrant.label}{rate}, seed {self.seed}"
