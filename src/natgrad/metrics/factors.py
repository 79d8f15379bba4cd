"""The second moments behind a Kronecker-factored block, and how a batch is added to them.

A block's exact part of F is E[Σ_{s,s'} ãₛ ãₛ'ᵀ ⊗ gₛ gₛ'ᵀ], a sum over pairs of positions that share the weight. Two
approximations make factors of it (Eschenhagen et al. 2023, "Kronecker-factored approximate curvature for modern
neural network architectures", arXiv 2311.00636):

- "expand" (their eq. 12) keeps the pairs s = s': A = E[ã ãᵀ] over examples and positions, G = E[Σₛ g gᵀ]. It is exact
  for a deep linear network whose loss has a term for each position, such as tokens that are each predicted.
- "reduce" (their eq. 19) takes each example as a whole: A = E[(mean ã)(mean ã)ᵀ], G = E[(Σₛ g)(Σₛ g)ᵀ]. It is exact for
  a deep linear network whose positions are averaged before the loss, such as a vision transformer's.

With one position they are the same, Martens & Grosse 2015 (arXiv 1503.05671), §3.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.errors import ConfigError
from natgrad.metrics.average import Weight, accumulate, decay_since
from natgrad.metrics.base import Estimate, Observation
from natgrad.metrics.layers import Layer, layers_of
from natgrad.operators import ParameterSpace
from natgrad.tape.finite import require_finite
from natgrad.tape.records import Block
from natgrad.tape.rows import portions

# Signals of so many bytes, of as many passes as that makes, are added together: what a cache holds, so that warm memory
# is used again.
COLUMN_BYTES = 2**22

Sharing = Literal["expand", "reduce"]
SHARINGS = ("expand", "reduce")


class Factors:
    """The running sums of one block: A = ΣÃ ãᵀ / Σ1 and G = ΣΣ g gᵀ / Σ1.

    Args:
        block: the parameters that act together.
        space: their space.
        like: a tensor of the factors' dtype and device.
        sharing: what is done with positions that share the weight.
    """

    def __init__(
        self, block: Block, space: ParameterSpace, like: Tensor, sharing: Sharing = "expand"
    ) -> None:
        self.block, self.space, self.sharing = block, space, sharing
        groups = (block.groups,) if block.groups > 1 else ()
        self.A = like.new_zeros(*groups, block.columns, block.columns)
        self.G = like.new_zeros(*groups, block.outputs, block.outputs)
        self.A_weight, self.G_weight = Weight(), Weight()
        self.step: int | None = None  # when it was last observed

    def add_inputs(
        self, layer: Layer, decay: float, weights: Float[Tensor, "examples"] | None = None
    ) -> None:
        """A's sum after one more micro-batch.

        Args:
            layer: what the block did in it.
            decay: what remains of the old sum.
            weights: a factor of each example; 1 if None.
        """
        self.A_weight.add(layer.add_inputs(self.A, decay, weights, self.sharing == "reduce"), decay)

    def add_signals(self, gram: Float[Tensor, "*groups o o"], decay: float, numerator: float) -> None:
        """G's sum after more signal passes; its weight is counted apart, once a micro-batch.

        Args:
            gram: the passes' Σ g gᵀ.
            decay: what remains of the old sum.
            numerator: what Σ S Sᵀ counts.
        """
        accumulate(self.G, gram, decay, numerator)

    def averages(self) -> tuple[Tensor, Tensor]:
        """A and G."""
        return self.A / self.A_weight.total, self.G / self.G_weight.total

    def state_dict(self) -> dict[str, Any]:
        """The sums and their weights."""
        return {
            "block": vars(self.block).copy(),
            "A": self.A,
            "G": self.G,
            "weights": (self.A_weight.total, self.G_weight.total),
            "step": self.step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.A.copy_(state["A"])
        self.G.copy_(state["G"])
        self.A_weight, self.G_weight = map(Weight, state["weights"])
        self.step = state["step"]


@dataclass(frozen=True)
class Fed:
    """What one block did in some signal passes of a micro-batch.

    Attributes:
        factors: the block's sums, which have it already.
        layer: what it did.
        decay: what was left of the old sums.
        numerator: what Σ S Sᵀ counts.
    """

    factors: Factors
    layer: Layer
    decay: float
    numerator: float


class FactorEstimate(Estimate):
    """An estimate that keeps factors of every block that it sees."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        decay: float,
        examples: int | None,
        sharing: Sharing = "expand",
    ) -> None:
        super().__init__(parameters)
        self._decay, self._examples, self._sharing = decay, examples, sharing
        self._blocks: dict[str, Factors] = {}

    def covers(self, name: str) -> bool:
        return any(name in factors.block.names for factors in self._blocks.values())

    def _feed(self, observation: Observation, factors_too: bool = True) -> Iterator[Fed]:
        """Adds a micro-batch to the factors, and hands on what each block did, pass by pass.

        Args:
            observation: the micro-batch.
            factors_too: False where the factors have it already.
        """
        seen: set[str] = set()
        most, reduce = self._examples, self._sharing == "reduce"
        stride = 1 if most is None else -(-observation.examples // most)
        numerator = observation.numerator * observation.examples / -(-observation.examples // stride)
        weights = observation.weights if observation.weights is None else observation.weights[::stride]
        for passes in portions(observation.passes, COLUMN_BYTES):
            layers = layers_of(passes, self.parameters, stride)
            grams = [layer.gram_of_signals(reduce) for layer in layers] if factors_too else []
            # Before anything enters an average. A signal that is not finite shows on its Gram matrix's diagonal.
            require_finite(
                (la.block.weight, _check_sum(la, gram)) for la, gram in zip(layers, grams, strict=False)
            )
            for k, layer in enumerate(layers):
                factors, decay = self._factors(layer.block), 1.0
                if layer.block.weight not in seen and factors_too:
                    first = observation.first or factors.step != observation.step
                    decay = decay_since(self._decay, factors.step, observation.step)
                    factors.step = observation.step
                    factors.add_inputs(layer, decay, weights)
                    factors.G_weight.add(observation.denominator(first), decay)
                seen.add(layer.block.weight)  # the inputs are the same in every pass of one batch
                if factors_too:
                    factors.add_signals(grams[k], decay, numerator)
                yield Fed(factors, layer, decay, numerator)

    def _padded(self, block: Block, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """∇h of a block: zeros for its bias, or its weight, where that is frozen; empty where both are."""
        if not any(name in gradient for name in block.names):
            return {}
        return {
            name: gradient[name] if name in gradient else torch.zeros_like(self.parameters[name])
            for name in block.names
        }

    def _sums(self) -> dict[str, Tensor]:
        return {f"{w}.{side}": getattr(f, side) for w, f in self._blocks.items() for side in "AG"}

    def _factors(self, block: Block) -> Factors:
        if block.weight not in self._blocks:
            space = self.space.restrict(block.names)
            self._blocks[block.weight] = Factors(block, space, self.parameters[block.weight], self._sharing)
            self._added(block.weight)
        return self._blocks[block.weight]

    @abc.abstractmethod
    def _added(self, weight: str) -> None:
        """A block was seen for the first time."""


def check_sharing(sharing: str) -> None:
    """Raises ConfigError unless it is a known way to treat positions that share a weight."""
    if sharing not in SHARINGS:
        raise ConfigError(f"unknown sharing={sharing!r}; choose 'expand' or 'reduce'")


def check_examples(examples: int | None) -> None:
    """Raises ConfigError unless some examples enter the factors."""
    if examples is not None and examples < 1:
        raise ConfigError(f"examples={examples} must be at least 1, or None for all")


def _check_sum(layer: Layer, gram: Tensor) -> Tensor:
    """A number that is not finite if an input is not, or an entry of the signals' Gram matrix."""
    sums = [gram.diagonal(dim1=-2, dim2=-1).sum(), *(use.reading.state()[0].sum() for use in layer.uses)]
    return torch.stack(sums)
