"""A race: several optimisers on one problem, from the same weights, on the same batches, seed by seed.

What is fair about it: for a seed, every optimiser starts from the same weights and sees the same batches in the same
order; where a problem has a schedule of rates, all peers follow it; the clock runs only while an optimiser trains,
never during evaluation; the first run does not pay for warming up torch; peers may tune their learning rate on the
first seed, natgrad may not.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from natgrad.errors import (
    ConfigError,
    NatgradError,
    NonFiniteError,
    NotPositiveDefiniteError,
    RunError,
    StallWarning,
)
from natgrad.lab.live import SILENT, View
from natgrad.lab.peers import Entrant, neighbour, share_of_rate, unavailable
from natgrad.lab.plan import Budget, Leg
from natgrad.lab.problem import LossFn, Problem, Task
from natgrad.lab.runs import Record, RunFolder, read_race, write_json
from natgrad.optim import NaturalGradient

_CHECKPOINT_EVERY = 15.0  # seconds of wall time
_OF_INFO = ("damping", "alpha", "momentum", "rho")  # λ, α, μ, ρ of `optimizer.info`


@dataclass(frozen=True)
class Race:
    """A race, ready to run. Running it again goes on where it stopped.

    Attributes:
        problem: what is trained.
        entrants: who takes part.
        folder: where everything is written.
        budget: how long each run lasts.
        seeds: of weights, batch order and the optimisers' own randomness.
        batch_size: examples a step; None for the problem's own.
        target: excess that is timed to, in the problem's unit; None for the problem's own.
        tune: whether peers try a grid of five learning rates on the first seed, and race with the best.
    """

    problem: Task
    entrants: tuple[Entrant, ...]
    folder: Path
    budget: Budget
    seeds: tuple[int, ...] = (0,)
    batch_size: int | None = None
    target: float | None = None
    tune: bool = False

    def __post_init__(self) -> None:
        examples = self.problem.examples
        if self.batch_size is not None and not isinstance(self.problem, Problem):
            each = f"{self.problem.examples_a_step:,} {self.problem.things}"
            raise ConfigError(f"a step of {self.problem.name!r} takes {each}: no batch size")
        if not 1 <= self.examples_a_step <= examples:
            raise ConfigError(
                f"batch size {self.batch_size} must lie between 1 and the {examples} training examples"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("a race needs at least one seed, and none twice")
        if self.target is not None and not self.target > 0:
            raise ConfigError(
                f"the target is an excess above the optimum, or an error, and must be positive, not {self.target:g}"
            )

    @property
    def examples_a_step(self) -> int:
        """The batch size in force."""
        return self.problem.examples_a_step if self.batch_size is None else self.batch_size

    @property
    def batches(self) -> bool:
        """Whether each step takes other examples than the one before."""
        return self.problem.sampled or self.examples_a_step < self.problem.examples

    def run(self, view: View = SILENT) -> dict[str, Record]:
        """Runs what is not finished yet.

        Returns:
            Run name → its result: status, message, steps, seconds, excess at the end.

        Raises:
            RunError: the folder can't be written, or holds runs of another configuration.
            ConfigError: nobody can run here, or every run failed; the message carries the reason.
        """
        able, left_out = [], {}
        for entrant in self.entrants:
            reason = unavailable(entrant, self.batches)
            if reason is None:
                able.append(entrant)
            else:
                left_out[entrant.name] = reason
                view.note(f"{entrant.label} is left out: {reason}")
        if not able:
            raise ConfigError(f"no optimiser can run here: {'; '.join(left_out.values())}")
        self._write(able, left_out)
        tuned = [e for e in able if self.tune and e.grid()]
        runs = len(able) * len(self.seeds) - len(tuned) + sum(len(e.grid()) for e in tuned)
        results: dict[str, Record] = {}
        _warm_up(self.problem, self.examples_a_step)
        with view:
            view.begin(self.problem, self.budget, runs)
            if tuned:
                able = [self._tuned(e, results, view) if e in tuned else e for e in able]
                self._write(able, left_out)
            for index, seed in enumerate(self.seeds):
                # who goes first rotates, so that a machine that slows down with time slows everybody
                for entrant in able[index % len(able) :] + able[: index % len(able)]:
                    leg = Leg(entrant, seed)
                    if leg.name not in results:
                        results[leg.name] = self._leg(leg, view)
        failed = [r for r in results.values() if r["status"] == "failed"]
        if len(failed) == len(results):
            raise ConfigError(f"every run failed; the first: {failed[0]['message']}")
        return results

    def _tuned(self, entrant: Entrant, results: dict[str, Record], view: View) -> Entrant:
        """The entrant at the rate with the least training excess at the end of the first seed's run.

        The grid grows by a rate while its best is at an edge (three times at most): a peer must not lose because
        somebody placed its grid badly.
        """
        rates = list(entrant.grid())
        excess: dict[float, float] = {}
        for _ in range(4):
            for rate in rates:
                if rate not in excess:
                    leg = Leg(entrant.at(rate), self.seeds[0])
                    results[leg.name] = result = self._leg(leg, view)
                    excess[rate] = float(result["excess"]) if result["status"] == "finished" else math.inf
            best = min(excess, key=lambda rate: excess[rate])
            if excess[best] == math.inf:
                return entrant
            if best not in (min(rates), max(rates)):
                break
            rates.append(neighbour(best, up=best == max(rates)))
        return entrant.at(best)

    def _write(self, able: list[Entrant], left_out: dict[str, str]) -> None:
        """race.json. Entrants of an earlier race in the same folder are kept beside the new ones."""
        path = self.folder / "race.json"
        problem = self.problem
        before: Record = {}
        if path.exists():
            before = read_race(self.folder)[0]
            if before.get("problem") != problem.name:
                raise RunError(
                    f"{self.folder} holds a race on {before.get('problem')!r}; choose another --folder"
                )
        rows = [
            {"name": e.name, "label": e.label, "rate": e.rate, "pinned": e.pinned, "ours": e.ours,
             "grid": list(e.grid()) if self.tune else []}
            for e in able
        ]  # fmt: skip
        new = {row["label"] for row in rows}
        kept = [row for row in before.get("entrants", []) if row["label"] not in new]
        target = problem.target if self.target is None else self.target
        write_json(
            path,
            {
                "problem": problem.name, "title": problem.title, "measure": problem.measure,
                "unit": problem.unit, "floor": problem.floor, "target": target, "examples": problem.examples,
                "scores": list(problem.scored), "schedule": problem.schedule,
                "yardstick": problem.yardstick, "things": problem.things, "sampled": problem.sampled,
                "logarithmic": problem.logarithmic, "settings": [f"{k}={v!r}" for k, v in problem.settings.items()],
                "parameters": sum(p.numel() for p in problem.build(self.seeds[0]).parameters()),
                "batch_size": self.examples_a_step, "steps": self.budget.steps, "seconds": self.budget.seconds,
                "seeds": sorted({*before.get("seeds", []), *self.seeds}),
                "entrants": kept + rows, "left_out": {**before.get("left_out", {}), **left_out},
            },
        )  # fmt: skip

    def _leg(self, leg: Leg, view: View) -> Record:
        """One run: skipped if finished, continued from its checkpoint if there is one, else from the start."""
        parameters = self.problem.build(leg.seed).parameters()
        config = {
            "problem": self.problem.name, "optimizer": leg.entrant.name, "rate": leg.entrant.rate, "seed": leg.seed,
            "batch_size": self.examples_a_step, "steps": self.budget.steps, "seconds": self.budget.seconds,
            "evaluate_every": self.budget.evaluate_every, "loss": repr(self.problem.likelihood),
            "examples": self.problem.examples, "parameters": sum(p.numel() for p in parameters),
        }  # fmt: skip
        folder = RunFolder(self.folder / "runs" / leg.name, config)
        done = folder.result
        if done is not None:
            view.start(leg, 1.0)
            view.finish(leg, done)
            return done
        state: Record = {"step": 0, "seconds": 0.0, "excess": math.nan}
        try:
            _train(self.problem, leg, folder, self.budget, state, view)
            result = {"status": "finished", "message": ""}
        except (_Diverged, NonFiniteError, NotPositiveDefiniteError) as error:
            result = {"status": "diverged", "message": str(error)}
        except RunError:
            raise  # the disk, not the run: the next run would fail alike
        except Exception as error:  # one run's fault must not take the others' results with it
            kind = "" if isinstance(error, NatgradError) else f"{type(error).__name__}: "
            result = {"status": "failed", "message": f"{kind}{error}".splitlines()[0]}
        finally:
            folder.close()
        result.update(state)
        folder.finish(result)
        view.finish(leg, result)
        return result


class _Diverged(ArithmeticError):
    """The batch loss is no longer a finite number."""


def _train(problem: Task, leg: Leg, folder: RunFolder, budget: Budget, state: Record, view: View) -> None:
    """Trains one leg to the end of its budget; `state` is kept current for whoever catches an error."""
    checkpoint = folder.load_checkpoint()
    try:
        model, loss_fn, optimizer = _prepared(problem, leg, checkpoint)
    except Exception:
        if checkpoint is None:
            raise
        checkpoint = (
            None  # of another version, or a state that does not fit: the run starts again, from new objects
        )
        model, loss_fn, optimizer = _prepared(problem, leg, None)
    if checkpoint is None:
        torch.manual_seed(leg.seed)
    else:
        torch.set_rng_state(checkpoint["generator"])
        state.update({k: checkpoint[k] for k in ("step", "seconds", "excess")})
    twin = problem.build(leg.seed)
    folder.begin(checkpoint)
    view.start(leg, budget.spent(state["step"], state["seconds"]))
    if checkpoint is None:
        _evaluate(problem, twin, model, optimizer, folder, state, view, leg, 0.0)
    saved = time.perf_counter()
    rate = leg.entrant.rate
    for batch in problem.batches(folder.config["batch_size"], leg.seed, state["step"]):
        spent = budget.spent(state["step"], state["seconds"])
        if spent >= 1:
            break
        if problem.schedule and rate is not None and not leg.entrant.ours:
            for group in optimizer.param_groups:
                group["lr"] = rate * share_of_rate(spent)
        started = time.perf_counter()
        loss = _step(problem, leg.entrant, optimizer, model, loss_fn, batch)
        seconds = time.perf_counter() - started
        state["step"] += 1
        state["seconds"] += seconds
        value = getattr(problem, "scale", 1.0) * loss
        record: Record = {"kind": "step", "step": state["step"], "seconds": state["seconds"], "loss": value}
        info = getattr(optimizer, "info", None)
        if info is not None:
            record |= {k: float(v) for k in _OF_INFO if (v := getattr(info, k, None)) is not None}
        folder.append(record)
        if not math.isfinite(value):
            raise _Diverged(f"the loss is {value} at step {state['step']}")
        spent = budget.spent(state["step"], state["seconds"])
        view.progress(leg, {**record, "excess": _shown(problem, state, value), "each": seconds}, spent)
        if budget.evaluates(state["step"]) or spent >= 1:
            _evaluate(problem, twin, model, optimizer, folder, state, view, leg, spent)
        if time.perf_counter() - saved > _CHECKPOINT_EVERY:
            folder.save_checkpoint(
                {**state, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "generator": torch.get_rng_state()}
            )  # fmt: skip
            saved = time.perf_counter()


def _step(
    problem: Task,
    entrant: Entrant,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
) -> float:
    """One step, as the optimiser wants to be called; the loss before it."""
    residuals: Any = problem.residuals_of(model, batch) if entrant.ours else None
    if residuals is not None:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", StallWarning
            )  # at the solution, the rest of the budget changes nothing
            return float(optimizer.step(residuals))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = problem.loss(model, loss_fn, batch)
        loss.backward()
        return loss.detach()

    if entrant.evaluates:
        return float(optimizer.step(closure))  # type: ignore[arg-type]
    loss = closure()
    optimizer.step()
    return float(loss)


def _shown(problem: Task, state: Record, loss: float) -> float:
    """What the live view shows between evaluations: the batch's excess, or the last error."""
    return loss - problem.floor if isinstance(problem, Problem) else state["excess"]


def _prepared(
    problem: Task, leg: Leg, checkpoint: Record | None
) -> tuple[nn.Module, LossFn, torch.optim.Optimizer]:
    """Model, loss and optimiser of a leg: as new, or as a checkpoint left them."""
    model, loss_fn = problem.build(leg.seed), copy.deepcopy(problem.likelihood)
    optimizer = leg.entrant.build(model, loss_fn, leg.entrant.rate, leg.seed)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    return model, loss_fn, optimizer


def _evaluate(
    problem: Task,
    twin: nn.Module,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: RunFolder,
    state: Record,
    view: View,
    leg: Leg,
    spent: float,
) -> None:
    natural = optimizer if isinstance(optimizer, NaturalGradient) and optimizer.averages else None
    shown = nullcontext() if natural is None else natural.averaged()
    with shown:  # what a user is told to evaluate
        twin.load_state_dict(model.state_dict())
    measured = problem.judge(twin)
    state["excess"] = measured["excess"]
    record = {"kind": "evaluation", "step": state["step"], "seconds": state["seconds"], **measured}
    folder.append(record)
    if not math.isfinite(measured["excess"]):
        raise _Diverged(f"the training loss is {measured['loss']} after step {state['step']}")
    view.progress(leg, record, spent)


def _warm_up(problem: Task, size: int) -> None:
    """One forward and backward pass that nobody is charged for: thread pools and kernels start here."""
    model, loss_fn = problem.build(0), copy.deepcopy(problem.likelihood)
    try:
        problem.loss(model, loss_fn, next(problem.batches(size, 0))).backward()
    except Exception:  # the runs meet the same error and report it
        return
