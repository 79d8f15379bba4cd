"""What a race says: its headline, the remarks that a reader needs to weigh it, and its table. All of it plain text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from natgrad.errors import RunError
from natgrad.lab.formats import duration, listed, number
from natgrad.lab.runs import Record, Run
from natgrad.lab.standings import Spread, Standing, length, median, rank, standing_of


@dataclass(frozen=True)
class Summary:
    """A race in numbers: its record, its standings (natgrad's first, then by time to target), its sentences."""

    race: Record
    standings: tuple[Standing, ...]
    headline: str
    remarks: tuple[str, ...]

    @property
    def best_peer(self) -> Standing | None:
        """The peer that reached the target soonest, or came nearest."""
        return min((s for s in self.standings if not s.ours), key=rank, default=None)

    def ratio(self, standing: Standing, quantity: str) -> str:
        """`standing`'s steps or seconds to target ÷ the best peer's, as text: ``"0.27"``, ``"< 0.4"``, ``"–"``."""
        return ratio_text(*self._pair(standing, quantity))

    def _pair(self, standing: Standing, quantity: str) -> tuple[float, float, float, float]:
        peers = [s for s in self.standings if not s.ours]
        if not peers or standing.steps is None:
            return math.inf, 0.0, math.inf, 0.0
        theirs = min(median(s, quantity) for s in peers)
        return (
            median(standing, quantity),
            length(standing, quantity),
            theirs,
            min(length(s, quantity) for s in peers),
        )


def ratio_text(mine: float, my_length: float, theirs: float, their_length: float) -> str:
    """A ratio of times to target, or the bound that the lengths of the runs allow where one side never got there."""
    if math.isfinite(mine) and math.isfinite(theirs):
        return number(mine / theirs) if theirs > 0 else "–"
    if math.isfinite(mine) and their_length > 0:
        return f"< {number(mine / their_length)}"
    if math.isfinite(theirs) and theirs > 0:
        return f"> {number(my_length / theirs)}"
    return "–"


def measure(race: Record) -> str:
    """What the race was measured by: the excess of the loss, or an error."""
    return str(race.get("measure", "excess"))


def noun(race: Record) -> str:
    """The measure in one word: excess, error, …"""
    words = measure(race).split()
    return next((word for word in words if word in ("excess", "error")), words[0])


def titled(race: Record, joint: str = " in ") -> str:
    """The measure with its unit, as a heading or a label begins."""
    unit = f"{joint}{race['unit']}" if race["unit"] else ""
    return f"{measure(race)[0].upper()}{measure(race)[1:]}{unit}"


def amount(race: Record, value: float) -> str:
    """An excess of 0.01 nats per image; a relative L2 error of 10⁻⁵."""
    article = "an" if measure(race)[0] in "aeiou" else "a"
    return f"{article} {measure(race)} of {number(value)} {race['unit']}".rstrip()


def summarise(race: Record, runs: Sequence[Run]) -> Summary:
    """Puts a race's runs together.

    Raises:
        RunError: no run has been evaluated yet.
    """
    standings = []
    for entrant in race["entrants"]:
        standing = standing_of(
            entrant, race, [r for r in runs if r.config.get("optimizer") == entrant["name"]]
        )
        if standing is not None:
            standings.append(standing)
    if not standings:
        raise RunError("no run of this race has been evaluated yet; run `natgrad race` first")
    standings.sort(key=lambda s: (not s.ours, *rank(s)))
    return Summary(race, tuple(standings), _headline(race, standings), tuple(_remarks(race, standings, runs)))


def _headline(race: Record, standings: list[Standing]) -> str:
    """One sentence: who won, by how much. It says so as plainly when natgrad loses."""
    ours = min((s for s in standings if s.ours), key=rank, default=None)
    peer = min((s for s in standings if not s.ours), key=rank, default=None)
    target = race.get("target")
    lead = min(standings, key=rank)
    if target is None or not any(math.isfinite(median(s, "seconds")) for s in standings):
        end = min(standings, key=lambda s: s.excess.median)
        none = "" if target is None else f"Nobody reached {amount(race, target)}. "
        last = f"{number(end.excess.median)} {race['unit']}".rstrip()
        return f"{none}The lowest {measure(race)} at the end is {_who(end)}’s: {last}."
    goal = amount(race, target)
    if ours is None or peer is None:
        first = f"{_who(lead)} reached {goal} in {duration(median(lead, 'seconds'))}"
        return f"{first} and {_count(median(lead, 'steps'))}."
    mine, theirs = median(ours, "seconds"), median(peer, "seconds")
    if not math.isfinite(mine):
        tail = f"natgrad did not within {duration(length(ours, 'seconds'))}"
        return f"natgrad lost: {_who(peer)} reached {goal} in {duration(theirs)}; {tail}."
    if not math.isfinite(theirs):
        rest = [s for s in standings if not s.ours]
        spent = duration(min(length(s, "seconds") for s in rest))
        steps = _count(min(length(s, "steps") for s in rest))
        reached = f"{duration(mine)} and {_count(median(ours, 'steps'))}"
        return f"{_who(ours)} reached {goal} in {reached}; no peer did within its {steps} ({spent})."
    if 0.95 <= mine / theirs <= 1.05:
        return f"{_who(ours)} and {_who(peer)} are level: both reached {goal} in about {duration(theirs)}."
    if mine < theirs:
        times = f"{duration(mine)} against {duration(theirs)}"
        return f"{_who(ours)} reached {goal} {_times(theirs / mine)} sooner than {_who(peer)}: {times}."
    times = f"{duration(theirs)} against {duration(mine)}"
    return f"natgrad lost: {_who(peer)} reached {goal} {_times(mine / theirs)} sooner, in {times}."


def _remarks(race: Record, standings: list[Standing], runs: Sequence[Run]) -> list[str]:
    """What a reader must know to weigh the headline."""
    remarks = []
    ours = min((s for s in standings if s.ours), key=rank, default=None)
    peers = [s for s in standings if not s.ours]
    if ours is not None and peers and race.get("target") is not None:
        quickest = min(peers, key=lambda s: median(s, "steps"))
        mine, theirs = median(ours, "steps"), median(quickest, "steps")
        if math.isfinite(mine) and math.isfinite(theirs) and mine > 0 < theirs:
            factor = (
                f"{_times(max(mine, theirs) / min(mine, theirs))} {'fewer' if mine <= theirs else 'more'}"
            )
            remarks.append(
                f"In steps: {_count(mine)} against {_count(theirs)} of {_who(quickest)}, {factor}."
            )
        cheapest = min(peers, key=lambda s: s.each)
        remarks.append(
            f"A step of natgrad took {duration(ours.each)}, {number(ours.each / cheapest.each)}× as long as "
            f"{_who(cheapest)}’s {duration(cheapest.each)}."
        )
        peer = min(peers, key=rank)
        if len(ours.runs) > 1 and _overlap(ours.seconds, peer.seconds):
            remarks.append(
                "The ranges over seeds overlap: the difference in seconds is within the noise of the seeds."
            )
    untuned = [s.label for s in peers if s.rate is not None and not s.tuned and "@" not in s.label]
    if untuned:
        remarks.append(
            f"{listed(untuned)} ran at the lab’s default rate for this problem; --tune gives each its own grid."
        )
    edge = [s.label for s in peers if s.edge]
    if edge:
        remarks.append(
            f"The best rate of {listed(edge)} is at the edge of its grid: a better one may lie beyond."
        )
    given = race.get("settings")
    if given and any(s.ours for s in standings):
        remarks.append(f"natgrad was given {listed(given)}, chosen for this problem beforehand.")
    elif any(s.ours and s.rate is None for s in standings):
        remarks.append("natgrad was given no learning rate and nothing else to tune.")
    for standing in standings:
        if standing.trouble:
            remarks.append(f"{standing.label} {standing.trouble}.")
    for name, reason in race.get("left_out", {}).items():
        remarks.append(f"{name} was left out: {reason}.")
    unfinished = [r.path.name for r in runs if r.status == "unfinished"]
    if unfinished:
        remarks.append(f"Unfinished: {listed(unfinished)}; the same race command goes on with them.")
    for key, what in (
        ("commit", "commits of natgrad"),
        ("cpu", "machines"),
        ("threads", "numbers of threads"),
        ("torch", "versions of torch"),
    ):
        seen = {str(r.environment.get(key)) for r in runs if r.environment}
        if len(seen) > 1:
            remarks.append(
                f"The runs come from different {what} ({listed(sorted(seen))}): compare seconds with care."
            )
    if len(race["seeds"]) == 1:
        remarks.append("One seed only: --seeds 3 shows how much is luck.")
    return remarks


def _overlap(a: Spread | None, b: Spread | None) -> bool:
    if a is None or b is None or not math.isfinite(a.median + b.median):
        return False
    return a.low <= b.high and b.low <= a.high


def _who(standing: Standing) -> str:
    if standing.rate is None or "@" in standing.label:
        return standing.label
    return f"{standing.label} (rate {standing.rate:g})"


def _count(steps: float) -> str:
    return f"{steps:,.0f} step{'' if steps == 1 else 's'}"


def _times(factor: float) -> str:
    return f"{number(factor)}×"


COLUMNS: tuple[tuple[str, Callable[[Summary, Standing], str]], ...] = (
    ("steps to target", lambda s, x: _spread(x.steps, lambda v: f"{v:,.0f}")),
    ("÷ best peer", lambda s, x: s.ratio(x, "steps")),
    ("seconds to target", lambda s, x: _spread(x.seconds, number)),
    ("÷ best peer", lambda s, x: s.ratio(x, "seconds")),
    ("time per step", lambda s, x: duration(x.each)),
    (
        "at the end",
        lambda s, x: _spread(x.excess, number) if math.isfinite(x.excess.median) else "diverged",
    ),
)


def table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows of text, the same for the terminal and the page."""
    race = summary.race
    target = race.get("target")
    chosen = [c for c in COLUMNS if target is not None or ("target" not in c[0] and "peer" not in c[0])]
    heads = ["optimiser", "rate", *(head for head, _ in chosen[:-1]), f"{noun(race)} at the end"]
    scored = bool(race.get("scores")) and any(s.score is not None for s in summary.standings)
    if scored:
        heads.append(f"test {race['scores'][0]}")
    rows = []
    for standing in summary.standings:
        rate = "none" if standing.rate is None else f"{standing.rate:g}{' (tuned)' if standing.tuned else ''}"
        row = [standing.label, rate, *(cell(summary, standing) for _, cell in chosen)]
        if scored:
            row.append("–" if standing.score is None else f"{standing.score:.3f}")
        rows.append(row)
    return heads, rows


def _spread(spread: Spread | None, text: Callable[[float], str]) -> str:
    if spread is None or not math.isfinite(spread.median):
        return "not reached"
    if spread.low == spread.high:
        return text(spread.median)
    high = text(spread.high) if math.isfinite(spread.high) else "∞"
    return f"{text(spread.median)} ({text(spread.low)}–{high})"
