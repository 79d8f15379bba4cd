"""K-FAC: each layer's Fisher block as the Kronecker product of two small factors.

Martens & Grosse 2015 (arXiv 1503.05671), §3–4; convolutions as in Grosse & Martens 2016 (arXiv 1602.01407), which is
the "expand" form of Eschenhagen et al. 2023 (arXiv 2311.00636) for any map whose weight is shared over positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import StepError
from natgrad.linalg import Stage, eigendecomposition
from natgrad.metrics.base import Estimate, Kind, Metric, Observation, check_decay, check_kind
from natgrad.metrics.factorestimate import FactorEstimate
from natgrad.metrics.factors import (
    Factors,
    Sharing,
    Sides,
    check_examples,
    check_largest,
    check_sharing,
    check_sides,
)
from natgrad.metrics.refresh import SMALL_STEPS, Refresh
from natgrad.operators import EigenKronecker, FactoredInverse, Kronecker, LinearOperator
from natgrad.tape.records import Block


@dataclass(frozen=True)
class KFAC(Metric):
    """F ≈ blockdiag(A ⊗ G): second moments of each layer's inputs, and of the signals sent back to its outputs.

    Attributes:
        kind: the signals behind G: sampled from the model ("mc"), every output column ("exact"), real gradients
            ("empirical"), or random signs times a root of the outputs' Fisher information ("rademacher").
        decay: ε of the running averages (Martens & Grosse 2015, §5).
        factors: observe the factors every so many steps; adapted to how fast they move if None.
        inverses: invert them every so many steps; adapted likewise if None.
        examples: at most so many examples of a batch enter the factors, evenly spaced, and where positions share a
            weight about so many rows: sums over at least eight sets of examples, position by position, with random
            signs, have the same second moments on average. None for all. Their average over steps is fed often enough,
            and the products behind them are most of an observation's cost.
        sharing: what is done with positions that share a weight (tokens, a convolution's patches, several uses):
            "expand" takes each as an example of its own, "reduce" the mean of the inputs and the sum of the signals
            (Eschenhagen et al. 2023; see `metrics.factors`), "scores" the scores of whole examples, whose partial
            traces are F's (Gupta et al. 2018): dearer, and right wherever F's block is a Kronecker product at all.
        largest: a factor with more rows than this is kept as its diagonal alone: the side of a vocabulary, say. None
            for no bound.
        sides: keep both factors whole, or those of the "inputs" or the "outputs" alone, with the diagonal of the other
            (one-sided K-FAC; Benzing 2022, arXiv 2201.12250, has the inputs' and the identity). Cheaper for long sides.
            Grouped maps keep both.
    """

    kind: Kind = "mc"
    decay: float = 0.95
    factors: int | None = None
    inverses: int | None = None
    examples: int | None = 512
    sharing: Sharing = "expand"
    largest: int | None = 8192
    sides: Sides = "both"
    by_layer = True

    def __post_init__(self) -> None:
        check_kind(self.kind)
        check_decay(self.decay)
        Refresh(self.factors)
        Refresh(self.inverses)
        check_sharing(self.sharing)
        check_examples(self.examples)
        check_largest(self.largest)
        check_sides(self.sides)

    def start(self, parameters: Mapping[str, nn.Parameter]) -> Estimate:
        """An estimate for the parameters that a rule of the tape covers."""
        return _KFACEstimate(self, parameters)


class _KFACEstimate(FactorEstimate):
    def __init__(self, metric: KFAC, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(
            parameters, metric.decay, metric.examples, metric.sharing, metric.largest, metric.sides
        )
        self.kind = metric.kind
        self._inverses: dict[str, FactoredInverse | None] = {}
        self._observing = Refresh(metric.factors)
        self._inverting = Refresh(metric.inverses, longest=10)
        self._root_damping: float | None = None

    def due(self, step: int) -> bool:
        return self._observing.due(step)

    def expect_small_steps(self) -> None:
        self._observing.longest = self._inverting.longest = SMALL_STEPS

    def observe(self, observation: Observation) -> None:
        for _ in self._feed(observation):
            pass
        self._observing.took(observation.step)
        self._observing.observed(self._sums())

    def _added(self, weight: str) -> None:
        self._inverses[weight] = None

    def operator(self) -> LinearOperator:
        if self._empty:
            raise StepError("no factor was observed yet: run a forward pass and the loss before step()")
        return self._with_diagonal([_product(factors) for factors in self._blocks.values()])

    def solve(self, gradient: Mapping[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        if self._empty:
            raise StepError("no factor was observed yet: run a forward pass and the loss before step()")
        if self._inverting.due(step):
            self._invert(damping, step)
        for weight, inverse in self._inverses.items():
            if inverse is None:
                self._inverses[weight] = self._inverse(weight, damping)
        return self._solved(gradient, damping, self._inverses)

    def attempt(self, gradient: Mapping[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        inverses = {weight: self._inverse(weight, damping) for weight in self._blocks}
        return self._solved(gradient, damping, inverses)

    def _solved(
        self, gradient: Mapping[str, Tensor], damping: float, inverses: Mapping[str, FactoredInverse | None]
    ) -> dict[str, Tensor]:
        direction = self._entrywise(gradient, damping)
        for weight, inverse in inverses.items():
            given = self._padded(self._blocks[weight].block, gradient)
            if given and inverse is not None:
                direction |= inverse.solve(given)
        return direction

    def _inverse(self, weight: str, damping: float) -> FactoredInverse:
        factors = self._blocks[weight]
        A, G = factors.averages()
        return FactoredInverse(
            factors.space, A, G, self.damping_of(damping, _mean_eigenvalue(A, G)), **factors.layout
        )

    def _invert(self, damping: float, step: int) -> None:
        self.stages = {}
        for weight, factors in self._blocks.items():
            inverse = self._inverses[weight]
            if inverse is None:
                inverse = self._inverses[weight] = self._inverse(weight, damping)
            else:
                A, G = factors.averages()
                inverse.refresh(A, G, self.damping_of(damping, _mean_eigenvalue(A, G)))
            stages = {side: s.value for side, s in inverse.stages.items() if s is not Stage.CHOLESKY}
            if stages:
                self.stages[weight] = stages
        self._inverting.took(step)
        old, self._root_damping = self._root_damping, math.sqrt(damping)
        moved = abs(self._root_damping / old - 1.0) if old else 0.0
        self._inverting.observed(self._sums(), moved / 4)

    def state_dict(self) -> dict[str, Any]:
        inverses = {w: None if i is None else (i.A_inverse, i.G_inverse) for w, i in self._inverses.items()}
        return {
            "blocks": {w: f.state_dict() | {"inverse": inverses[w]} for w, f in self._blocks.items()},
            "squares": self._squares.state_dict(),
            "observing": self._observing.state_dict(),
            "inverting": self._inverting.state_dict(),
            "root_damping": self._root_damping,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._blocks, self._inverses = {}, {}
        for weight, saved in state["blocks"].items():
            factors = self._factors(Block(**saved["block"]))
            factors.load_state_dict(saved)
            if saved["inverse"] is not None:
                identity_A, identity_G = map(_identity, saved["inverse"])
                inverse = FactoredInverse(factors.space, identity_A, identity_G, 0.0, **factors.layout)
                inverse.A_inverse.copy_(saved["inverse"][0])
                inverse.G_inverse.copy_(saved["inverse"][1])
                self._inverses[weight] = inverse
        self._squares.load_state_dict(state["squares"])
        self._observing.load_state_dict(state["observing"])
        self._inverting.load_state_dict(state["inverting"])
        self._root_damping = state["root_damping"]


def _product(factors: Factors) -> LinearOperator:
    """A ⊗ G of one block; in the eigenbasis of the other factor where one is a diagonal."""
    A, G = factors.averages()
    if A.ndim > 1 and G.ndim > 1:
        return Kronecker(factors.space, A, G, **factors.layout)
    (a, U_A), (g, U_G) = (
        (factor, None)
        if factor.ndim == 1
        else eigendecomposition(factor, layer=factors.space.label, factor=side)
        for factor, side in ((A, "A"), (G, "G"))
    )
    return EigenKronecker(factors.space, U_A, U_G, g[:, None] * a, **factors.layout)


def _mean_eigenvalue(A: Tensor, G: Tensor) -> Tensor:
    """That of A ⊗ G, over all groups."""
    a, g = ((t if t.ndim == 1 else t.diagonal(dim1=-2, dim2=-1)).mean(-1) for t in (A, G))
    return (a * g).mean()


def _identity(like: Tensor) -> Tensor:
    if like.ndim == 1:
        return torch.ones_like(like)
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)
