"""The exact Fisher information of many examples and many parameters, through a sketch of their Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass

from natgrad.metrics.rowmetric import RowMetric
from natgrad.operators import FactoredRows
from natgrad.operators import Sketched as SketchedOperator
from natgrad.operators.sketched import check_sketch


@dataclass(frozen=True)
class Sketched(RowMetric):
    """F = JᵀJ of the present batch, solved by conjugate gradients on JJᵀ + λI that a Nyström sketch of JJᵀ guides.

    The sketch's rank follows the damping, so that the iterations stay few; neither J nor JJᵀ is formed. Rows of
    different steps don't join, so there is no average over steps.

    Attributes:
        kind: the signals: every output column ("exact"), sampled from the model ("mc"), or real gradients
            ("empirical").
        rank: of the first sketch; it is doubled where the damping asks for more.
        largest: the most that the rank is raised to. The sketch takes 3 · rank numbers for each row.
        iterations: the most of a solution; 0 to take the sketch for the matrix itself.
        tolerance: of solutions, relative to the right-hand side; by default ε^¾, 2e-12 in float64.

    Source: Frangella, Tropp & Udell 2023, "Randomized Nyström preconditioning", arXiv 2110.02820.
    """

    rank: int = 32
    largest: int = 1024
    iterations: int = 1000
    tolerance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sketch(self.rank, self.largest, self.iterations, self.tolerance)

    def operator(self, rows: FactoredRows) -> SketchedOperator:
        """Solves by iteration through a sketch of JJᵀ."""
        return SketchedOperator(rows, self.rank, self.largest, self.iterations, self.tolerance)
