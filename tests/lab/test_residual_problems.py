"""Problems of residuals in a race: measured by their error, trained by everybody on one and the same loss."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from natgrad.errors import ConfigError
from natgrad.lab import equations, fitting, ising
from natgrad.lab.peers import entrants, share_of_rate
from natgrad.lab.plan import Budget
from natgrad.lab.problem import ResidualProblem, sum_of_squares
from natgrad.lab.problems import load_problem
from natgrad.lab.race import Race
from natgrad.lab.report import report_lines, write_report
from natgrad.lab.runs import read_race
from natgrad.lab.summary import summarise
from tests.lab.runs import Interrupting, evaluations

NAMES = ("poisson-2d", "poisson-5d", "heat", "helmholtz", "misra1a", "boxbod", "thurber", "mgh09", "mgh10")


def small(name: str) -> ResidualProblem:
    """An equation on 7 points a side."""
    key = {"poisson-2d": "Poisson, 2-D", "poisson-5d": "Poisson, 5-D"}[name]
    return equations.equation_problem(name, key, "made small", 1e-5, adam=0.03, side=7)


@pytest.mark.parametrize("name", [*NAMES, "linear-gaussian"])
def test_a_registered_problem_builds_and_has_an_error(name: str) -> None:
    if name == "linear-gaussian":
        pytest.importorskip("mpmath")
    problem = load_problem(name)
    assert isinstance(problem, ResidualProblem)
    first, again = problem.build(0), problem.build(0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    judged = problem.judge(first)
    assert judged["excess"] > problem.target
    assert judged == problem.judge(again)
    batch = next(problem.batches(problem.examples, 0))
    assert float(problem.loss(first, None, batch).detach()) > 0


def test_starts_of_a_fit_are_nists_for_the_first_seeds_and_lie_near_the_last_for_others() -> None:
    problem, fit = fitting.nist_misra1a(), fitting.misra1a()
    starts = [next(problem.build(seed).parameters()).detach() for seed in range(4)]
    assert starts[0].tolist() == fit.starts[0]
    assert starts[1].tolist() == fit.starts[1]
    assert not torch.equal(starts[2], starts[3])
    assert torch.allclose(starts[2], starts[1], rtol=0.1)


def test_points_are_drawn_anew_or_stay_and_are_a_function_of_the_seed_and_the_step() -> None:
    fresh, fixed = small("poisson-5d"), small("poisson-2d")
    stream = fresh.batches(0, seed=3)
    drawn = [next(stream)[0] for _ in range(4)]
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(next(fresh.batches(0, seed=3, start=2))[0], drawn[2])
    assert not torch.equal(next(fresh.batches(0, seed=4))[0], drawn[0])
    still = fixed.batches(0, seed=3)
    assert torch.equal(next(still)[0], next(still)[0])


def test_a_race_on_residuals_is_timed_to_a_relative_error_and_its_page_says_so(tmp_path: Path) -> None:
    problem = replace(small("poisson-2d"), target=0.3)
    field = entrants(["natgrad", "adam", "lbfgs"], problem)
    results = Race(problem, field, tmp_path, Budget(steps=40, evaluate_every=5)).run()
    assert all(r["status"] == "finished" for r in results.values())
    told = evaluations(tmp_path)
    assert told["natgrad"][0]["excess"] == told["adam"][0]["excess"]
    assert told["natgrad"][0]["loss"] == told["lbfgs"][0]["loss"]
    assert told["natgrad"][-1]["excess"] < 0.3
    assert told["lbfgs"][-1]["loss"] < told["lbfgs"][0]["loss"]
    race = json.loads((tmp_path / "race.json").read_text())
    assert race["measure"] == "relative L2 error"
    assert race["batch_size"] == 7 * 7 + 4 * 7
    page, lines = write_report(tmp_path).read_text(), report_lines(tmp_path)
    assert "a relative L2 error of 0.3" in summarise(*read_race(tmp_path)).headline
    assert "Error against seconds" in page
    assert "77 residuals a step" in page
    assert "error at the end" in lines
    assert "xcess" not in page + lines


def test_natgrad_steps_on_residuals_by_the_exact_metric_and_solves_a_regression_at_once(
    tmp_path: Path,
) -> None:
    pytest.importorskip("mpmath")
    problem = load_problem("linear-gaussian")
    Race(problem, entrants(["natgrad"], problem), tmp_path, Budget(steps=4, evaluate_every=1)).run()
    assert evaluations(tmp_path)["natgrad"][-1]["excess"] < 1e-8


@pytest.mark.parametrize("name", ["misra1a", "thurber", "mgh09", "mgh10"])
def test_natgrad_fits_nists_problems(name: str, tmp_path: Path) -> None:
    problem = load_problem(name)
    Race(problem, entrants(["natgrad"], problem), tmp_path, Budget(steps=30), seeds=(1, 2)).run()
    assert all(run.evaluations[-1]["excess"] < 1e-6 for run in read_race(tmp_path)[1])


def test_an_interrupted_run_on_fresh_points_goes_on_with_the_points_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from natgrad.lab import race as race_module

    problem = small("poisson-5d")
    field, budget = entrants(["adam"], problem), Budget(steps=9, evaluate_every=3)
    Race(problem, field, tmp_path / "whole", budget).run()
    monkeypatch.setattr(race_module, "_CHECKPOINT_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        Race(problem, field, tmp_path / "twice", budget).run(Interrupting(5))
    Race(problem, field, tmp_path / "twice", budget).run()
    whole, twice = (evaluations(tmp_path / which)["adam"] for which in ("whole", "twice"))
    assert [e["excess"] for e in whole] == [e["excess"] for e in twice]


def test_a_spin_chain_is_raced_on_to_its_ground_state(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    whole = load_problem("ising")
    assert isinstance(whole, ising.SpinChain)
    exact = -2 / math.sin(math.pi / 12)  # Jordan–Wigner, n = 6
    problem = replace(whole, make_model=lambda seed: ising.LogPsi(6), spins=6, samples=300, exact=exact)
    field = entrants(["natgrad", "adam"], problem)
    assert (field[0].rate, field[0].grid()) == (0.1, ())
    Race(problem, field, tmp_path, Budget(steps=60, evaluate_every=20), tune=False).run()
    ends = {name: told[-1]["excess"] for name, told in evaluations(tmp_path).items()}
    assert -1e-12 < ends["natgrad"] < 1e-5
    assert ends["natgrad"] < 0.1 * ends["adam"]
    assert "natgrad (rate 0.1)" in summarise(*read_race(tmp_path)).headline


def test_a_chains_loss_is_its_energy_with_the_energys_gradient() -> None:
    pytest.importorskip("scipy")
    whole = load_problem("ising")
    assert isinstance(whole, ising.SpinChain)
    problem = replace(whole, make_model=lambda seed: ising.LogPsi(4), spins=4, samples=400_000, exact=-1.0)
    model = problem.build(0)
    loss = problem.loss(model, None, 0)
    loss.backward()
    s = ising.configurations(4)
    log = model(s)
    energies = ising.local_energies(model, s, 1.0)
    p = (2 * log).softmax(0).detach()
    mean = float(p @ energies)
    assert float(loss.detach()) == pytest.approx(mean, abs=0.02)
    exact = torch.autograd.grad((2 * p * (energies - mean) * log).sum(), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), exact):
        assert torch.allclose(parameter.grad, gradient, atol=0.03)


def test_residuals_are_not_taken_in_batches(tmp_path: Path) -> None:
    problem = small("poisson-2d")
    with pytest.raises(ConfigError, match="takes 77 residuals: no batch size"):
        Race(problem, entrants(["adam"], problem), tmp_path, Budget(steps=2), batch_size=5)


def test_the_loss_is_half_the_mean_of_squares_of_each_block() -> None:
    blocks = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([[2.0]])}
    assert float(sum_of_squares(blocks)) == 0.5 * (5 + 4)


def test_a_peers_rate_rises_and_falls_to_zero() -> None:
    shares = [share_of_rate(spent / 100) for spent in range(101)]
    assert 0 < shares[0] < 0.5
    assert max(shares) == shares[5] == 1
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert math.isclose(shares[-1], 0, abs_tol=1e-12)
