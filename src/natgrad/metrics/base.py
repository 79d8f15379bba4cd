"""What a metric is: a recipe for F̂, and the running estimate of it that one training run keeps."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.errors import ConfigError
from natgrad.operators import LinearOperator, ParameterSpace
from natgrad.tape.passes import SignalPass
from natgrad.tape.records import Block
from natgrad.tape.replay import Replay

Kind = Literal["mc", "exact", "empirical", "rademacher"]
KINDS: tuple[Kind, ...] = ("mc", "exact", "empirical", "rademacher")


@dataclass(frozen=True)
class Observation:
    """One micro-batch's curvature pass.

    Attributes:
        passes: one signal pass for each signal; read once, in order.
        examples: the number of examples.
        step: the step that it belongs to.
        first: whether it is the first micro-batch of its step; the others join it without decay.
        additive: whether the loss sums over examples, so that micro-batches add up rather than average.
        mass: what it weighs in an average, where that is not its number of examples: the events that the loss counts.
        weights: √ of these is inside the signals, one for each example; None where every example counts alike.
        again: whether the batch can be shown again in another sweep (see `Estimate.sweeps`).
        replay: the same batch's F as products that run the model again, for estimates that `replays`; None where the
            model can't be run.
    """

    passes: Iterator[SignalPass]
    examples: int
    step: int
    first: bool
    additive: bool
    mass: float | None = None
    weights: Float[Tensor, "examples"] | None = None
    again: bool = False
    replay: Replay | None = None

    @property
    def weight(self) -> float:
        """What this micro-batch weighs in an average over examples."""
        return float(self.examples) if self.mass is None else self.mass

    @property
    def numerator(self) -> float:
        """What this micro-batch's Σ S Sᵀ counts in its average."""
        return 1.0 if self.additive else self.weight

    def denominator(self, first: bool) -> float:
        """What it adds to the total weight: its examples, or one for a step whose micro-batches add up.

        Args:
            first: whether it is the first micro-batch of its step that had something to add.
        """
        return float(first) if self.additive else self.weight


# λ where a layer has no curvature, and so no scale: what it is given comes out as long as it can be.
LEAST = 1e-30


@dataclass(frozen=True)
class Metric(abc.ABC):
    """A recipe for the Fisher information F̂: which representation, from which signals, averaged how.

    A metric is immutable and may be shared by several optimisers; what a run estimates lives in `Estimate`.
    """

    # p in Δ = −(F̂ + λI)⁻ᵖ ∇h: 1 for the natural gradient. Metrics that leave a choice have it as a field.
    power = 1.0
    # Whether F̂ has parts that are damped each by itself, so that λ can count a part's mean eigenvalues.
    by_layer = False

    @property
    def tempered(self) -> bool:
        """Whether p < 1, so that Δ is no natural gradient but lies before it."""
        return self.power < 1.0

    @abc.abstractmethod
    def start(self, parameters: Mapping[str, nn.Parameter]) -> Estimate:
        """A fresh estimate for these parameters.

        Raises:
            ConfigError: the representation would not fit these parameters.
        """


class Estimate(abc.ABC):
    """The running estimate F̂ ← εF̂ + (1−ε)F_batch of one run, and its damped solves.

    Attributes:
        space: the parameters that it was started for.
        kind: which signals it wants, or None if it wants none.
        whole: whether it knows the curvature of every use of a parameter, by whatever function.
        stages: block → factor → which stage of the fallback the last factorisation took.
        sweeps: how often `natgrad.fisher` has to show it all of the data; it may grow while the data is shown.
        replays: whether it can make use of products that run the model again, where rows take too much memory.
        relative: whether λ counts mean eigenvalues of each part of F̂; where the metric is `by_layer`.
    """

    kind: Kind | None = None
    whole: bool = False
    sweeps: int = 1
    replays: bool = False
    relative: bool = False

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.space = ParameterSpace.of(parameters)
        self.stages: dict[str, dict[str, str]] = {}

    @abc.abstractmethod
    def covers(self, name: str) -> bool:
        """Whether F̂ holds curvature for this parameter."""

    def diagonal_factors(self, block: Block) -> tuple[bool, bool] | None:
        """Which of a block's Kronecker factors, A and G, are diagonals; None where it has none, or none yet."""
        return None

    @abc.abstractmethod
    def due(self, step: int) -> bool:
        """Whether this step's batch should be observed."""

    @abc.abstractmethod
    def observe(self, observation: Observation) -> None:
        """F̂ ← εF̂ + (1−ε)F_batch. Touches neither a parameter nor a gradient."""

    def next_sweep(self) -> None:  # noqa: B027  most metrics have nothing to do
        """Called between two sweeps through the same data, where `sweeps` asks for more than one."""

    def expect_small_steps(self) -> None:  # noqa: B027  most metrics look at every step anyway
        """Called where a learning rate is given: periods that adapt may then grow longer."""

    @abc.abstractmethod
    def operator(self) -> LinearOperator:
        """F̂ on the covered parameters, without damping.

        Raises:
            StepError: nothing was observed yet.
        """

    @abc.abstractmethod
    def solve(self, gradient: Mapping[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        """(F̂ + λI)⁻¹ ∇h on the covered parameters, with cached factorisations refreshed when they are due.

        Where the metric is `tempered` it is (F̂ + λI)⁻ᵖ ∇h.

        Args:
            gradient: ∇h by name. Covered parameters that are left out don't move; a representation that can restricts
                F̂ to those that do.
            damping: λ.
            step: the present step.

        Returns:
            The solution, at least for the covered names of the gradient.

        Raises:
            StepError: nothing was observed yet.
            NonFiniteError, NotPositiveDefiniteError: a factor can't be factorised.
        """

    def squared_length(self, direction: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> float:
        """An upper bound of Δᵀ F̂ Δ for Δ = −`solve`(∇h), where no block has a part that is left out.

        Args:
            direction: Δ of covered parameters, by name.
            gradient: ∇h.
        """
        return -sum(float(torch.dot(gradient[n].reshape(-1), d.reshape(-1))) for n, d in direction.items())

    def attempt(self, gradient: Mapping[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        """`solve` with a λ that is only tried: what is cached for the present λ stays."""
        return self.solve(gradient, damping, step)

    def damping_of(self, damping: float, mean: Tensor) -> float:
        """λ for a part of F̂.

        Args:
            damping: as `solve` was given it.
            mean: the part's mean eigenvalue.
        """
        return max(damping * float(mean), LEAST) if self.relative else damping

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Averages and caches, so that a restored run goes on bit for bit."""

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""


class WholeEstimate(Estimate):
    """An estimate that covers every parameter it was started for, however it acts, and wants every batch."""

    whole = True

    def covers(self, name: str) -> bool:
        return name in self.parameters

    def due(self, step: int) -> bool:
        return True


def check_kind(kind: str) -> Kind:
    """The kind itself; raises ConfigError unless it is a known kind of signal."""
    for known in KINDS:
        if kind == known:
            return known
    raise ConfigError(
        f"unknown kind of Fisher information {kind!r}; choose one of {', '.join(map(repr, KINDS))}"
    )


def check_decay(decay: float) -> None:
    """Raises ConfigError unless 0 ≤ ε < 1."""
    if not 0.0 <= decay < 1.0:
        raise ConfigError(f"decay={decay} must lie in [0, 1)")


def check_power(power: float) -> None:
    """Raises ConfigError unless 0 ≤ p ≤ 1."""
    if not 0.0 <= power <= 1.0:
        raise ConfigError(f"power={power} must lie in [0, 1]: 1 for the natural gradient, 0 for the gradient")
