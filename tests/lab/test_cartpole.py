"""CartPole in a race: equal samples from equal starts, measured by what the mean return lacks."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import natgrad
from natgrad.errors import ConfigError
from natgrad.lab import cartpole
from natgrad.lab.cartpole import CartPole, Rollout, advantages_of, mean_return, play, surrogate
from natgrad.lab.peers import entrants, unavailable
from natgrad.lab.plan import Budget
from natgrad.lab.problems import load_problem
from natgrad.lab.race import Race
from natgrad.lab.report import report_lines, write_report
from natgrad.lab.runs import read_race
from natgrad.lab.summary import summarise
from tests.lab.runs import Interrupting, evaluations


@pytest.fixture
def problem() -> CartPole:
    """With fewer copies."""
    pytest.importorskip("gymnasium")
    whole = load_problem("cartpole")
    assert isinstance(whole, CartPole)
    return replace(whole, copies=3)


class Still(torch.nn.Module):
    """Pushes to one side, whatever happens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([-50.0, 50.0]).expand(len(x), 2)


def written_out(rollout: Rollout, copy: int, weights: torch.Tensor, weight: float) -> torch.Tensor:
    """Generalised advantages of one copy, as the paper prints them: a sum for each step up to the episode's end."""
    values = cartpole.features_of(rollout.observations[:, copy]).double() @ weights
    fell, counts = rollout.fell[:, copy], rollout.counts[:, copy]
    found = []
    for t in range(len(fell)):
        total, k = 0.0, t
        while counts[t] and k < len(fell):
            following = 0.0 if fell[k] else cartpole.DISCOUNT * float(values[k + 1])
            total += (cartpole.DISCOUNT * weight) ** (k - t) * (1 + following - float(values[k]))
            if fell[k]:
                break
            k += 1
        found.append(total)
    return torch.tensor(found, dtype=torch.float64)


def test_a_rollout_is_a_function_of_the_policy_and_the_seed_and_takes_equally_many_steps(
    problem: CartPole,
) -> None:
    model = problem.build(0)
    first, again, other = play(model, 3, 7), play(model, 3, 7), play(model, 3, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.observations[0], other.observations[0])
    assert torch.equal(first.observations[0], play(Still(), 3, 7).observations[0])
    for rollout in (first, other):
        assert rollout.fell.shape == (500, 3)
        assert int(rollout.counts.sum()) == rollout.fell.numel() - int(rollout.fell[:-1].sum())


def test_the_measure_is_what_the_mean_return_of_whole_episodes_lacks(problem: CartPole) -> None:
    """Against episodes of gymnasium's own CartPole-v1, one at a time."""
    gymnasium = pytest.importorskip("gymnasium")
    environment, returns = gymnasium.make("CartPole-v1"), []
    for seed in range(100):
        environment.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            _, reward, ended, cut, _ = environment.step(1)
            total, over = total + float(reward), ended or cut
        returns.append(total)
    expected = sum(returns) / len(returns)
    assert mean_return(Still()) == pytest.approx(expected, abs=0.5)
    assert problem.judge(Still())["excess"] == 500 - mean_return(Still())


@pytest.mark.parametrize("weight", [0.0, 0.9, 1.0])
def test_advantages_are_those_of_values_that_leave_nothing_to_the_features(
    problem: CartPole, weight: float
) -> None:
    rollout = play(problem.build(1), 2, 3, steps=120)
    assert rollout.fell.any()
    found = advantages_of(rollout, weight)
    features = cartpole.features_of(rollout.observations[:-1]).double()
    for copy, other in ((0, 1), (1, 0)):
        # affine in the weights of V: found by finite differences of the formula, and solved for on the other copy
        unit = torch.eye(15, dtype=torch.float64)
        base = written_out(rollout, other, torch.zeros(15, dtype=torch.float64), weight)
        slope = torch.stack([written_out(rollout, other, e, weight) for e in unit], 1)
        A = features[:, other].mT @ (slope - base[:, None])
        ridge = 1e-5 * int(rollout.counts.sum()) * unit
        weights = torch.linalg.solve(ridge - A, features[:, other].mT @ base)
        expected = written_out(rollout, copy, weights, weight)
        torch.testing.assert_close(found[:, copy].double(), expected, rtol=1e-3, atol=1e-3)


def test_peers_follow_the_policy_gradient_and_natgrad_the_natural_one_of_the_same_batch(
    problem: CartPole,
) -> None:
    model = problem.build(0)
    batch = problem.drawn(model, 5)
    model.zero_grad()
    problem.loss(model, None, 5).backward()
    parameters = list(model.parameters())
    gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    log_p = model(batch.observations).log_softmax(1)[torch.arange(len(batch.actions)), batch.actions]
    plain = torch.autograd.grad(-(log_p * batch.advantages).mean(), parameters)
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in plain]))
    before = torch.cat([p.detach().flatten().clone() for p in parameters])
    (entrant,) = entrants(["natgrad"], problem)
    optimizer = entrant.build(model, problem.likelihood, entrant.rate, 0)
    optimizer.step(problem.residuals_of(model, 5))  # type: ignore[arg-type]
    after = torch.cat([p.detach().flatten() for p in parameters])
    F = natgrad.fisher(
        problem.build(0), natgrad.Categorical(), (batch.observations, batch.actions), metric="dense"
    )
    expected = -F.solve(gradient, damping=problem.settings["damping"])
    cosine = torch.nn.functional.cosine_similarity(after - before, expected, dim=0)
    assert float(cosine) > 1 - 1e-4
    assert float(surrogate(model, batch).detach()) == pytest.approx(0.0, abs=1e-6)


def test_everyone_starts_from_the_same_policy_and_is_timed_to_the_target(
    problem: CartPole, tmp_path: Path
) -> None:
    problem = replace(problem, target=400.0)
    field = entrants(["natgrad", "adam", "sgd", "lbfgs"], problem)
    Race(problem, field, tmp_path, Budget(steps=6, evaluate_every=2)).run()
    told = evaluations(tmp_path)
    assert set(told) == {
        "natgrad",
        "adam",
        "sgd",
    }  # whose samples are its own, L-BFGS can't search a line with
    assert len({evaluated[0]["excess"] for evaluated in told.values()}) == 1
    assert told["natgrad"][0]["excess"] > 450
    assert told["natgrad"][-1]["excess"] < 400
    summary = summarise(*read_race(tmp_path))
    ours = summary.standings[0]
    assert ours.ours
    assert ours.steps is not None
    assert 1 <= ours.steps.median <= 6
    assert "shortfall in return of 400 points of 500" in summary.headline
    race = json.loads((tmp_path / "race.json").read_text())
    assert (race["batch_size"], race["things"]) == (1500, "environment steps")
    page, lines = write_report(tmp_path).read_text(), report_lines(tmp_path)
    for words in (
        "Shortfall against steps",
        "1,500 environment steps a step",
        "against the greatest possible, 500, over 100 episodes",
        "by the same random numbers",
        "natgrad was given lr=TrustRegion(kl=0.02",
        "The steps that natgrad took",
    ):
        assert words in page
    assert "shortfall at the end" in lines
    assert "xcess" not in page + lines
    assert "nothing else to tune" not in page


def test_an_interrupted_run_goes_on_with_the_episodes_of_its_step(
    problem: CartPole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from natgrad.lab import race as race_module

    field, budget = entrants(["natgrad"], problem), Budget(steps=4, evaluate_every=2)
    Race(problem, field, tmp_path / "whole", budget).run()
    monkeypatch.setattr(race_module, "_CHECKPOINT_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        Race(problem, field, tmp_path / "twice", budget).run(Interrupting(3))
    Race(problem, field, tmp_path / "twice", budget).run()
    whole, twice = (evaluations(tmp_path / which)["natgrad"] for which in ("whole", "twice"))
    assert [e["excess"] for e in whole] == [e["excess"] for e in twice]


def test_other_metrics_get_the_trust_region_too(problem: CartPole, tmp_path: Path) -> None:
    Race(problem, entrants(["natgrad-kfac"], problem), tmp_path, Budget(steps=2)).run()
    assert read_race(tmp_path)[1][0].status == "finished"


def test_what_cannot_be_chosen_or_is_missing_is_said(
    problem: CartPole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match="a step of 'cartpole' takes 1,500 environment steps: no batch size"
    ):
        Race(problem, entrants(["adam"], problem), tmp_path, Budget(steps=1), batch_size=10)
    assert unavailable(entrants(["lbfgs"], problem)[0], batches=True) is not None
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ConfigError, match=r'gymnasium is needed for CartPole: pip install "natgrad\[rl\]"'):
        load_problem("cartpole")


@pytest.mark.slow
def test_natgrad_solves_the_task_within_its_budget(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    problem = load_problem("cartpole")
    budget = Budget(steps=problem.steps, evaluate_every=problem.evaluate_every)
    Race(problem, entrants(["natgrad"], problem), tmp_path, budget, seeds=(5, 6, 7)).run()
    (standing,) = summarise(*read_race(tmp_path)).standings
    assert standing.steps is not None
    assert standing.steps.high <= problem.steps
