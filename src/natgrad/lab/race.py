"""A race: several optimisers on one problem, from the same weights, on the same batches, seed by seed.

What is fair about it: for a seed, every optimiser starts from the same weights and sees the same batches in the same
order; the clock runs only while an optimiser trains, never during evaluation; the first run does not pay for
warming up torch; peers may tune their learning rate on the first seed, natgrad may not.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.errors import ConfigError, NatgradError, NonFiniteError, NotPositiveDefiniteError, RunError
from natgrad.lab.live import SILENT, View
from natgrad.lab.peers import Entrant, neighbour, unavailable
from natgrad.lab.plan import Budget, Leg
from natgrad.lab.problems import Problem
from natgrad.lab.runs import Record, RunFolder, read_race, write_json

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

    problem: Problem
    entrants: tuple[Entrant, ...]
    folder: Path
    budget: Budget
    seeds: tuple[int, ...] = (0,)
    batch_size: int | None = None
    target: float | None = None
    tune: bool = False

    def __post_init__(self) -> None:
        examples = len(self.problem.train[0])
        if not 1 <= self.examples_a_step <= examples:
            raise ConfigError(
                f"batch size {self.batch_size} must lie between 1 and the {examples} training examples"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("a race needs at least one seed, and none twice")
        if self.target is not None and not self.target > 0:
            raise ConfigError(
                f"the target is an excess above the optimum and must be positive, not {self.target:g}"
            )

    @property
    def examples_a_step(self) -> int:
        """The batch size in force."""
        return self.problem.batch_size if self.batch_size is None else self.batch_size

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
            reason = unavailable(entrant)
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
        inputs = problem.train[0]
        target = problem.target if self.target is None else self.target
        write_json(
            path,
            {
                "problem": problem.name, "title": problem.title, "unit": problem.unit,
                "floor": problem.floor, "target": target, "examples": len(inputs),
                "scores": list(problem.scores) if problem.test is not None else [],
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
            "evaluate_every": self.budget.evaluate_every, "loss": repr(self.problem.loss_fn),
            "examples": len(self.problem.train[0]), "parameters": sum(p.numel() for p in parameters),
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


def _train(problem: Problem, leg: Leg, folder: RunFolder, budget: Budget, state: Record, view: View) -> None:
    """Trains one leg to the end of its budget; `state` is kept current for whoever catches an error."""
    inputs, targets = problem.train
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
    judge = _Judge(problem, problem.build(leg.seed))
    folder.begin(checkpoint)
    view.start(leg, budget.spent(state["step"], state["seconds"]))
    if checkpoint is None:
        _evaluate(judge, model, folder, state, view, leg, 0.0)
    saved = time.perf_counter()
    for rows in batches(len(inputs), folder.config["batch_size"], leg.seed, state["step"]):
        if budget.spent(state["step"], state["seconds"]) >= 1:
            break
        started = time.perf_counter()
        x, y = inputs[rows], targets[rows]
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        seconds = time.perf_counter() - started
        state["step"] += 1
        state["seconds"] += seconds
        value = problem.scale * float(loss.detach())
        record: Record = {"kind": "step", "step": state["step"], "seconds": state["seconds"], "loss": value}
        info = getattr(optimizer, "info", None)
        if info is not None:
            record |= {k: float(v) for k in _OF_INFO if (v := getattr(info, k, None)) is not None}
        folder.append(record)
        if not math.isfinite(value):
            raise _Diverged(f"the loss is {value} at step {state['step']}")
        spent = budget.spent(state["step"], state["seconds"])
        view.progress(leg, {**record, "excess": value - problem.floor, "each": seconds}, spent)
        if budget.evaluates(state["step"]) or spent >= 1:
            _evaluate(judge, model, folder, state, view, leg, spent)
        if time.perf_counter() - saved > _CHECKPOINT_EVERY:
            folder.save_checkpoint(
                {**state, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "generator": torch.get_rng_state()}
            )  # fmt: skip
            saved = time.perf_counter()


def _prepared(
    problem: Problem, leg: Leg, checkpoint: Record | None
) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """Model, loss and optimiser of a leg: as new, or as a checkpoint left them."""
    model, loss_fn = problem.build(leg.seed), copy.deepcopy(problem.loss_fn)
    optimizer = leg.entrant.build(model, loss_fn, leg.entrant.rate, leg.seed)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    return model, loss_fn, optimizer


def _evaluate(
    judge: _Judge, model: nn.Module, folder: RunFolder, state: Record, view: View, leg: Leg, spent: float
) -> None:
    measured = judge(model)
    state["excess"] = measured["excess"]
    record = {"kind": "evaluation", "step": state["step"], "seconds": state["seconds"], **measured}
    folder.append(record)
    if not math.isfinite(measured["excess"]):
        raise _Diverged(f"the training loss is {measured['loss']} after step {state['step']}")
    view.progress(leg, record, spent)


class _Judge:
    """Measures a model on the whole training set, and on the test set if there is one.

    It works on a twin of the model and a copy of the loss: an optimiser that listens to forward passes (as natgrad
    does) must see the training batches only.
    """

    def __init__(self, problem: Problem, twin: nn.Module) -> None:
        self.problem, self.twin = problem, twin.eval()
        self.loss_fn = copy.deepcopy(problem.loss_fn)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        problem = self.problem
        self.twin.load_state_dict(model.state_dict())
        loss = problem.scale * self._pass(problem.train, {})["loss"]
        measured = {"loss": loss, "excess": loss - problem.floor}
        if problem.test is not None:
            tested = self._pass(problem.test, dict(problem.scores))
            measured["test_loss"] = problem.scale * tested.pop("loss")
            measured |= {f"test_{name}": value for name, value in tested.items()}
        return measured

    def _pass(self, where: tuple[Tensor, Tensor], scores: dict[str, Any]) -> dict[str, float]:
        """Means over the examples, 1,000 at a time. A summed loss is scaled to what one batch would give."""
        inputs, targets = where
        count = len(inputs)
        summed = getattr(self.loss_fn, "reduction", "mean") == "sum"
        totals = dict.fromkeys(["loss", *scores], 0.0)
        for start in range(0, count, 1000):
            rows = slice(start, min(start + 1000, count))
            outputs = self.twin(inputs[rows])
            here = rows.stop - rows.start
            totals["loss"] += float(self.loss_fn(outputs, targets[rows])) * (
                self.problem.batch_size / count if summed else here / count
            )
            for name, score in scores.items():
                totals[name] += float(score(outputs, targets[rows]).sum()) / count
        return totals


def batches(count: int, size: int, seed: int, start: int = 0) -> Iterator[Tensor | slice]:
    """The rows of batch `start`, `start` + 1, …: a pure function of the seed, so a run can resume anywhere.

    Every epoch is its own permutation; what is left over at its end is not used. A batch of everything keeps the
    data's order.
    """
    if size == count:
        while True:
            yield slice(None)
    per_epoch = count // size
    step = start
    while True:
        epoch, first = divmod(step, per_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for index in range(first, per_epoch):
            yield order[index * size : (index + 1) * size]
            step += 1


def _warm_up(problem: Problem, size: int) -> None:
    """One forward and backward pass that nobody is charged for: thread pools and kernels start here."""
    model, loss_fn = problem.build(0), copy.deepcopy(problem.loss_fn)
    try:
        loss_fn(model(problem.train[0][:size]), problem.train[1][:size]).backward()
    except Exception:  # the runs meet the same error and report it
        return
