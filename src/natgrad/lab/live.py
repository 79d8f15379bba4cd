"""What a race shows while it runs: progress bars in a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import abc
import time
from types import TracebackType
from typing import Any

from natgrad.lab.extras import require
from natgrad.lab.formats import duration, number
from natgrad.lab.plan import Budget, Leg
from natgrad.lab.problem import Task
from natgrad.lab.runs import Record

Stream = Any  # a text stream: anything with write, flush and isatty, such as sys.stdout


class View(abc.ABC):
    """Hears of everything that happens in a race; a context manager around it."""

    def __enter__(self) -> View:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abc.abstractmethod
    def open(self) -> None:
        """The race is about to start."""

    @abc.abstractmethod
    def close(self) -> None:
        """The race is over, or was interrupted."""

    @abc.abstractmethod
    def begin(self, problem: Task, budget: Budget, runs: int) -> None:
        """The race starts, with so many runs planned."""

    @abc.abstractmethod
    def start(self, leg: Leg, spent: float) -> None:
        """A run starts, or goes on from the given fraction of its budget."""

    @abc.abstractmethod
    def progress(self, leg: Leg, record: Record, spent: float) -> None:
        """A step or an evaluation was recorded."""

    @abc.abstractmethod
    def finish(self, leg: Leg, result: Record) -> None:
        """A run came to its end."""

    @abc.abstractmethod
    def note(self, text: str) -> None:
        """Something the user should know."""


class Silent(View):
    """Shows nothing."""

    def open(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def begin(self, problem: Task, budget: Budget, runs: int) -> None:
        """Nothing."""

    def start(self, leg: Leg, spent: float) -> None:
        """Nothing."""

    def progress(self, leg: Leg, record: Record, spent: float) -> None:
        """Nothing."""

    def finish(self, leg: Leg, result: Record) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


SILENT = Silent()


def view_for(stream: Stream) -> View:
    """Bars where the stream is a terminal, plain lines elsewhere."""
    return Bars(stream) if stream.isatty() else Lines(stream)


class Lines(View):
    """One line when a run starts and ends, and one every few seconds between."""

    def __init__(self, stream: Stream, every: float = 5.0) -> None:
        self._stream, self._every, self._last = stream, every, 0.0
        self._unit, self._runs, self._count = "", 0, 0

    def open(self) -> None:
        """Nothing to set up."""

    def close(self) -> None:
        """Nothing to put back."""

    def begin(self, problem: Task, budget: Budget, runs: int) -> None:
        """Says what is raced."""
        self._unit, self._runs = problem.unit, runs
        span = f"{budget.steps} steps" if budget.steps is not None else f"{budget.seconds:g} s"
        self._write(f"{problem.name}: {problem.title}\n{runs} runs of {span}; {measured_in(problem)}")

    def start(self, leg: Leg, spent: float) -> None:
        """Names the run."""
        self._count += 1
        self._last = time.monotonic()
        going_on = f" (continued at {spent:.0%})" if 0 < spent < 1 else ""
        self._write(f"[{self._count}/{max(self._count, self._runs)}] {leg.label}{going_on}")

    def progress(self, leg: Leg, record: Record, spent: float) -> None:
        """A line, if the last one is some seconds old."""
        if record["kind"] == "step" and time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self._write(f"    {spent:4.0%}  step {record['step']:<6}{describe(record)}")

    def finish(self, leg: Leg, result: Record) -> None:
        """How the run ended."""
        self._write(f"    {ending(result)}")

    def note(self, text: str) -> None:
        """One line."""
        self._write(f"note: {text}")

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class Bars(View):
    """A bar a run, with loss, λ, α and time per step beside it; finished runs stay on the screen."""

    def __init__(self, stream: Stream) -> None:
        console = require("rich.console", "the live view").Console(file=stream)
        progress = require("rich.progress", "the live view")
        self._console = console
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24, complete_style="cyan", finished_style="dim cyan"),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[told]}"),
            console=console, refresh_per_second=5, speed_estimate_period=5.0,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._drawn = 0.0

    def open(self) -> None:
        """Starts drawing."""
        self._bars.start()

    def close(self) -> None:
        """Leaves the bars on the screen as they are."""
        self._bars.stop()

    def begin(self, problem: Task, budget: Budget, runs: int) -> None:
        """Says what is raced."""
        span = f"{budget.steps} steps" if budget.steps is not None else f"{budget.seconds:g} s"
        self._console.print(f"[bold]{problem.name}[/]  {problem.title}", highlight=False)
        self._console.print(f"[dim]{runs} runs of {span}; {measured_in(problem)}[/]", highlight=False)

    def start(self, leg: Leg, spent: float) -> None:
        """A new bar."""
        style = "bold" if leg.entrant.ours else "none"
        task = self._bars.add_task(f"[{style}]{leg.label}[/]", total=1.0, completed=spent, told="")
        self._tasks[leg.name] = task

    def progress(self, leg: Leg, record: Record, spent: float) -> None:
        """Moves the bar, at most ten times a second: a step may take a millisecond."""
        if record["kind"] == "step" and time.monotonic() - self._drawn >= 0.1:
            self._drawn = time.monotonic()
            self._bars.update(self._tasks[leg.name], completed=min(spent, 1.0), told=describe(record))

    def finish(self, leg: Leg, result: Record) -> None:
        """Leaves the bar with how it ended."""
        if leg.name not in self._tasks:  # it failed before it started
            self.start(leg, 0.0)
        style = "red" if result["status"] != "finished" else "none"
        completed = {} if result["status"] != "finished" else {"completed": 1.0}
        self._bars.update(self._tasks[leg.name], told=f"[{style}]{ending(result)}[/]", **completed)

    def note(self, text: str) -> None:
        """One line above the bars."""
        self._console.print(f"[yellow]note:[/] {text}", highlight=False)


def measured_in(problem: Task) -> str:
    """What the numbers are."""
    return f"{problem.measure} in {problem.unit}" if problem.unit else problem.measure


def describe(record: Record) -> str:
    """Excess (or error), λ, α and seconds per step of a record, those that there are."""
    parts = [f"at {number(record['excess'])}"] if "excess" in record else []
    parts += [
        f"{sign} {number(record[key])}" for sign, key in (("λ", "damping"), ("α", "alpha")) if key in record
    ]
    if "each" in record:
        parts.append(f"{duration(record['each'])}/step")
    return "  ".join(parts)


def ending(result: Record) -> str:
    """How a run ended, in one line."""
    if result["status"] == "finished":
        each = result["seconds"] / max(result["step"], 1)
        return (
            f"at {number(float(result['excess']))} after {result['step']} steps, "
            f"{duration(result['seconds'])} ({duration(each)}/step)"
        )
    return f"{result['status']} at step {result['step']}: {result['message']}"
