"""The second moments behind a Kronecker-factored block, and how a batch is added to them.

A block's exact part of F is E[Σ_{s,s'} ãₛ ãₛ'ᵀ ⊗ gₛ gₛ'ᵀ], a sum over pairs of positions that share the weight. Two
approximations make factors of it (Eschenhagen et al. 2023, "Kronecker-factored approximate curvature for modern
neural network architectures", arXiv 2311.00636):

- "expand" (their eq. 12) keeps the pairs s = s': A = E[ã ãᵀ] over examples and positions, G = E[Σₛ g gᵀ]. It is exact
  for a deep linear network whose loss has a term for each position, such as tokens that are each predicted.
- "reduce" (their eq. 19) takes each example as a whole: A = E[(mean ã)(mean ã)ᵀ], G = E[(Σₛ g)(Σₛ g)ᵀ]. It is exact for
  a deep linear network whose positions are averaged before the loss, such as a vision transformer's.

With one position they are the same, Martens & Grosse 2015 (arXiv 1503.05671), §3. A third keeps all pairs:

- "scores" takes each example's whole score X = Σₛ g ãᵀ: A = E[XᵀX] and G = E[XXᵀ]/tr E[XXᵀ], so that A ⊗ G has the
  partial traces of F's own block. They are Shampoo's factors (Gupta et al. 2018, arXiv 1802.09568), of single examples
  rather than of batches: a step of power iteration from the identity towards the Kronecker product that is nearest to
  F's block in Frobenius norm (Morwani et al. 2024, arXiv 2406.17748).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.metrics.average import Weight, accumulate
from natgrad.metrics.layers import Layer, SignedSets
from natgrad.metrics.scores import partial_traces
from natgrad.operators import ParameterSpace
from natgrad.tape.elements import ElementColumns
from natgrad.tape.records import Block

Sharing = Literal["expand", "reduce", "scores"]
SHARINGS = ("expand", "reduce", "scores")
# Which factors are kept whole: the inputs', the outputs', or both of them.
Sides = Literal["both", "inputs", "outputs"]
SIDES = ("both", "inputs", "outputs")


@dataclass(eq=False)
class Sums:
    """The running sums behind one kind of use of a weight W [out, in (+ 1)].

    Attributes:
        A: Σ ã ãᵀ on the side of the inputs, or Σ XᵀX; the diagonal alone where it is a vector.
        G: Σ g gᵀ on the side of the outputs, or Σ XXᵀ; likewise.
        A_weight: what the one counts.
        G_weight: what the other counts.
    """

    A: Float[Tensor, "..."]
    G: Float[Tensor, "..."]
    A_weight: Weight = field(default_factory=Weight)
    G_weight: Weight = field(default_factory=Weight)

    def averages(self) -> tuple[Tensor, Tensor]:
        """The two factors."""
        return self.A / self.A_weight.total, self.G / self.G_weight.total

    def state_dict(self) -> dict[str, Any]:
        """The sums and their weights."""
        return {"A": self.A, "G": self.G, "weights": (self.A_weight.total, self.G_weight.total)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.A.copy_(state["A"])
        self.G.copy_(state["G"])
        self.A_weight, self.G_weight = map(Weight, state["weights"])


class Layout(TypedDict):
    """How a weight is stored (see `linalg.kronecker`)."""

    transposed: bool
    flat: bool


class Moments(NamedTuple):
    """Second moments of what some passes brought, or their diagonals.

    Attributes:
        signals: Σ g gᵀ, or Σ XXᵀ of whole scores; of a table, that of the side of its features.
        inputs: Σ XᵀX of whole scores; None where inputs are added apart from signals.
    """

    signals: Tensor
    inputs: Tensor | None = None


class Factors:
    """The running factors of one block.

    As a linear map its sums are A = Σ ã ãᵀ and G = Σ g gᵀ. As a table W [words, features] that is looked up, the side
    of the words has the words' frequencies, a diagonal, and that of the features Σ g gᵀ. A weight that is both, such as
    a language model's tied embedding, has both, and its factors are those whose product has the sum's partial traces.

    Args:
        block: the parameters that act together.
        space: their space.
        like: a tensor of the factors' dtype and device.
        sharing: what is done with positions that share the weight.
        largest: a side of more numbers has its diagonal alone.
        sides: so has the other side than these.
    """

    def __init__(
        self,
        block: Block,
        space: ParameterSpace,
        like: Tensor,
        sharing: Sharing = "expand",
        largest: int | None = None,
        sides: Sides = "both",
    ) -> None:
        self.block, self.space, self.sharing = block, space, sharing
        self._like = like
        grouped = block.groups > 1
        inputs, outputs = (
            not grouped and (sides == other or (largest is not None and length > largest))
            for length, other in ((block.columns, "outputs"), (block.outputs, "inputs"))
        )
        self.diagonal: tuple[bool, bool] = (inputs, outputs)
        self.as_map: Sums | None = None
        self.as_table: Sums | None = None
        self.step: int | None = None  # when it was last observed

    @property
    def layout(self) -> Layout:
        """How the weight is stored, as operators take it."""
        return {"transposed": self.block.transposed, "flat": self.block.flat}

    @property
    def parts(self) -> list[Sums]:
        """The sums that there are."""
        return [sums for sums in (self.as_map, self.as_table) if sums is not None]

    @property
    def examples(self) -> float:
        """How many examples the average is over."""
        part = self.parts[0]
        return part.G_weight.total if part is self.as_map else part.A_weight.total

    def sums(self, table: bool = False) -> Sums:
        """Those of a linear map, or of a table; empty ones where there were none."""
        known = self.as_table if table else self.as_map
        if known is None:
            groups = (self.block.groups,) if self.block.groups > 1 else ()
            axes = 1 if self.diagonal[0] else 2, 1 if self.diagonal[1] or table else 2
            sides = self.block.columns, self.block.outputs
            A, G = (self._like.new_zeros(*groups, *(size,) * k) for size, k in zip(sides, axes, strict=True))
            known = Sums(A, G)
            if table:
                self.as_table = known
            else:
                self.as_map = known
        return known

    def feed(
        self,
        layer: Layer | ElementColumns,
        decay: float,
        weights: Float[Tensor, "examples"] | None,
        denominator: float,
        sets: SignedSets | None = None,
    ) -> None:
        """Counts a micro-batch, and adds its inputs; its signals follow, pass by pass.

        Args:
            layer: what the block did in it.
            decay: what remains of the old sums.
            weights: a factor of each example; 1 if None.
            denominator: what the micro-batch weighs.
            sets: if sums of inputs over sets of examples are to stand for these.
        """
        if isinstance(layer, Layer) and self.sharing == "scores":
            sums = self.sums()
            for total, weight in ((sums.A, sums.A_weight), (sums.G, sums.G_weight)):
                total.mul_(decay)
                weight.add(denominator, decay)
        elif isinstance(layer, Layer):
            sums = self.sums()
            reduce = self.sharing == "reduce"
            rows = layer.add_inputs(sums.A, decay, weights, reduce, self.diagonal[0], sets)
            sums.A_weight.add(rows, decay)
            sums.G_weight.add(denominator, decay)
            sums.G.mul_(decay)
        else:
            sums = self.sums(table=True)
            counts, rows = layer.frequencies(weights)
            accumulate(sums.G, counts.to(sums.G.dtype), decay, 1.0)
            sums.G_weight.add(rows, decay)
            sums.A_weight.add(denominator, decay)
            sums.A.mul_(decay)

    def moments(
        self,
        layer: Layer | ElementColumns,
        sums: Float[Tensor, "g m o i"] | None = None,
        sets: SignedSets | None = None,
    ) -> Moments:
        """What some passes brought.

        Args:
            layer: what the block did in them.
            sums: signed sums of its scores, if these are to stand for them.
            sets: if sums of signals over sets of examples are to, where factors are not of scores.
        """
        if not isinstance(layer, Layer):
            return Moments(layer.gram_of_signals(self.diagonal[0]))
        if self.sharing != "scores":
            return Moments(layer.gram_of_signals(self.sharing == "reduce", self.diagonal[1], sets))
        inner, outer = partial_traces(layer, sums, self.diagonal)
        return Moments(outer, inner) if self.block.groups > 1 else Moments(outer[0], inner[0])

    def add_moments(self, layer: Layer | ElementColumns, moments: Moments, numerator: float) -> None:
        """Adds what `moments` gave.

        Args:
            layer: what the block did.
            moments: of its passes.
            numerator: what Σ S Sᵀ counts.
        """
        if isinstance(layer, Layer):
            sums = self.sums()
            sums.G.add_(moments.signals, alpha=numerator)
            if moments.inputs is not None:
                sums.A.add_(moments.inputs, alpha=numerator)
        else:  # a table has no bias
            A, own = self.sums(table=True).A, moments.signals
            A[tuple(slice(size) for size in own.shape)].add_(own, alpha=numerator)

    def averages(self) -> tuple[Tensor, Tensor]:
        """A and G; of a weight that is a map and a table those that are nearest in the sense of partial traces."""
        pairs = [part.averages() for part in self.parts]
        if self.sharing == "scores" and self.as_map is not None:
            A, G = pairs[0]
            trace = _trace(G).clamp_min(torch.finfo(G.dtype).tiny)
            pairs[0] = A, G / (trace[:, None, None] if G.ndim == 3 else trace)
        if len(pairs) == 1:
            return pairs[0]
        (A_map, G_map), (A_table, G_table) = pairs
        traces = [(_trace(A), _trace(G)) for A, G in ((A_map, G_map), (A_table, G_table))]
        total = sum(a * g for a, g in traces)
        A = A_map * traces[0][1] + A_table * traces[1][1]
        if G_map.ndim == 2:
            G_table = G_table.diag()
        G = G_map * traces[0][0] + G_table * traces[1][0]
        return A, G / total if total else G

    def state_dict(self) -> dict[str, Any]:
        """The sums and their weights."""
        return {
            "block": vars(self.block).copy(),
            "map": None if self.as_map is None else self.as_map.state_dict(),
            "table": None if self.as_table is None else self.as_table.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        for table, saved in ((False, state["map"]), (True, state["table"])):
            if saved is not None:
                self.sums(table).load_state_dict(saved)
        self.step = state["step"]


def _trace(factor: Tensor) -> Tensor:
    """Of a matrix, or of one that is given as its diagonal; of each where there are groups."""
    return (factor if factor.ndim == 1 else factor.diagonal(dim1=-2, dim2=-1)).sum(-1)


def check_sharing(sharing: str) -> None:
    """Raises ConfigError unless it is a known way to treat positions that share a weight."""
    if sharing not in SHARINGS:
        raise ConfigError(f"unknown sharing={sharing!r}; choose one of {', '.join(map(repr, SHARINGS))}")


def check_sides(sides: str) -> None:
    """Raises ConfigError unless it is known which factors are to be whole."""
    if sides not in SIDES:
        raise ConfigError(f"unknown sides={sides!r}; choose 'both', 'inputs' or 'outputs'")


def check_examples(examples: int | None) -> None:
    """Raises ConfigError unless some examples enter the factors."""
    if examples is not None and examples < 1:
        raise ConfigError(f"examples={examples} must be at least 1, or None for all")


def check_largest(largest: int | None) -> None:
    """Raises ConfigError unless some side may be dense."""
    if largest is not None and largest < 1:
        raise ConfigError(f"largest={largest} must be at least 1, or None for no bound")
