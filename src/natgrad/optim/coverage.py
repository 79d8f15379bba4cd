"""Which rule covers which parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class CoverageRow:
    """One parameter.

    Attributes:
        name: the parameter's name in the model.
        shape: its shape.
        metric: the metric of its group.
        rule: the rule that covers it ("linear", "conv2d", …), "fallback", or "not seen" before a curvature pass.
        factors: the sides of its Kronecker factors (A, G), or None.
        diagonal: whether A, and G, is kept as its diagonal alone.
        reason: why it takes the fallback, or an empty string.
    """

    name: str
    shape: tuple[int, ...]
    metric: str
    rule: str
    factors: tuple[int, int] | None = None
    reason: str = ""
    diagonal: tuple[bool, bool] = (False, False)


@dataclass(frozen=True)
class Coverage:
    """The rows of all parameters; printing it gives a table."""

    rows: tuple[CoverageRow, ...]

    def __iter__(self) -> Iterator[CoverageRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def uncovered(self) -> tuple[str, ...]:
        """Names of the parameters that take the fallback."""
        return tuple(row.name for row in self.rows if row.rule == "fallback")

    def __str__(self) -> str:
        header = ("parameter", "shape", "metric", "rule", "factors")
        body = [
            (
                row.name,
                "×".join(map(str, row.shape)) or "scalar",
                row.metric,
                row.rule + (f" ({row.reason})" if row.reason else ""),
                ""
                if row.factors is None
                else " + ".join(
                    f"{n}" if alone else f"{n}²" for n, alone in zip(row.factors, row.diagonal, strict=True)
                ),
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in (header, *body)) for i in range(len(header))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in (header, *body)
        )
