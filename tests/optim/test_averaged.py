"""`optimizer.averaged()`: the model at the polynomial average of its iterates, and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import natgrad
from natgrad import StepError
from natgrad.optim.averaging import weight_of
from tests.optim.runs import Run, batches, parameters


def shown(run: Run) -> torch.Tensor:
    with run.optimizer.averaged():
        return parameters(run.model)


def oracle(iterates: list[torch.Tensor], order: float) -> torch.Tensor:
    """Σ_t Γ(t+γ)/Γ(t) θ_t over the sum of these weights, iterates counted from 1."""
    t = torch.arange(1.0, len(iterates) + 1, dtype=torch.float64)
    weights = ((t + order).lgamma() - t.lgamma()).exp()
    return (weights[:, None] * torch.stack(iterates)).sum(0) / weights.sum()


@pytest.mark.parametrize("order", [0.0, 8.0])
@pytest.mark.parametrize("confirmed", [0.0, -0.7])
def test_where_nothing_is_confirmed_it_is_the_weighted_mean_of_all_iterates(
    order: float, confirmed: float
) -> None:
    iterates = list(torch.randn(7, 5, dtype=torch.float64))
    mean = iterates[0]
    for step, theta in enumerate(iterates):
        mean = mean.lerp(theta, weight_of(step, order, confirmed))
    torch.testing.assert_close(mean, oracle(iterates, order))


@pytest.mark.parametrize("metric", ["kfac", "tempered"])
@pytest.mark.parametrize("order", [0.0, 8.0])
def test_an_iterate_counts_as_its_place_or_what_was_confirmed_says(metric: str, order: float) -> None:
    run = Run.of(metric, "adaptive", lr=natgrad.AdaptiveStep(average=order))
    mean, seen = parameters(run.model), []
    torch.testing.assert_close(shown(run), mean)
    for step, batch in enumerate(batches(8), start=1):
        before = parameters(run.model)
        run.step(batch)
        confirmation = run.optimizer._confirmation
        seen.append(confirmation.ratio if confirmation.count else 0.0)
        mean = mean.lerp(before, weight_of(step - 1, order, seen[-1]))
        torch.testing.assert_close(
            shown(run), mean.lerp(parameters(run.model), weight_of(step, order, seen[-1]))
        )
    assert seen[0] == 0.0
    assert any(0 < part < 1 for part in seen)


def test_without_noise_it_does_not_lag() -> None:
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(4, 2).double(), nn.MSELoss()
    optimizer = natgrad.NaturalGradient(
        model, loss_fn, lr=natgrad.AdaptiveStep(fraction=1.0), damping=natgrad.ConstantDamping(1.0)
    )
    x, y = torch.randn(32, 4, dtype=torch.float64), torch.randn(32, 2, dtype=torch.float64)
    for _ in range(5):
        before = parameters(model)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    here = parameters(model)
    assert (here - before).abs().max() > 1e-3
    with optimizer.averaged():
        torch.testing.assert_close(parameters(model), here, rtol=1e-9, atol=1e-12)


def test_the_parameters_come_back_to_the_last_bit_even_after_an_error() -> None:
    run = Run.of("tempered", "adaptive")
    before = run.train(batches(3))
    with pytest.raises(RuntimeError, match="mine"), run.optimizer.averaged():
        assert not torch.equal(parameters(run.model), before)
        raise RuntimeError("mine")
    assert torch.equal(parameters(run.model), before)


def test_a_look_at_it_changes_nothing_in_the_run() -> None:
    looked, left = Run.of("tempered", "adaptive"), Run.of("tempered", "adaptive")
    for batch in batches(8):
        looked.step(batch)
        left.step(batch)
        with looked.optimizer.averaged(), torch.no_grad():
            looked.model(batch[0])
    assert torch.equal(parameters(looked.model), parameters(left.model))


def test_it_is_saved() -> None:
    run = Run.of("tempered", "adaptive")
    run.train(batches(4))
    state, weights = copy.deepcopy(run.optimizer.state_dict()), copy.deepcopy(run.model.state_dict())
    other = Run.of("tempered", "adaptive")
    other.model.load_state_dict(weights)
    other.optimizer.load_state_dict(state)
    assert torch.equal(shown(other), shown(run))
    run.train(batches(3, seed=5))
    other.train(batches(3, seed=5))
    assert torch.equal(shown(other), shown(run))


def test_a_step_that_is_taken_back_does_not_stay_in_it() -> None:
    run, data = Run.of("kfac", "adaptive"), batches(9)
    run.train(data[:8])
    good = parameters(run.model)
    for p in run.model.parameters():
        wrong = 30 * torch.randn_like(p)
        run.optimizer.state[p]["last"] += wrong
        p.data += wrong
    run.step(data[8])
    assert run.optimizer.info.undone
    assert (shown(run) - good).abs().max() < 3


def test_steps_inside_it_are_refused_before_anything_moves() -> None:
    run = Run.of("tempered", "adaptive")
    before = run.train(batches(3))
    with run.optimizer.averaged():
        inside = parameters(run.model)
        with pytest.raises(StepError, match="averaged"):
            run.step(batches(1)[0])
        assert torch.equal(parameters(run.model), inside)
        with pytest.raises(StepError, match="already"), run.optimizer.averaged():
            pass
    assert torch.equal(parameters(run.model), before)
    run.train(batches(2))


@pytest.mark.parametrize("lr", [0.1, natgrad.AdaptiveStep(average=None), natgrad.Grafted("adam", 1e-3)])
def test_where_none_is_kept_it_says_what_to_use(lr: object) -> None:
    run = Run.of("kfac", "adaptive", lr=lr)
    run.train(batches(2))
    assert not run.optimizer.averages
    assert not any("average" in state for state in run.optimizer.state.values())
    with pytest.raises(StepError, match="AveragedModel"), run.optimizer.averaged():
        pass


def test_residuals_have_none() -> None:
    model = nn.Linear(2, 1)
    optimizer = natgrad.NaturalGradient(model, metric="exact")
    assert not optimizer.averages


def test_running_statistics_are_not_the_averages() -> None:
    model = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    run = Run.of("tempered", "adaptive", model)
    run.train(batches(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with run.optimizer.averaged(), torch.no_grad():
        torch.optim.swa_utils.update_bn([x for x, _ in batches(2)], model)
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_step_that_was_skipped_joins_once() -> None:
    run = Run.of("tempered", "adaptive", on_nonfinite="skip")
    data = batches(6)
    run.train(data[:3])
    iterates = shown(run)
    x, y = data[3]
    run.step((x * float("nan"), y))
    torch.testing.assert_close(shown(run), iterates, rtol=0, atol=0)
