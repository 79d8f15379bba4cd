"""What a study of two parametrisations came to: paths, distances, and the loss under them. It goes to JSON and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from natgrad.lab.formats import number, power
from natgrad.lab.runs import Record

Point = tuple[float, float]


@dataclass(frozen=True)
class Paths:
    """One method's paths from the two parametrisations in the common chart, and how far apart they get."""

    first: list[Point]
    second: list[Point]
    distance: float


@dataclass(frozen=True)
class Chart:
    """The loss on a grid of the common chart: ``loss[row of y][column of x]``."""

    x: list[float]
    y: list[float]
    loss: list[list[float]]


@dataclass(frozen=True)
class Study:
    """One model in two coordinate systems.

    Attributes:
        name: used for files.
        title: what the model is.
        coordinates: the two parametrisations.
        axes: what the chart's axes are.
        chart: the loss over the chart; None for a model with more than two parameters.
        optimum: where the chart's loss is least; None without a chart.
        gradient, natural: the paths of the two methods.
        distance_unit: what their distances are measured in, the same for both methods.
        note: what else the numbers say.
    """

    name: str
    title: str
    coordinates: tuple[str, str]
    axes: tuple[str, str]
    chart: Chart | None
    optimum: Point | None
    gradient: Paths
    natural: Paths
    distance_unit: str
    note: str

    def sentence(self) -> str:
        """The numbers, in words."""
        return (
            f"gradient descent’s two paths part by {number(self.gradient.distance)} {self.distance_unit}, "
            f"the natural gradient’s by {power(self.natural.distance)}"
        )


def studies_from(record: Record) -> list[Study]:
    """The studies of ``coordinates.json``, the inverse of `dataclasses.asdict`."""
    studies = []
    for stored in record["studies"]:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        values["chart"] = None if stored["chart"] is None else Chart(**stored["chart"])
        for method in ("gradient", "natural"):
            paths = dict(stored[method])
            for which in ("first", "second"):
                paths[which] = [(float(x), float(y)) for x, y in paths[which]]
            values[method] = Paths(**paths)
        studies.append(Study(**values))
    return studies


def grid(low: float, high: float, count: int) -> list[float]:
    """Evenly spaced values, both ends included."""
    values: list[float] = torch.linspace(low, high, count, dtype=torch.float64).tolist()
    return values
