"""What the optimiser sees, and what it leaves alone: evaluation, random numbers, copies, other optimisers."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import natgrad
from tests.optim.runs import METRICS, Run, batches, for_every, net, parameters


@for_every
def test_what_is_evaluated_between_steps_leaves_no_trace(metric: str, mode: str) -> None:
    quiet, busy = Run.of(metric, mode), Run.of(metric, mode)
    other = batches(2, 30, seed=5)

    def look_around(run: Run) -> None:
        with torch.no_grad():
            run.value(other[0])
        with torch.inference_mode():
            run.value(other[1])
        run.value(other[0])  # with a graph that nobody uses
        run.model(other[1][0])
        run.model.eval()
        run.value(other[1])
        run.model.train()

    for batch in batches(6):
        quiet.step(batch)
        look_around(busy)
        busy.optimizer.zero_grad()
        look_around(busy)
        value = busy.value(batch)
        with torch.no_grad():
            busy.value(other[0])
        value.backward()
        look_around(busy)
        busy.optimizer.step()
        assert torch.equal(parameters(quiet.model), parameters(busy.model))


@for_every
def test_dropout_and_the_users_random_numbers_are_left_alone(metric: str, mode: str) -> None:
    """The user's stream moves as it does with torch's own optimiser, and ρ is measured with the same mask."""
    data, states = batches(6), []
    for optimizer in ("ours", "torch"):
        run = Run.of(metric, mode, net(dropout=0.4))
        if optimizer == "torch":
            run.optimizer = torch.optim.SGD(run.model.parameters(), 0.1)
        torch.manual_seed(11)
        run.train(data)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("metric", METRICS)
def test_running_statistics_are_those_of_the_users_forward_passes(metric: str) -> None:
    def normed() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Linear(2, 5), nn.BatchNorm1d(5, affine=False), nn.Tanh(), nn.Linear(5, 3)
            ).double()

    run = Run.of(metric, "adaptive", normed(), damping=natgrad.LevenbergMarquardt(period=1))
    norm, mean = run.model[1], torch.zeros(5, dtype=torch.float64)
    for k, (x, y) in enumerate(batches(4), start=1):
        mean = 0.9 * mean + 0.1 * run.model[0](x).detach().mean(0)
        run.step((x, y))
        torch.testing.assert_close(norm.running_mean, mean)
        assert norm.num_batches_tracked == k


def test_small_batches_pass_batch_normalisation() -> None:
    model = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3)).double()
    run = Run.of("kfac", "adaptive", model)
    run.train(batches(12, size=4))


def test_two_optimisers_on_one_model_and_loss_do_not_disturb_each_other() -> None:
    def groups(model: nn.Module, k: int) -> list:
        return list(model[3 * k].parameters())

    ends = []
    for both in (False, True):
        model, loss = net(), nn.CrossEntropyLoss()
        first = natgrad.NaturalGradient(model, loss, groups(model, 0), lr=0.1, metric="dense")
        second = natgrad.NaturalGradient(model, loss, groups(model, 1), metric="kfac") if both else None
        frozen = parameters(model)[15:]
        for x, y in batches(5):
            if second is not None:
                value = loss(model(x), y)
                second.zero_grad()
                value.backward()  # the second sees every batch, but takes no step
            first.zero_grad()
            loss(model(x), y).backward()
            first.step()
        assert torch.equal(parameters(model)[15:], frozen)
        ends.append(parameters(model))
    assert torch.equal(*ends)


def test_two_optimisers_take_turns_on_one_model() -> None:
    model, loss = net(), nn.CrossEntropyLoss()
    halves = [
        natgrad.NaturalGradient(model, loss, list(model[k].parameters()), metric=metric)
        for k, metric in ((0, "kfac"), (3, "diagonal"))
    ]
    (test,) = batches(1, 400, seed=9)
    before = loss(model(test[0]), test[1]).item()
    for x, y in batches(20):
        for half in halves:
            half.zero_grad()
        loss(model(x), y).backward()
        for half in halves:
            half.step()
    assert loss(model(test[0]), test[1]).item() < before


def test_two_models_may_share_one_loss_object() -> None:
    loss, ends = nn.CrossEntropyLoss(), []
    for shared in (False, True):
        mine = Run(net(), loss, None)
        mine.optimizer = natgrad.NaturalGradient(mine.model, loss, metric="dense")
        theirs = Run.of("kfac", "adaptive", net(seed=4), loss=loss if shared else nn.CrossEntropyLoss())
        for batch, other in zip(batches(6), batches(6, 31, seed=3)):
            value = theirs.value(other)
            mine.step(batch)
            theirs.optimizer.zero_grad()
            value.backward()
            theirs.optimizer.step()
        ends.append(torch.cat([parameters(mine.model), parameters(theirs.model)]))
    assert torch.equal(*ends)


def test_a_dropped_optimiser_leaves_nothing_behind() -> None:
    model, loss = net(), nn.CrossEntropyLoss()
    optimizer = natgrad.NaturalGradient(model, loss)
    assert model._forward_hooks
    assert loss._forward_hooks
    del optimizer  # no reference cycle keeps it
    for module in (model, loss):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_is_not_watched(how: str) -> None:
    quiet, run = Run.of("kfac", "adaptive"), Run.of("kfac", "adaptive")
    for batch, (x, y) in zip(batches(5), batches(5, seed=2)):
        quiet.step(batch)
        if how == "deepcopy":
            average, loss = copy.deepcopy(run.model), copy.deepcopy(run.loss)
        else:
            buffer = io.BytesIO()
            torch.save((run.model, run.loss), buffer)
            buffer.seek(0)
            average, loss = torch.load(buffer, weights_only=False)
        run.optimizer.zero_grad()
        value = run.value(batch)
        loss(average(x), y).backward()
        run.loss(average(x), y).backward()
        value.backward()
        run.optimizer.step()
    assert torch.equal(parameters(quiet.model), parameters(run.model))


def test_torch_func_may_differentiate_the_model_meanwhile() -> None:
    quiet, run = Run.of("kfac", "adaptive"), Run.of("kfac", "adaptive")

    def per_example(values: dict, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return run.loss(torch.func.functional_call(run.model, values, (x[None],)), y[None])

    for x, y in batches(3):
        quiet.step((x, y))
        values = {name: p.detach() for name, p in run.model.named_parameters()}
        torch.func.vmap(torch.func.grad(per_example), (None, 0, 0), randomness="different")(values, x, y)
        run.step((x, y))
    assert torch.equal(parameters(quiet.model), parameters(run.model))


def test_a_model_that_raises_leaves_the_optimiser_whole() -> None:
    quiet, run = Run.of("kfac", "adaptive"), Run.of("kfac", "adaptive")
    for batch in batches(3):
        quiet.step(batch)
        with pytest.raises(RuntimeError):
            run.model(torch.randn(5, 7, dtype=torch.float64))
        run.step(batch)
    assert torch.equal(parameters(quiet.model), parameters(run.model))


def test_a_closure_that_raises_leaves_the_optimiser_whole() -> None:
    quiet, run = Run.of("kfac", "adaptive"), Run.of("kfac", "adaptive")

    def broken() -> None:
        raise KeyError("the user's own")

    for batch in batches(3):
        quiet.step(batch)
        with pytest.raises(KeyError):
            run.optimizer.step(broken)
        run.optimizer.step(run.closure(batch))
    assert torch.equal(parameters(quiet.model), parameters(run.model))
