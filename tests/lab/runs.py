"""Races that are interrupted, and what came of a race."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from natgrad.lab.live import Silent
from natgrad.lab.runs import read_race


class Interrupting(Silent):
    """Presses ctrl-C at a step of a run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def progress(self, leg: Any, record: Any, spent: float) -> None:
        if record["kind"] == "step" and record["step"] == self.step:
            raise KeyboardInterrupt


def evaluations(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Those of each optimiser's run."""
    return {run.config["optimizer"]: run.evaluations for run in read_race(folder)[1]}
