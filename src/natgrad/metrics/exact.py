"""The exact Fisher information, in the representation that suits the numbers of rows and of parameters."""

from __future__ import annotations

from dataclasses import dataclass

from natgrad.metrics.rowmetric import RowMetric
from natgrad.operators import FactoredRows, Gram, Rectangular, RowOperator, Sketched

# Up to so many parameters the singular values of J take less than half a second (two cores).
RECTANGULAR = 768
# With fewer rows than parameters an equation is met at its points anyhow, and the last digits matter less than time.
FEW = 256
# J is formed up to so many numbers.
JACOBIAN = 2**24
# JJᵀ [M, M], or F [P, P] where that is smaller, is formed up to such a side.
GRAM = 16384


@dataclass(frozen=True)
class Exact(RowMetric):
    """F = JᵀJ of the present batch, exactly; how it is solved with is chosen by size.

    | chosen | where |
    |---|---|
    | "rectangular" | J [M, P] is small, P ≤ 768 and P ≤ M: its singular values, so that nothing is squared |
    | "gram" | the fewer of rows and parameters are at most 16,384: Cholesky of JJᵀ, layer by layer, or of JᵀJ |
    | "sketched" | both are many: conjugate gradients, guided by a sketch of JJᵀ as large as the damping asks for |

    For the last, 20,000 rows of a perceptron with 49,466 parameters, λ a millionth of the largest eigenvalue: 3.8 s
    for a least-squares step and 5.1 s for a gradient's, to 2e-12; conjugate gradients alone take 13.4 s, and where they
    end for lack of progress after 5.1 s, the step is off by 8 % (float64, two cores).

    Which it was stands in `optimizer.info.solver`. Rows of different steps don't join, so there is no average.

    Attributes:
        kind: the signals: every output column ("exact"), sampled from the model ("mc"), or real gradients
            ("empirical").
    """

    def operator(self, rows: FactoredRows) -> RowOperator:
        """Solves through whichever is chosen."""
        return operator_by_size(rows)


def operator_by_size(rows: FactoredRows) -> RowOperator:
    """The exact operator that suits so many rows and parameters."""
    count, size = len(rows), rows.space.numel
    if count * size <= JACOBIAN and (size <= min(count, RECTANGULAR) or min(count, size) <= FEW):
        return Rectangular(rows)
    if min(count, size) <= GRAM:
        return Gram(rows)
    return Sketched(rows)
