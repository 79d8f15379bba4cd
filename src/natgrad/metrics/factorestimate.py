"""Estimates that keep factors of every linear map and table, and the diagonal of F beside them."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from natgrad.metrics.average import decay_since
from natgrad.metrics.base import Estimate, Observation
from natgrad.metrics.factors import Factors, Sharing, Sides
from natgrad.metrics.layers import Layer, SignedSets, columns_of, layers_of
from natgrad.metrics.runningsquares import RunningSquares
from natgrad.metrics.scores import SignedSums
from natgrad.operators import BlockDiagonal, Diagonal, LinearOperator
from natgrad.tape.elements import ElementColumns
from natgrad.tape.finite import require_finite
from natgrad.tape.records import Block
from natgrad.tape.rows import portions

# Signals of so many bytes, of as many passes as that makes, are added together: what a cache holds, so that warm memory
# is used again.
COLUMN_BYTES = 2**22
# The rule of a block that was only ever looked up.
LOOKUP = "embedding"


@dataclass(frozen=True)
class Fed:
    """What one block did in some signal passes of a micro-batch.

    Attributes:
        factors: the block's sums, which have it already.
        shown: what it did, or signed sums of its scores.
        decay: what was left of the old sums.
        numerator: what Σ S Sᵀ counts.
    """

    factors: Factors
    shown: Layer | ElementColumns | Tensor
    decay: float
    numerator: float


class FactorEstimate(Estimate):
    """An estimate that keeps factors of every linear map and table that it sees, and the diagonal of F beside them.

    Parameters that act entry by entry, such as a normalisation's scale and shift, have the diagonal.

    Args:
        parameters: whose factors.
        decay: ε of the averages.
        examples: at most so many of a batch are looked at, evenly spaced; None for all.
        sharing: what is done with positions that share a weight.
        largest: a side of more numbers has its diagonal alone.
        sides: so has the other side than these.
        positions: where positions share a weight, sums of inputs and of signals over examples with random signs stand
            for these in A and G, about so many rows for each of `examples`.
        sets: of at least so many sets of examples.
        thin: at most so many positions for each of `examples` are looked at; None for all.
        scores: where factors are made of scores, so many sums of them with random signs stand for these; None for all.
            Of these four none applies where all examples are taken.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        decay: float,
        examples: int | None,
        sharing: Sharing = "expand",
        largest: int | None = None,
        sides: Sides = "both",
        positions: int = 1,
        sets: int = 8,
        thin: int | None = None,
        scores: int | None = None,
    ) -> None:
        super().__init__(parameters)
        self._decay, self._examples = decay, examples
        self._sharing, self._largest, self._sides = sharing, largest, sides
        self._rows, self._sets = None if examples is None else positions * examples, sets
        self._most = None if examples is None or thin is None else thin * examples
        self._generator = torch.Generator()
        self._signed = None
        if sharing == "scores" and examples is not None and scores is not None:
            self._signed = SignedSums(scores, self._generator)
        self._blocks: dict[str, Factors] = {}
        self._squares = RunningSquares(self.parameters, decay)

    def covers(self, name: str) -> bool:
        return name in self._squares or any(name in factors.block.names for factors in self._blocks.values())

    def diagonal_factors(self, block: Block) -> tuple[bool, bool] | None:
        factors = self._blocks.get(block.weight)
        return None if factors is None else factors.diagonal

    @property
    def _empty(self) -> bool:
        return not self._blocks and not self._squares.totals

    def _feed(self, observation: Observation, factors_too: bool = True) -> Iterator[Fed]:
        """Adds a micro-batch to the factors, and hands on what each block did, pass by pass.

        Args:
            observation: the micro-batch.
            factors_too: False where the factors have it already.
        """
        seen: set[tuple[str, bool]] = set()
        begun: dict[str, tuple[float, float]] = {}
        most = self._examples
        stride = 1 if most is None else -(-observation.examples // most)
        if factors_too:
            self._squares.begin(observation)
        self._generator.manual_seed(observation.step)
        for passes in portions(observation.passes, COLUMN_BYTES):
            layers, elements = layers_of(passes, self.parameters, stride, self._most)
            tables = [element for element in elements if element.only_lookups]
            uses: list[Layer | ElementColumns] = [*layers, *tables]
            blocks = [self._factors(_block_of(use)) for use in uses]
            sums = [self._signed_sums(use) for use in uses]
            sets = [self._sets_of(use) for use in uses]
            moments = []
            if factors_too:
                moments = [
                    f.moments(use, one[0], own)
                    for f, use, one, own in zip(blocks, uses, sums, sets, strict=True)
                ]
            squares = {e.name: e.squares() for e in elements if e not in tables} if factors_too else {}
            # Before anything enters an average. A signal that is not finite shows on its Gram matrix's diagonal.
            checks = [
                (_block_of(use).weight, _check_sum(use, one.signals))
                for use, one in zip(uses, moments, strict=False)
            ]
            require_finite((*checks, *squares.items()))
            for name, value in squares.items():
                self._squares.add(name, value)
            for k, (factors, use) in enumerate(zip(blocks, uses, strict=True)):
                weight, decay = factors.block.weight, 1.0
                key = (weight, isinstance(use, Layer))
                if key not in seen and factors_too:
                    if weight not in begun:
                        first = observation.first or factors.step != observation.step
                        decay = decay_since(self._decay, factors.step, observation.step)
                        begun[weight] = decay, observation.denominator(first)
                        factors.step = observation.step
                    weights = observation.weights
                    if weights is not None and isinstance(use, Layer):
                        weights = weights[:: use.stride]
                    factors.feed(use, begun[weight][0], weights, begun[weight][1], sets[k])
                seen.add(key)  # the inputs are the same in every pass of one batch
                numerator = observation.numerator
                if isinstance(use, Layer) and use.stride > 1:
                    numerator *= observation.examples / use.examples
                if factors_too:
                    factors.add_moments(use, moments[k], numerator)
                signed = sums[k][1]
                yield Fed(factors, use if signed is None else signed, decay, numerator)

    def _signed_sums(self, use: Layer | ElementColumns) -> tuple[Tensor | None, Tensor | None]:
        """Those for the factors, and others to be handed on; none where scores are taken one by one."""
        if self._signed is None or not isinstance(use, Layer) or not self._signed.pay(use):
            return None, None
        for_factors, handed = self._signed.of(use, 2)
        return for_factors, handed

    def _sets_of(self, use: Layer | ElementColumns) -> SignedSets | None:
        """Sets of examples whose sums stand for inputs and signals; None where these are taken as they are."""
        if self._rows is None or self._sharing != "expand" or not isinstance(use, Layer):
            return None
        count = max(self._sets, -(-self._rows // use.positions))
        if use.positions == 1 or count >= use.examples:
            return None
        bits = torch.randint(2, (use.examples,), generator=self._generator)
        return SignedSets.of((2 * bits - 1).to(columns_of(use.uses[0])[0]), count)

    def _padded(self, block: Block, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """∇h of a block: zeros for its bias, or its weight, where that is frozen; empty where both are."""
        if not any(name in gradient for name in block.names):
            return {}
        return {
            name: gradient[name] if name in gradient else torch.zeros_like(self.parameters[name])
            for name in block.names
        }

    def _entrywise(
        self, gradient: Mapping[str, Tensor], damping: float, power: float = 1.0
    ) -> dict[str, Tensor]:
        """(F̂ + λ)⁻ᵖ ∇h of the parameters that have the diagonal."""
        return {
            name: gradient[name] / value.add_(self.damping_of(damping, value.mean())).pow_(power)
            for name, value in self._squares.averages().items()
            if name in gradient
        }

    def _with_diagonal(self, blocks: list[LinearOperator]) -> LinearOperator:
        """The operator of all blocks, and of the diagonal beside them."""
        values = self._squares.averages()
        if values:
            blocks = [*blocks, Diagonal(self.space.restrict(values), values)]
        covered = {name for block in blocks for name in block.space.names}
        return BlockDiagonal(
            self.space.restrict(name for name in self.space.names if name in covered), blocks
        )

    def _sums(self) -> dict[str, Tensor]:
        return {
            f"{weight}.{k}.{side}": getattr(sums, side)
            for weight, factors in self._blocks.items()
            for k, sums in enumerate(factors.parts)
            for side in "AG"
        }

    def _factors(self, block: Block) -> Factors:
        if block.weight not in self._blocks:
            space = self.space.restrict(block.names)
            like = self.parameters[block.weight]
            self._blocks[block.weight] = Factors(
                block, space, like, self._sharing, self._largest, self._sides
            )
            self._added(block.weight)
        return self._blocks[block.weight]

    @abc.abstractmethod
    def _added(self, weight: str) -> None:
        """A block was seen for the first time."""


def _block_of(use: Layer | ElementColumns) -> Block:
    if isinstance(use, Layer):
        return use.block
    words, features = len(use.parameter), use.parameter[0].numel()
    return Block(use.name, None, LOOKUP, 1, features, words)


def _check_sum(use: Layer | ElementColumns, moments: Tensor) -> Tensor:
    """A number that is not finite if an input is not, or an entry of the signals' Gram matrix or of the scores'."""
    readings = [one.reading.state()[0].sum() for one in use.uses] if isinstance(use, Layer) else []
    # Off the diagonal an entry is at most as large as one on it.
    return torch.stack([moments.sum() if moments.ndim == 1 else _diagonals(moments).sum(), *readings])


def _diagonals(moments: Tensor) -> Tensor:
    return moments.diagonal(dim1=-2, dim2=-1)
