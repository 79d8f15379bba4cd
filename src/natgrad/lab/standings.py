"""What each optimiser of a race reached: pure functions of what was recorded.

Times to target are interpolated between evaluations, linearly in the logarithm of the excess. Over seeds the median
counts; a run that never got there counts as infinitely late, so a median over seeds stays honest.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from natgrad.lab.runs import Record, Run


@dataclass(frozen=True)
class Spread:
    """Median and range over seeds; infinite where the target was not reached."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Curve:
    """A quantity over steps or seconds: median over seeds with the range around it."""

    x: tuple[float, ...]
    median: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Standing:
    """One optimiser of the race, over its seeds.

    Attributes:
        label, ours, rate: as in the race.
        tuned: True where the rate was chosen by a grid.
        edge: True where the best rate is still the least or greatest that was tried.
        runs: its runs at that rate, by seed.
        trials: rate → excess at the end on the first seed (infinite where it diverged); empty without a grid.
        steps, seconds: to the target; None where there is no target.
        each: seconds per step.
        excess: at the end of the run.
        score: first of the problem's scores on the test set at the end, or None.
        trouble: what went wrong in some run, or "".
    """

    label: str
    ours: bool
    rate: float | None
    tuned: bool
    edge: bool
    runs: tuple[Run, ...]
    trials: dict[float, float]
    steps: Spread | None
    seconds: Spread | None
    each: float
    excess: Spread
    score: float | None
    trouble: str

    def against(self, quantity: str, points: int = 160) -> Curve:
        """Excess against ``"step"`` or ``"seconds"``."""
        series = [[(float(e[quantity]), float(e["excess"])) for e in run.evaluations] for run in self.runs]
        return _over_seeds([s for s in series if s], points if quantity == "seconds" else 0)

    def trace(self, key: str) -> Curve | None:
        """What `key` of the step records (``"damping"``, ``"alpha"``, ``"momentum"``, ``"rho"``) did over the steps."""
        series = [[(float(r["step"]), float(r[key])) for r in run.steps if key in r] for run in self.runs]
        series = [s for s in series if s]
        return _over_seeds(series, 0) if series else None


def time_to(run: Run, target: float) -> tuple[float, float]:
    """Steps and seconds after which a run's excess first was at or below the target; infinite if it never was."""
    before: Record | None = None
    for now in run.evaluations:
        excess = float(now["excess"])
        if excess <= target:
            if before is None:
                return float(now["step"]), float(now["seconds"])
            share = _share(float(before["excess"]), excess, target)
            step = before["step"] + share * (now["step"] - before["step"])
            return float(math.ceil(step - 1e-9)), before["seconds"] + share * (
                now["seconds"] - before["seconds"]
            )
        before = now
    return math.inf, math.inf


def _share(before: float, after: float, target: float) -> float:
    """How far between two evaluations the target was crossed, in the logarithm where that exists."""
    if after > 0:
        return math.log(before / target) / math.log(before / after)
    return (before - target) / (before - after)


def standing_of(entrant: Record, race: Record, runs: list[Run]) -> Standing | None:
    """An entrant's standing from its runs; None where none of them has been evaluated."""
    rate, target = entrant["rate"], race.get("target")
    ours = sorted(
        (r for r in runs if r.config["rate"] == rate and r.evaluations), key=lambda r: r.config["seed"]
    )
    if not ours:
        return None
    trials: dict[float, float] = {}
    if entrant["grid"]:
        first = race["seeds"][0]
        trials = {r.config["rate"]: _end(r) for r in runs if r.config["seed"] == first and r.evaluations}
    steps = seconds = None
    if target is not None:
        reached = [time_to(run, target) for run in ours]
        steps, seconds = Spread.of([r[0] for r in reached]), Spread.of([r[1] for r in reached])
    score = None
    if race.get("scores"):
        key = f"test_{race['scores'][0]}"
        scores = [float(r.evaluations[-1][key]) for r in ours if key in r.evaluations[-1]]
        score = statistics.median(scores) if scores else None
    bad = [r for r in ours if r.status in ("diverged", "failed")]
    trouble = "" if not bad else f"{bad[0].status} at step {bad[0].result['step']}" if bad[0].result else ""
    if bad and len(ours) > 1:
        trouble += f" on {len(bad)} of {len(ours)} seeds"
    return Standing(
        label=entrant["label"], ours=entrant["ours"], rate=rate, tuned=bool(trials),
        edge=bool(trials) and rate in (min(trials), max(trials)),
        runs=tuple(ours), trials=trials, steps=steps, seconds=seconds,
        each=statistics.median([_each(r) for r in ours]), excess=Spread.of([_end(r) for r in ours]),
        score=score, trouble=trouble,
    )  # fmt: skip


def _end(run: Run) -> float:
    excess = float(run.evaluations[-1]["excess"])
    return excess if math.isfinite(excess) and run.status != "diverged" else math.inf


def _each(run: Run) -> float:
    return run.steps[-1]["seconds"] / run.steps[-1]["step"] if run.steps else math.nan


def rank(standing: Standing) -> tuple[float, float]:
    """Sorts by seconds to target, then by the excess at the end."""
    return (math.inf if standing.seconds is None else standing.seconds.median, standing.excess.median)


def median(standing: Standing, quantity: str) -> float:
    """Median ``"steps"`` or ``"seconds"`` to target; infinite where it was not reached or there is none."""
    spread = standing.steps if quantity == "steps" else standing.seconds
    return math.inf if spread is None else spread.median


def length(standing: Standing, quantity: str) -> float:
    """How long the shortest run of a standing lasted: what runs without success prove.

    A run that diverged will never get there, so it proves as much as one without end.
    """
    key = "step" if quantity == "steps" else "seconds"
    lasted = [float(run.evaluations[-1][key]) for run in standing.runs if run.status != "diverged"]
    return min(lasted, default=math.inf)


def _over_seeds(series: list[list[tuple[float, float]]], points: int) -> Curve:
    """Median and range over seeds: on the x that all share, or on `points` x spread over the span that all cover."""
    if len(series) == 1 or not points:
        shared = set.intersection(*({x for x, _ in s} for s in series))
        columns = {x: [] for x in sorted(shared)}  # type: dict[float, list[float]]
        for s in series:
            for x, y in s:
                if x in columns:
                    columns[x].append(y)
    else:
        end = min(s[-1][0] for s in series)
        columns = {end * i / (points - 1): [] for i in range(points)}
        for s in series:
            for x in columns:
                columns[x].append(_interpolated(s, x))
    spreads = [Spread.of(values) for values in columns.values()]
    return Curve(
        tuple(columns),
        tuple(s.median for s in spreads),
        tuple(s.low for s in spreads),
        tuple(s.high for s in spreads),
    )


def _interpolated(series: list[tuple[float, float]], x: float) -> float:
    """The value at x between two records: geometric where both are positive, else linear."""
    right = min(max(bisect_left(series, (x, -math.inf)), 1), len(series) - 1) if len(series) > 1 else 0
    if right == 0:
        return series[0][1]
    (x0, y0), (x1, y1) = series[right - 1], series[right]
    share = 0.0 if x1 == x0 else (x - x0) / (x1 - x0)
    if y0 > 0 and y1 > 0:
        return math.exp(math.log(y0) + share * (math.log(y1) - math.log(y0)))
    return y0 + share * (y1 - y0)
