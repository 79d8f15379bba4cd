"""Networks that people have: natgrad with one setting against tuned peers (see docs/benchmarks.md).

    python benchmarks/networks.py                     # all problems, then step time and memory: hours
    python benchmarks/networks.py race vit chars      # races on two of them
    python benchmarks/networks.py steptime memory     # the other parts
    python benchmarks/networks.py race --smoke        # a dozen steps of each, nothing tuned and nothing written

A race is `natgrad race`: for each of three seeds all start from the same weights and see the same batches; SGD with
Nesterov momentum, AdamW, Muon and SOAP each try at least five rates on the first seed and keep the best, under one
schedule (a linear rise, then a cosine to zero); natgrad has metric="tempered" on every problem, and no other setting.
The target of a problem is the training loss that the best peer ends with. Runs are kept under races/networks/PROBLEM,
so that a race that was interrupted goes on where it stopped; --anew drops natgrad's runs alone, after it has changed.
--known takes the peers' rates from the results at hand instead of searching again.

Results go to benchmarks/results/networks-<problem>.json, networks-steptime.json and networks-memory.json: every run of
every optimiser, the lost ones too.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import natgrad
from natgrad.errors import ConfigError
from natgrad.lab import Budget, Problem, Race, entrants, load_problem
from natgrad.lab.live import view_for
from natgrad.lab.runs import Run, environment, read_race, write_json
from natgrad.lab.standings import Spread, Standing
from natgrad.lab.summary import summarise

RESULTS = Path(__file__).parent / "results"
FOLDER = Path("races/networks")
PROBLEMS = ("tabular", "mnist-cnn", "fashion-cnn", "resnet", "vit", "chars")
PEERS = ("nesterov", "adamw", "muon", "soap")
SEEDS = (0, 1, 2)
# of the best tuned peer's steps and seconds to its own final training loss
STEPS_GOAL, SECONDS_GOAL = {"chars": 0.6}, 0.8
STEPTIME_GOAL, MEMORY_GOAL = {"chars": 1.25, "vit": 1.25, "resnet": 1.5}, 2.5


# ---------------------------------------------------------------------------------------------------- races


def race(names: Sequence[str], ours: str, folder: Path, anew: bool, known: bool, smoke: bool) -> None:
    """Races on each problem; writes what came of it."""
    rates = {name: searched(name) for name in names} if known else {}
    for name in names:
        say(f"── race {name}")
        try:
            problem = problem_of(name)
        except ConfigError as error:
            say(f"   left out: {error}")
            continue
        if smoke:
            budget, seeds = Budget(steps=12, evaluate_every=6), SEEDS[:1]
        else:
            budget, seeds = Budget(steps=problem.steps, evaluate_every=problem.evaluate_every), SEEDS
        place = (folder / "smoke" if smoke else folder) / name
        if anew:
            for run in (place / "runs").glob("natgrad*"):
                shutil.rmtree(run)
        field = entrants([ours, *PEERS], problem)
        before = rates.get(name, {})
        field = tuple(e.at(before[e.label]["rate"]) if e.label in before else e for e in field)
        Race(problem, field, place, budget, seeds=seeds, tune=not (smoke or known)).run(view_for(sys.stdout))
        result = outcome(place, name)
        for standing in result["standings"]:  # the search that gave the rate is a part of the result
            found = before.get(standing["label"], {})
            standing |= {key: found[key] for key in ("tuned_over", "at_edge") if key in found}
        say(told(result))
        if not smoke:
            write(name, result)


def searched(name: str) -> dict[str, dict[str, Any]]:
    """The peers' rows of the results at hand, by label."""
    path = RESULTS / f"networks-{name}.json"
    rows = json.loads(path.read_text())["result"]["standings"] if path.exists() else []
    found = {row["label"]: row for row in rows if row["rate"] is not None}
    if len(found) < len(PEERS):
        raise SystemExit(f"{path} does not have the rates of all peers: race on {name} without --known")
    return found


def problem_of(name: str) -> Problem:
    """The problem, with the peers' rates under a schedule."""
    problem = load_problem(name)
    assert isinstance(problem, Problem)
    return replace(problem, schedule=True)


def outcome(place: Path, name: str) -> dict[str, Any]:
    """Steps and seconds to the training loss that the best peer ends with, and every run."""
    record, runs = read_race(place)
    standings = summarise({**record, "target": None}, runs).standings
    best = min((s for s in standings if not s.ours), key=lambda s: s.excess.median)
    target = best.excess.median
    timed = summarise({**record, "target": target}, runs).standings
    theirs = {"steps": last(best, "step"), "seconds": last(best, "seconds")}
    for peer in (s for s in timed if not s.ours):  # another one may have been there sooner
        theirs = {k: min(v, spread(peer, k).median) for k, v in theirs.items()}
    goals = {"steps": STEPS_GOAL.get(name, 0.5), "seconds": SECONDS_GOAL}
    return {
        "problem": record["problem"], "title": record["title"], "parameters": record["parameters"],
        "batch_size": record["batch_size"], "steps": record["steps"], "unit": record["unit"],
        "best_peer": {"label": best.label, "rate": best.rate, "loss": target}, "theirs": theirs,
        "natgrad": {
            s.label: {
                k: {
                    "median": spread(s, k).median, "range": [spread(s, k).low, spread(s, k).high],
                    "ratio": spread(s, k).median / theirs[k], "goal": goals[k],
                    "reached": spread(s, k).median / theirs[k] <= goals[k],
                }
                for k in theirs
            }
            for s in timed if s.ours
        },
        "standings": [
            {
                "label": s.label, "rate": s.rate, "tuned_over": sorted(s.trials), "at_edge": s.edge,
                "loss": [s.excess.median, s.excess.low, s.excess.high], "test_score": s.score,
                "seconds_a_step": s.each, "trouble": s.trouble,
            }
            for s in standings
        ],
        "left_out": record["left_out"],
        "runs": [row(run) for run in runs],
    }  # fmt: skip


def row(run: Run) -> dict[str, Any]:
    """One run, as it ended."""
    end = run.evaluations[-1] if run.evaluations else {}
    kept = {k: end[k] for k in ("step", "seconds", "loss", "test_loss", "test_accuracy") if k in end}
    said = (run.result or {}).get("message", "")
    asked = {k: run.config.get(k) for k in ("optimizer", "rate", "seed")}
    return {**asked, "status": run.status, **kept, **({"message": said} if said else {})}


def spread(standing: Standing, quantity: str) -> Spread:
    """Of the steps or seconds to the target."""
    found = standing.steps if quantity == "steps" else standing.seconds
    assert found is not None
    return found


def last(standing: Standing, quantity: str) -> float:
    """How long its runs lasted, the median."""
    return statistics.median(float(run.evaluations[-1][quantity]) for run in standing.runs)


def told(result: dict[str, Any]) -> str:
    """The verdict in a few lines."""
    best = result["best_peer"]
    lines = [f"   best peer: {best['label']} @ {best['rate']:g}, {best['loss']:.4g} {result['unit']}"]
    for label, found in result["natgrad"].items():
        for quantity, value in found.items():
            ratio = "not reached" if math.isinf(value["ratio"]) else f"{value['ratio']:.2f}×"
            lines.append(f"   {label}, {quantity} to it: {ratio} (goal {value['goal']}×)")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- step time and memory


def built(who: str, model: nn.Module, loss_fn: nn.Module) -> torch.optim.Optimizer:
    """AdamW, natgrad with a rate, natgrad without, or natgrad as it races."""
    if who == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-3)
    if who == "tempered":
        return natgrad.NaturalGradient(model, loss_fn, metric="tempered")
    return natgrad.NaturalGradient(model, loss_fn, lr=1e-3 if who == "fixed" else None)


OURS = {"fixed": "with lr=", "adaptive": "without", "tempered": "tempered"}


class Training:
    """One optimiser on a problem, step by step."""

    def __init__(self, problem: Problem, who: str) -> None:
        self.problem, self.model, self.loss_fn = problem, problem.build(0), problem.loss_fn
        if who != "adamw":  # a loss tells its listeners of every call
            self.loss_fn = type(problem.loss_fn)()
        self.optimizer = built(who, self.model, self.loss_fn)
        self.batches: Iterator[Any] = problem.batches(problem.batch_size, 0)

    def step(self) -> float:
        """Seconds of one step."""
        batch = next(self.batches)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.problem.loss(self.model, self.loss_fn, batch).backward()
        self.optimizer.step()
        return time.perf_counter() - start


def steptime(names: Sequence[str], smoke: bool, blocks: int = 6, block: int = 20) -> None:
    """Seconds of a step against AdamW's: blocks of steps take turns, so that noise hits all alike."""
    if smoke:
        blocks, block = 2, 2
    result: dict[str, Any] = {}
    for name in names:
        say(f"── step time {name}")
        try:
            problem = problem_of(name)
        except ConfigError as error:
            say(f"   left out: {error}")
            continue
        runs = {who: Training(problem, who) for who in ("adamw", *OURS)}
        for run in runs.values():
            run.step()  # the first step allocates
        seconds: dict[str, list[float]] = {who: [] for who in runs}
        for _ in range(blocks):
            for who, run in runs.items():
                seconds[who].append(sum(run.step() for _ in range(block)) / block)
        result[name] = {"adamw_milliseconds": 1e3 * statistics.median(seconds["adamw"]), "seconds": seconds}
        for who in OURS:
            ratios = [ours / theirs for ours, theirs in zip(seconds[who], seconds["adamw"], strict=True)]
            result[name][who] = {
                "amortised": sum(seconds[who]) / sum(seconds["adamw"]),
                "median_of_blocks": statistics.median(ratios),
            }
        result[name]["goal_of_fixed"] = STEPTIME_GOAL.get(name)
        compared = ", ".join(
            f"{how} {result[name][who]['median_of_blocks']:.2f}×" for who, how in OURS.items()
        )
        say(f"   AdamW {result[name]['adamw_milliseconds']:.1f} ms; natgrad {compared}")
    if not smoke:
        write("steptime", result)


def memory(names: Sequence[str], smoke: bool) -> None:
    """Peak resident memory of a process, whole and beyond what it had before training; each in its own."""
    result: dict[str, Any] = {"goal": MEMORY_GOAL}
    for name in names:
        say(f"── memory {name}")
        peaks: dict[str, dict[str, float]] = {}
        for who in ("adamw", *OURS):
            command = [sys.executable, __file__, "--peak", who, name, *(["--smoke"] if smoke else [])]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                say(f"   left out: {done.stderr.strip().splitlines()[-1]}")
                break
            peaks[who] = json.loads(done.stdout.splitlines()[-1])
        else:
            for kind in ("whole", "beyond"):
                for who in OURS:
                    peaks[who][f"{kind}_ratio"] = peaks[who][kind] / peaks["adamw"][kind]
            result[name] = peaks
            compared = ", ".join(f"{how} {peaks[who]['beyond_ratio']:.2f}×" for who, how in OURS.items())
            say(f"   AdamW {peaks['adamw']['beyond']:.0f} MB; natgrad {compared}")
    if not smoke:
        write("memory", result)


def peak(who: str, name: str, steps: int) -> dict[str, float]:
    """Megabytes at the peak of a training, and beyond what was there when it started."""
    problem = problem_of(name)
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # reading the data may take more than training: forget that peak
    before = _megabytes("VmRSS")
    training = Training(problem, who)
    for _ in range(steps):
        training.step()
    whole = _megabytes("VmHWM")
    return {"whole": whole, "beyond": whole - before}


def _megabytes(key: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


# --------------------------------------------------------------------------------------------------- the rest


def write(name: str, result: dict[str, Any]) -> None:
    """With what it depends on."""
    path = RESULTS / f"networks-{name}.json"
    write_json(path, {"environment": environment(), "result": result})
    say(f"   → {path}")


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", metavar="PART|PROBLEM",
                        help=f"of race, steptime, memory and {', '.join(PROBLEMS)}; all by default")  # fmt: skip
    parser.add_argument("--ours", default="natgrad-tempered", help="natgrad's entrant (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="where runs are kept (default: %(default)s)"
    )
    parser.add_argument("--anew", action="store_true", help="run natgrad again, and the peers not")
    parser.add_argument("--known", action="store_true",
                        help="peers have the rates that the committed results' search found: no grid")  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="a dozen steps, nothing tuned, nothing written")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    parts = [w for w in arguments.what if w in ("race", "steptime", "memory")] or [
        "race",
        "steptime",
        "memory",
    ]
    names = [w for w in arguments.what if w in PROBLEMS] or list(PROBLEMS)
    if unknown := set(arguments.what) - {*PROBLEMS, "race", "steptime", "memory"}:
        parser.error(f"unknown part or problem {', '.join(sorted(unknown))}")
    if arguments.peak:
        print(json.dumps(peak(arguments.peak, names[0], 2 if arguments.smoke else 30)))
        return
    if "race" in parts:
        race(names, arguments.ours, arguments.folder, arguments.anew, arguments.known, arguments.smoke)
    if "steptime" in parts:
        steptime(names, arguments.smoke)
    if "memory" in parts:
        memory(names, arguments.smoke)


if __name__ == "__main__":
    main()
