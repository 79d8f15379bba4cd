"""EKFAC: K-FAC's eigenbasis, with the eigenvalues that are right for it.

George et al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis" (arXiv 1806.03884):
in the eigenbasis U_G ⊗ U_A of K-FAC's A ⊗ G, the diagonal S = E[(U_Gᵀ ∇W U_A)²] of F is the best choice of eigenvalues
in Frobenius norm (their §3.2), whereas K-FAC's products of eigenvalues are one choice among others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.errors import StepError
from natgrad.linalg import eigendecomposition
from natgrad.metrics.base import Estimate, Kind, Metric, Observation, check_decay, check_kind, check_power
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
from natgrad.metrics.layers import Layer, columns_of
from natgrad.metrics.refresh import SMALL_STEPS, Refresh
from natgrad.metrics.squares import add_squares
from natgrad.operators import EigenKronecker, LinearOperator
from natgrad.tape.elements import ElementColumns
from natgrad.tape.records import Block

# `natgrad.fisher` keeps inputs and signals of the first sweep, up to so many bytes, to save the second one.
KEPT_BYTES = 2**28
# Eigenvectors suffer from the noise of sums more than a damped inverse does: of A and G more rows, and more sets.
POSITIONS, SETS = 8, 32
# Tempered, a period is at most a 16th of the average's age: each step is looked at until step 32.
TEMPERED_YOUTH = 16
# Tempered, at most so many positions for each of `examples` are looked at, for S too: steps are small and many, so that
# looks add up.
TEMPERED_POSITIONS = 4
# Tempered, S of each word gets so much of all words' mean.
SMOOTHING = 0.1
# Tempered, so many sums of scores with random signs stand for all of them.
TEMPERED_SUMS = 8


@dataclass(frozen=True)
class EKFAC(Metric):
    """F ≈ blockdiag((U_G ⊗ U_A) diag(S) (U_G ⊗ U_A)ᵀ): K-FAC's eigenbasis, and F's diagonal in it.

    Its trace is F's, and it is at least as near to F in Frobenius norm as K-FAC is, layer by layer. Scores are summed
    over positions that share a weight before they are squared, so that both hold there too.

    The optimiser averages A and G as K-FAC does, and S in the present basis. When the basis is renewed, what S has
    from earlier steps is re-expressed as the diagonal of the old operator in the new basis, which keeps its trace
    and its horizon; the present step's part is computed in the new basis.

    Attributes:
        kind: the signals: sampled from the model ("mc"), every output column ("exact"), real gradients ("empirical"),
            or random signs times a root of the outputs' Fisher information ("rademacher").
        decay: ε of the running averages.
        factors: observe the factors and S every so many steps; adapted to how fast the factors move if None.
        refresh: renew the eigenbasis every so many steps; adapted likewise if None.
        examples: at most so many examples of a batch are looked at, evenly spaced. Where positions share a weight A
            and G are made of about eight times as many rows, as in `KFAC`; with a power of less than 1 no more than
            four times as many positions are looked at, and with factors of scores eight sums of scores with random
            signs stand for all of these. None for all.
        sharing: which factors give the basis, as in `KFAC`.
        largest: a side of more numbers has no basis but the coordinates; None for no bound.
        sides: the sides that have a basis: "both", the "inputs" or the "outputs" alone, as in `KFAC`.
        power: p, where Δ = −(F̂ + λI)⁻ᵖ ∇h: 1 for the natural gradient, 0 for the gradient. Amari et al. 2021 (arXiv
            2006.10732) interpolate so; ½ is what Adam does with its own second moments. F̂ itself is the same for all p.
    """

    kind: Kind = "mc"
    decay: float = 0.95
    factors: int | None = None
    refresh: int | None = None
    examples: int | None = 512
    sharing: Sharing = "expand"
    largest: int | None = 8192
    power: float = 1.0
    sides: Sides = "both"
    by_layer = True

    def __post_init__(self) -> None:
        check_kind(self.kind)
        check_decay(self.decay)
        Refresh(self.factors)
        Refresh(self.refresh)
        check_sharing(self.sharing)
        check_examples(self.examples)
        check_largest(self.largest)
        check_sides(self.sides)
        check_power(self.power)

    def start(self, parameters: Mapping[str, nn.Parameter]) -> Estimate:
        """An estimate for the parameters that a rule of the tape covers."""
        return _EKFACEstimate(self, parameters)


@dataclass
class _Eigen:
    """One block's basis and the running sum behind S, with an axis for the groups: [groups, ...]."""

    U_A: Float[Tensor, "groups i i"] | None
    U_G: Float[Tensor, "groups o o"] | None
    total: Float[Tensor, "groups o i"]

    def turn(self, U_A: Tensor | None, U_G: Tensor | None) -> None:
        """Takes a new basis, and S as the old operator's diagonal in it: (R_G²) S (R_A²)ᵀ with R = Uᵀ_new U_old."""
        if U_G is not None and self.U_G is not None:
            self.total = (U_G.mT @ self.U_G).square_() @ self.total
        if U_A is not None and self.U_A is not None:
            self.total = self.total @ (U_A.mT @ self.U_A).square_().mT
        self.U_A, self.U_G = U_A, U_G


@dataclass
class _Kept:
    """What one block did in some passes of a micro-batch, or sums of its scores, kept until its basis is known."""

    factors: Factors
    shown: Layer | ElementColumns | Tensor
    numerator: float


class _EKFACEstimate(FactorEstimate):
    def __init__(self, metric: EKFAC, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(
            parameters,
            metric.decay,
            metric.examples,
            metric.sharing,
            metric.largest,
            metric.sides,
            positions=POSITIONS,
            sets=SETS,
            thin=TEMPERED_POSITIONS if metric.tempered else None,
            scores=TEMPERED_SUMS if metric.tempered else None,
        )
        self.kind, self._power = metric.kind, metric.power
        self._eigen: dict[str, _Eigen] = {}
        # Tempered steps are small, so that little moves between two looks; 20 steps between them cost accuracy,
        # and so does missing some of the first: see docs/architecture.md.
        if metric.tempered:
            self._observing = Refresh(metric.factors, longest=10, youth=TEMPERED_YOUTH)
        else:
            self._observing = Refresh(metric.factors)
        self._turning = Refresh(metric.refresh, longest=20)
        self._kept: list[_Kept] = []
        self._bytes = 0
        self._second = False

    def due(self, step: int) -> bool:
        return self._observing.due(step)

    def expect_small_steps(self) -> None:
        self._observing.longest = self._turning.longest = SMALL_STEPS

    def observe(self, observation: Observation) -> None:
        due = self._turning.due(observation.step)
        kept: dict[tuple[str, bool], _Kept] = {}
        for fed in self._feed(observation, factors_too=not self._second):
            weight = fed.factors.block.weight
            eigen = self._eigen.get(weight)
            if eigen is not None and fed.decay != 1.0:
                eigen.total.mul_(fed.decay)
            if eigen is not None and (self._second or not due):
                add_squares(eigen.total, fed.shown, eigen.U_A, eigen.U_G, fed.numerator)
            elif self._keep(fed.shown, observation.again):
                key = weight, isinstance(fed.shown, ElementColumns)
                shown = _joined(kept[key].shown, fed.shown) if key in kept else fed.shown
                kept[key] = _Kept(fed.factors, shown, fed.numerator)
        if self.sweeps == 1:
            self._kept += kept.values()
        if not self._second:
            self._observing.took(observation.step)
            self._observing.observed(self._sums())

    def _keep(self, shown: Layer | ElementColumns | Tensor, again: bool) -> bool:
        """Whether to keep what a block did until its basis is known; all goes where the data can be shown again."""
        if isinstance(shown, Tensor):
            signals = [shown]
        elif isinstance(shown, Layer):
            signals = [t for use in shown.uses for t in columns_of(use)]
        else:
            signals = [t for one in shown.signals for t in one]
        self._bytes += sum(t.numel() * t.element_size() for t in signals)
        if again and self._bytes > KEPT_BYTES:
            self.sweeps, self._kept = 2, []
        return self.sweeps == 1

    def next_sweep(self) -> None:
        self._turn(self._blocks)
        self._second = True

    def _added(self, weight: str) -> None:
        pass  # its basis comes when its factors are whole

    def _turn(self, weights: Iterable[str]) -> None:
        """The eigenbasis of the present factors of some blocks, with what S has re-expressed in it."""
        for weight in weights:
            factors = self._blocks[weight]
            (A, G), layer = factors.averages(), factors.space.label
            U_A, U_G = (
                None
                if matrix.ndim == 1
                else eigendecomposition(matrix, layer=layer, factor=side)[1].reshape(-1, *matrix.shape[-2:])
                for side, matrix in (("A", A), ("G", G))
            )
            if weight in self._eigen:
                self._eigen[weight].turn(U_A, U_G)
            else:
                total = A.new_zeros(factors.block.groups, G.shape[-1], A.shape[-1])
                self._eigen[weight] = _Eigen(U_A, U_G, total)

    def _settle(self, step: int | None = None) -> None:
        """Renews the basis where records wait for it, and adds their squares."""
        if not self._kept:
            return
        self._turn({kept.factors.block.weight: None for kept in self._kept})
        for kept in self._kept:
            eigen = self._eigen[kept.factors.block.weight]
            add_squares(eigen.total, kept.shown, eigen.U_A, eigen.U_G, kept.numerator)
        self._kept, self._bytes = [], 0
        if step is not None:
            self._turning.took(step)
            self._turning.observed(self._sums())

    def _block(self, weight: str) -> EigenKronecker:
        eigen, factors = self._eigen[weight], self._blocks[weight]
        S = eigen.total / factors.examples
        return EigenKronecker(factors.space, eigen.U_A, eigen.U_G, S, **factors.layout)

    def operator(self) -> LinearOperator:
        self._settle()
        if self._empty:
            raise StepError("no eigenvalue was observed yet: run a forward pass and the loss before step()")
        return self._with_diagonal([self._block(weight) for weight in self._eigen])

    def solve(self, gradient: Mapping[str, Tensor], damping: float, step: int) -> dict[str, Tensor]:
        self._settle(step)
        if self._empty:
            raise StepError("no eigenvalue was observed yet: run a forward pass and the loss before step()")
        direction = self._entrywise(gradient, damping, self._power)
        for weight in self._eigen:
            given = self._padded(self._blocks[weight].block, gradient)
            if given:
                block = self._block(weight)
                if self._power < 1.0:
                    block = _smoothed(block)
                own = self.damping_of(damping, block.values.mean())
                direction |= dict(block.power(-self._power, own) @ given)
        return direction

    def squared_length(self, direction: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> float:
        if self._power == 1.0:
            return super().squared_length(direction, gradient)
        operator = self.operator()
        moved = {name: direction[name] for name in operator.space.names if name in direction}
        return float(operator.restrict(moved).inner(moved, moved))

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return {
            "blocks": {w: f.state_dict() for w, f in self._blocks.items()},
            "eigen": {w: (e.U_A, e.U_G, e.total) for w, e in self._eigen.items()},
            "squares": self._squares.state_dict(),
            "observing": self._observing.state_dict(),
            "turning": self._turning.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._blocks, self._kept, self._bytes = {}, [], 0
        for saved in state["blocks"].values():
            self._factors(Block(**saved["block"])).load_state_dict(saved)
        self._eigen = {}
        for weight, (U_A, U_G, total) in state["eigen"].items():
            U_A, U_G = (None if U is None else U.clone() for U in (U_A, U_G))
            self._eigen[weight] = _Eigen(U_A, U_G, total.clone())
        self._squares.load_state_dict(state["squares"])
        self._observing.load_state_dict(state["observing"])
        self._turning.load_state_dict(state["turning"])


def _smoothed(block: EigenKronecker) -> EigenKronecker:
    """With a part of S's mean along each side that has no basis but the coordinates, such as a vocabulary.

    What words of which no look has seen a thing get is 0 in S, or next to it, and nothing else would bound their steps.
    """
    coordinates = [axis for U, axis in ((block.U_A, -1), (block.U_G, -2)) if U is None]
    if not coordinates:  # as most: no new operator in each step
        return block
    return replace(
        block,
        values=sum((SMOOTHING * block.values.mean(axis, keepdim=True) for axis in coordinates), block.values),
    )


def _joined(
    before: Layer | ElementColumns | Tensor, more: Layer | ElementColumns | Tensor
) -> Layer | ElementColumns | Tensor:
    """One use with the signals of both."""
    if isinstance(before, Layer):
        assert isinstance(more, Layer)
        return before.with_passes_of(more)
    if isinstance(before, Tensor):
        assert isinstance(more, Tensor)
        return torch.cat((before, more), 1)
    assert isinstance(more, ElementColumns)
    return before.with_passes_of(more)
