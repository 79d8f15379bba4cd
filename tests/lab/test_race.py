from __future__ import annotations

import io
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from natgrad.errors import ConfigError, NonFiniteError, RunError, UnknownNameError
from natgrad.lab import peers as peers_module
from natgrad.lab import race as race_module
from natgrad.lab.live import Bars, Lines, Silent
from natgrad.lab.peers import Entrant, MuonWithAdamW, entrants, unavailable
from natgrad.lab.plan import Budget
from natgrad.lab.problem import Problem, epochs
from natgrad.lab.race import Race
from natgrad.lab.runs import read_race
from tests.lab.runs import Interrupting


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_is_a_folder_that_says_everything(problem: Problem, fake: Entrant, tmp_path: Path) -> None:
    Race(problem, (fake, *entrants(["adam"], problem)), tmp_path, Budget(steps=12, evaluate_every=5)).run()
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["adam-lr0.03-seed0", "natgrad-seed0"]
    run = tmp_path / "runs" / "natgrad-seed0"
    assert sorted(p.name for p in run.iterdir()) == [
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "result.json",
    ]
    config = json.loads((run / "config.json").read_text())
    assert config["problem"] == "tiny"
    assert config["rate"] is None
    assert config["batch_size"] == 12
    environment = json.loads((run / "environment.json").read_text())
    assert {"python", "torch", "threads", "cpu", "natgrad", "commit"} <= set(environment)
    records = lines(run / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert steps[0]["damping"] == 0.5
    assert {"alpha", "momentum", "loss", "seconds"} <= set(steps[0])
    assert "rho" in steps[0]
    assert "rho" not in steps[1]  # not measured on that step
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    assert [r["step"] for r in evaluations] == [0, 1, 2, 4, 5, 10, 12]
    assert {"excess", "test_loss", "test_accuracy"} <= set(evaluations[0])
    assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(steps))
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["excess"] == evaluations[-1]["excess"]


def test_every_optimiser_of_a_seed_starts_from_the_same_weights_and_sees_the_same_batches(
    problem: Problem, tmp_path: Path
) -> None:
    still = entrants(["sgd@1e-30", "adam@1e-30"], problem)
    Race(problem, still, tmp_path, Budget(steps=9), seeds=(0, 4)).run()
    losses = {p.parent.name: [r["loss"] for r in lines(p)] for p in tmp_path.glob("runs/*/metrics.jsonl")}
    assert losses["sgd-lr1e-30-seed0"] == losses["adam-lr1e-30-seed0"]
    assert losses["sgd-lr1e-30-seed4"] == losses["adam-lr1e-30-seed4"]
    assert losses["sgd-lr1e-30-seed0"] != losses["sgd-lr1e-30-seed4"]


def test_batches_are_epochs_of_permutations_that_can_start_anywhere() -> None:
    stream = epochs(10, 3, seed=5)
    drawn = [next(stream) for _ in range(7)]
    epoch = torch.cat(drawn[:3])  # type: ignore[arg-type]
    assert len(set(epoch.tolist())) == 9
    late = epochs(10, 3, seed=5, start=4)
    assert all(torch.equal(next(late), drawn[i]) for i in (4, 5, 6))  # type: ignore[arg-type]
    assert next(epochs(10, 10, seed=0)) == slice(None)


def test_evaluation_measures_the_whole_training_set(
    problem: Problem, peers: tuple[Entrant, ...], tmp_path: Path
) -> None:
    summed = replace(problem, loss_fn=nn.CrossEntropyLoss(reduction="sum"), scale=1 / 12, floor=0.25)
    for name, each in (("mean", problem), ("sum", summed)):
        Race(each, peers[:1], tmp_path / name, Budget(steps=1)).run()
    first = {n: lines(next((tmp_path / n).glob("runs/*/metrics.jsonl")))[0] for n in ("mean", "sum")}
    model = problem.build(0)
    with torch.no_grad():
        loss = float(problem.loss_fn(model(problem.train[0]), problem.train[1]))
    assert first["mean"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert first["mean"]["excess"] == pytest.approx(loss, rel=1e-5)
    assert first["sum"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert first["sum"]["excess"] == pytest.approx(loss - 0.25, rel=1e-5)


def test_finished_runs_are_kept(problem: Problem, peers: tuple[Entrant, ...], tmp_path: Path) -> None:
    race = Race(problem, peers, tmp_path, Budget(steps=5))
    race.run()
    before = {p: p.read_bytes() for p in tmp_path.glob("runs/*/*")}
    race.run()
    assert {p: p.read_bytes() for p in tmp_path.glob("runs/*/*")} == before
    Race(problem, peers, tmp_path, Budget(steps=5), seeds=(0, 1)).run()
    assert all(p.read_bytes() == content for p, content in before.items())
    assert len(read_race(tmp_path)[1]) == 4


@pytest.mark.parametrize("checkpoints", [True, False])
def test_an_interrupted_race_goes_on_as_if_nothing_had_happened(
    checkpoints: bool, problem: Problem, fake: Entrant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropout = replace(
        problem, make_model=lambda seed: nn.Sequential(nn.Dropout(0.3), problem.make_model(seed))
    )
    budget = Budget(steps=12, evaluate_every=5)
    Race(dropout, (fake,), tmp_path / "whole", budget).run()
    monkeypatch.setattr(race_module, "_CHECKPOINT_EVERY", 0.0 if checkpoints else 1e9)
    race = Race(dropout, (fake,), tmp_path / "cut", budget)
    with pytest.raises(KeyboardInterrupt):
        race.run(Interrupting(8))
    run = tmp_path / "cut" / "runs" / "natgrad-seed0"
    assert (run / "checkpoint.pt").exists() == checkpoints
    assert not (run / "result.json").exists()
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "st')  # as a power cut leaves it
    heard: list[float] = []

    class Hearing(Silent):
        def start(self, leg: Any, spent: float) -> None:
            heard.append(spent)

    race.run(Hearing())
    assert heard == [pytest.approx(7 / 12) if checkpoints else 0]

    def told(folder: str) -> list[Any]:
        keep = ("kind", "step", "loss", "excess", "damping")
        return [
            [r.get(k) for k in keep]
            for r in lines(tmp_path / folder / "runs" / "natgrad-seed0" / "metrics.jsonl")
        ]

    assert told("cut") == told("whole")
    assert not (run / "checkpoint.pt").exists()


# torch imports its forward-mode decompositions through torch.jit.script, which it deprecates itself
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_natgrads_own_run_goes_on_where_it_was(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    natgrad = entrants(["natgrad"], problem)
    monkeypatch.setattr(race_module, "_CHECKPOINT_EVERY", 0.0)
    Race(problem, natgrad, tmp_path / "whole", Budget(steps=14)).run()
    race = Race(problem, natgrad, tmp_path / "cut", Budget(steps=14))
    with pytest.raises(KeyboardInterrupt):
        race.run(Interrupting(9))
    race.run()
    whole, cut = (read_race(tmp_path / name)[1][0] for name in ("whole", "cut"))
    assert [r["step"] for r in cut.steps] == list(range(1, 15))
    for key in ("loss", "damping", "alpha", "momentum", "rho"):  # to the last bit is the optimiser's own law
        mine, theirs = ([r[key] for r in run.steps if key in r] for run in (cut, whole))
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert {"damping", "alpha", "momentum"} <= set(whole.steps[0])
    assert any("rho" in r for r in whole.steps)


def test_a_checkpoint_that_does_not_fit_means_a_fresh_start(
    problem: Problem, fake: Entrant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race_module, "_CHECKPOINT_EVERY", 0.0)
    race = Race(problem, (fake,), tmp_path / "cut", Budget(steps=8))
    with pytest.raises(KeyboardInterrupt):
        race.run(Interrupting(5))
    path = tmp_path / "cut" / "runs" / "natgrad-seed0" / "checkpoint.pt"
    state = torch.load(path)
    del state["optimizer"]["count"]  # as another version would have it
    torch.save(state, path)
    race.run()
    Race(problem, (fake,), tmp_path / "whole", Budget(steps=8)).run()
    whole, cut = (read_race(tmp_path / name)[1][0] for name in ("whole", "cut"))
    assert [r["loss"] for r in cut.steps] == [r["loss"] for r in whole.steps]


def test_a_run_that_cannot_even_start_is_told_in_the_bars(
    problem: Problem, peers: tuple[Entrant, ...], tmp_path: Path
) -> None:
    def impossible(*arguments: Any) -> Any:
        raise ConfigError("not with this model")

    stream = io.StringIO()
    field = (Entrant("impossible", "impossible", impossible), *peers)
    results = Race(problem, field, tmp_path, Budget(steps=2)).run(Bars(stream))
    assert results["impossible-seed0"]["status"] == "failed"
    assert "not with this model" in stream.getvalue()


def test_a_torn_checkpoint_means_a_fresh_start(
    problem: Problem, fake: Entrant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race_module, "_CHECKPOINT_EVERY", 0.0)
    race = Race(problem, (fake,), tmp_path, Budget(steps=8))
    with pytest.raises(KeyboardInterrupt):
        race.run(Interrupting(5))
    (tmp_path / "runs" / "natgrad-seed0" / "checkpoint.pt").write_bytes(b"half a ")
    assert race.run()["natgrad-seed0"]["status"] == "finished"
    assert [r["step"] for r in read_race(tmp_path)[1][0].steps] == list(range(1, 9))


def test_a_folder_of_another_configuration_is_left_alone(
    problem: Problem, peers: tuple[Entrant, ...], tmp_path: Path
) -> None:
    Race(problem, peers, tmp_path, Budget(steps=3)).run()
    with pytest.raises(RunError, match=r"another configuration \(batch_size: 12 there, 24 now\)"):
        Race(problem, peers, tmp_path, Budget(steps=3), batch_size=24).run()
    with pytest.raises(RunError, match="holds a race on 'tiny'"):
        Race(replace(problem, name="other"), peers, tmp_path, Budget(steps=3)).run()


class Exploding(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(math.nan)


class Refusing(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise NonFiniteError("the loss of step 1 is nan")


class Broken(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("size mismatch\nand a long story")


def entrant(kind: type[torch.optim.SGD], name: str) -> Entrant:
    return Entrant(name, name, lambda model, loss_fn, rate, seed: kind(model.parameters(), lr=0.1))


def test_a_run_that_diverges_or_fails_does_not_stop_the_race(
    problem: Problem, peers: tuple[Entrant, ...], tmp_path: Path
) -> None:
    field = (
        entrant(Exploding, "exploding"),
        entrant(Refusing, "refusing"),
        entrant(Broken, "broken"),
        *peers,
    )
    results = Race(problem, field, tmp_path, Budget(steps=6)).run()
    assert [results[f"{n}-seed0"]["status"] for n in ("exploding", "refusing", "broken")] == [
        "diverged",
        "diverged",
        "failed",
    ]
    assert results["exploding-seed0"]["step"] == 1
    assert results["refusing-seed0"]["message"] == "the loss of step 1 is nan"
    assert results["broken-seed0"]["message"] == "RuntimeError: size mismatch"
    assert results["adam-lr0.03-seed0"]["status"] == "finished"
    for path in tmp_path.glob("runs/*/*.json*"):
        for line in lines(path) if path.suffix == ".jsonl" else [json.loads(path.read_text())]:
            json.dumps(line, allow_nan=False)  # any JSON reader can read it


def test_when_every_run_fails_the_reason_is_raised(problem: Problem, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="every run failed; the first: RuntimeError: size mismatch"):
        Race(problem, (entrant(Broken, "broken"),), tmp_path, Budget(steps=2)).run()


def test_tuning_tries_a_grid_on_the_first_seed_and_races_with_the_best(
    problem: Problem, fake: Entrant, tmp_path: Path
) -> None:
    field = (fake, *entrants(["sgd", "adam@0.02"], problem))
    results = Race(problem, field, tmp_path, Budget(steps=10), seeds=(3, 4), tune=True).run()
    race, runs = read_race(tmp_path)
    tried = {
        r.config["rate"]: r.result["excess"]
        for r in runs
        if r.config["optimizer"] == "sgd" and r.config["seed"] == 3
    }  # type: ignore[index]
    assert {0.03, 0.1, 0.3, 1.0, 3.0} <= set(tried)
    best = min(tried, key=lambda rate: tried[rate])
    rows = {row["label"]: row for row in race["entrants"]}
    assert rows["SGD"]["rate"] == best
    assert rows["Adam @ 0.02"]["grid"] == []
    assert rows["natgrad"]["grid"] == []
    assert f"sgd-lr{best:g}-seed4" in results
    assert sum(name.endswith("seed4") for name in results) == 3  # the grid is for the first seed


def test_a_grid_grows_while_its_best_is_at_the_edge(problem: Problem, tmp_path: Path) -> None:
    timid = entrants(["sgd"], problem)[0].at(1e-4)
    Race(problem, (timid,), tmp_path, Budget(steps=10), tune=True).run()
    rates = sorted(r.config["rate"] for r in read_race(tmp_path)[1])
    assert rates == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]


def test_a_budget_of_seconds_counts_training_only(
    problem: Problem, peers: tuple[Entrant, ...], tmp_path: Path
) -> None:
    results = Race(problem, peers, tmp_path, Budget(seconds=0.05)).run()
    assert all(0.05 <= r["seconds"] < 0.5 for r in results.values())
    _, runs = read_race(tmp_path)
    assert all(r.evaluations[-1]["step"] == r.steps[-1]["step"] for r in runs)


def test_names_of_entrants(problem: Problem) -> None:
    named = entrants(["natgrad", "adam", "sgd@0.2"], problem)
    assert [(e.rate, e.pinned, e.ours) for e in named] == [
        (None, False, True),
        (0.03, False, False),
        (0.2, True, False),
    ]
    assert named[1].grid() == (0.003, 0.01, 0.03, 0.1, 0.3)
    with pytest.raises(UnknownNameError, match="did you mean 'adamw' or 'adam'"):
        entrants(["adamww"], problem)
    for wrong in ("sgd@fast", "sgd@-1", "sgd@nan"):
        with pytest.raises(ConfigError, match="positive number"):
            entrants([wrong], problem)
    with pytest.raises(ConfigError, match="named twice"):
        entrants(["sgd", "sgd"], problem)


def test_muon_steps_matrices_and_the_rest_and_is_left_out_where_it_crawls(
    problem: Problem, peers: tuple[Entrant, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    muon = entrants(["muon"], problem)[0]
    if hasattr(torch.optim, "Muon"):
        model = problem.build(0)
        optimizer = muon.build(model, problem.loss_fn, 0.01, 0)
        assert isinstance(optimizer, MuonWithAdamW)
        before = [p.clone() for p in model.parameters()]
        problem.loss_fn(model(problem.train[0]), problem.train[1]).backward()
        optimizer.step()
        assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        optimizer.load_state_dict(optimizer.state_dict())
    monkeypatch.setattr(peers_module, "_bfloat16_slowdown", lambda: 60.0)
    assert unavailable(muon) is not None
    assert "60× slower" in (unavailable(muon) or "") or not hasattr(torch.optim, "Muon")
    Race(problem, (muon, *peers), tmp_path, Budget(steps=2)).run()
    assert list(read_race(tmp_path)[0]["left_out"]) == ["muon"]
    with pytest.raises(ConfigError, match="no optimiser can run here"):
        Race(problem, (muon,), tmp_path, Budget(steps=2)).run()


def test_what_a_race_refuses(problem: Problem, peers: tuple[Entrant, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="between 1 and the 48"):
        Race(problem, peers, tmp_path, Budget(steps=2), batch_size=49)
    with pytest.raises(ConfigError, match="seed"):
        Race(problem, peers, tmp_path, Budget(steps=2), seeds=(1, 1))
    with pytest.raises(ConfigError, match="positive"):
        Race(problem, peers, tmp_path, Budget(steps=2), target=-1.0)
    with pytest.raises(ConfigError, match="either steps or seconds"):
        Budget()


def test_plain_lines_tell_the_race(problem: Problem, fake: Entrant, tmp_path: Path) -> None:
    stream = io.StringIO()
    Race(problem, (fake,), tmp_path, Budget(steps=4)).run(Lines(stream, every=0.0))
    text = stream.getvalue()
    assert "tiny: a tiny network" in text
    assert "[1/1] natgrad, seed 0" in text
    assert "λ 0.5" in text
    assert "α 0.5" in text
    assert "after 4 steps" in text
    assert "\x1b" not in text


def test_bars_draw_in_a_terminal(problem: Problem, fake: Entrant, tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    exploding = entrant(Exploding, "exploding")
    Race(problem, (fake, exploding), tmp_path, Budget(steps=4)).run(Bars(stream))
    assert "natgrad, seed 0" in stream.getvalue()
    assert "after 4 steps" in stream.getvalue()
    assert "diverged at step 1" in stream.getvalue()
