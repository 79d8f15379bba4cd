"""The contract of the training loop, for every metric and strategy."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import natgrad
from natgrad import StepError
from tests.optim.runs import METRICS, MODES, Run, batches, net, parameters

every = [
    pytest.mark.parametrize("mode", MODES),
    pytest.mark.parametrize("metric", METRICS),
]


def for_every(test):
    for mark in every:
        test = mark(test)
    return test


@for_every
def test_the_loop_and_the_closure_give_the_same_run(metric: str, mode: str) -> None:
    loop, closed = Run.of(metric, mode), Run.of(metric, mode)
    for batch in batches(7):
        value = loop.step(batch)
        returned = closed.optimizer.step(closed.closure(batch))
        assert returned.item() == value
        assert torch.equal(parameters(loop.model), parameters(closed.model))
    assert loop.optimizer.info.damping == closed.optimizer.info.damping


@for_every
def test_zero_grad_may_stand_anywhere(metric: str, mode: str) -> None:
    """Before the forward pass, after it, after the loss, after the step: all four are ordinary loops."""
    data, ends = batches(6), []
    for place in ("first", "after the model", "after the loss", "last"):
        run = Run.of(metric, mode)
        for x, y in data:
            if place == "first":
                run.optimizer.zero_grad()
            z = run.model(x)
            if place == "after the model":
                run.optimizer.zero_grad()
            value = run.loss(z, y)
            if place == "after the loss":
                run.optimizer.zero_grad()
            value.backward()
            run.optimizer.step()
            if place == "last":
                run.optimizer.zero_grad()
        ends.append(parameters(run.model))
    assert all(torch.equal(end, ends[0]) for end in ends[1:])


@for_every
def test_the_loss_falls(metric: str, mode: str) -> None:
    run, (test,) = Run.of(metric, mode), batches(1, 500, seed=9)
    with torch.no_grad():
        before = run.value(test)
    run.train(batches(60))
    with torch.no_grad():
        assert run.value(test) < 0.9 * before


KINDS = {
    "euclidean": "euclidean",
    "diagonal-exact": natgrad.Diagonal(kind="exact"),
    "diagonal-empirical": natgrad.Diagonal(kind="empirical"),
    "dense": "dense",
    "kfac-exact": natgrad.KFAC(kind="exact"),
    "kfac-empirical": natgrad.KFAC(kind="empirical"),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", KINDS)
def test_accumulation_over_micro_batches_is_one_batch(metric: str, mode: str, reduction: str) -> None:
    options = {"metric": KINDS[metric], "loss": nn.CrossEntropyLoss(reduction=reduction)}
    whole, parts = (Run.of("kfac", mode, **options) for _ in range(2))
    share = 1 / 4 if reduction == "mean" else 1.0
    for x, y in batches(6):
        whole.step((x, y))
        parts.optimizer.zero_grad()
        for rows in torch.arange(len(x)).chunk(4):
            (share * parts.value((x[rows], y[rows]))).backward()
        parts.optimizer.step()
        assert parts.optimizer.info.loss == pytest.approx(whole.optimizer.info.loss)
    torch.testing.assert_close(parameters(parts.model), parameters(whole.model), rtol=1e-6, atol=1e-8)
    assert parts.optimizer.damping == pytest.approx(whole.optimizer.damping)


def test_micro_batches_may_all_be_evaluated_before_any_backward_pass() -> None:
    runs = [Run.of("dense", "adaptive") for _ in range(2)]
    for x, y in batches(4, 30):  # so small that the slice is the batch: micro-batches then count in any order
        halves = [(x[:15], y[:15]), (x[15:], y[15:])]
        for run in runs:
            run.optimizer.zero_grad()
        for half in halves:
            (runs[0].value(half) / 2).backward()
        (sum(runs[1].value(half) for half in halves) / 2).backward()
        for run in runs:
            run.optimizer.step()
    torch.testing.assert_close(parameters(runs[0].model), parameters(runs[1].model), rtol=1e-9, atol=1e-12)


@for_every
def test_curvature_work_leaves_the_gradients_as_torch_makes_them(metric: str, mode: str) -> None:
    run, plain = Run.of(metric, mode), net()
    for x, y in batches(3):
        run.optimizer.zero_grad()
        run.value((x, y)).backward()
        plain.load_state_dict(run.model.state_dict())
        plain.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        for mine, theirs in zip(run.model.parameters(), plain.parameters()):
            assert torch.equal(mine.grad, theirs.grad)
        before = [p.grad.clone() for p in run.model.parameters()]
        run.optimizer.step()
        for p, g in zip(run.model.parameters(), before):
            assert torch.equal(p.grad, g)


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
def test_the_gradient_may_be_clipped(metric: str, mode: str) -> None:
    """A step with clipped gradients is a step along the clipped ones."""
    runs = [Run.of(metric, mode, momentum=0.0) for _ in range(2)]
    (batch,) = batches(1)
    starts = [parameters(run.model) for run in runs]
    for k, run in enumerate(runs):
        run.optimizer.zero_grad()
        run.value(batch).backward()
        if k:
            norm = nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)
            assert norm > 0.01
        run.optimizer.step()
    full, clipped = (parameters(run.model) - start for run, start in zip(runs, starts))
    assert runs[1].optimizer.info.grad_norm == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped, full * 0.01 / float(norm), rtol=1e-3, atol=1e-9)


def test_gradients_may_be_scaled_and_unscaled_between_backward_and_step() -> None:
    runs = [Run.of("kfac", "adaptive") for _ in range(2)]
    for batch in batches(3):
        runs[0].step(batch)
        runs[1].optimizer.zero_grad()
        (1024 * runs[1].value(batch)).backward()
        for p in runs[1].model.parameters():
            p.grad /= 1024
        runs[1].optimizer.step()
    assert torch.equal(parameters(runs[0].model), parameters(runs[1].model))


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


def test_a_fixed_step_needs_no_batch_where_no_curvature_is_due() -> None:
    model = net()
    optimizer = natgrad.NaturalGradient(model, nn.CrossEntropyLoss(), metric="euclidean", lr=0.1)
    x, y = batches(1)[0]
    start = parameters(model)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not torch.equal(parameters(model), start)


def test_parameters_without_a_gradient_stay() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 3), nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    for metric in METRICS:
        for mode in MODES:
            run = Run.of(metric, mode, Two().double())
            before = run.model.unused.weight.clone()
            run.train(batches(4))
            assert torch.equal(run.model.unused.weight, before)


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


def test_a_step_needs_a_backward_pass() -> None:
    run, (x, y) = Run.of("kfac", "adaptive"), batches(1)[0]
    with pytest.raises(StepError, match=r"backward"):
        run.optimizer.step()
    run.value((x, y))
    with pytest.raises(StepError, match=r"backward"):
        run.optimizer.step()


def test_info_says_what_the_step_did() -> None:
    run, data = Run.of("kfac", "adaptive", damping=natgrad.LevenbergMarquardt(period=2)), batches(2)
    value = run.step(data[0])
    info = run.optimizer.info
    assert info.step == 1
    assert info.loss == pytest.approx(value)
    assert info.damping == 1.0
    assert info.predicted < 0
    assert info.rho is None
    assert info.observed
    assert info.grad_norm == pytest.approx(
        torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm().item()
    )
    assert {"evaluate", "solve", "model", "apply"} <= info.seconds.keys()
    run.step(data[1])
    assert run.optimizer.info.rho == pytest.approx(run.optimizer.info.actual / run.optimizer.info.predicted)


def test_rho_is_measured_on_what_the_loss_really_did() -> None:
    run = Run.of("dense", "adaptive", damping=natgrad.LevenbergMarquardt(period=1))
    for batch in batches(5, size=20):  # so small a batch is its own slice
        before = run.step(batch)
        with torch.no_grad():
            after = run.value(batch).item()
        assert run.optimizer.info.actual == pytest.approx(after - before, rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", ["dense", "kfac-exact", "diagonal-exact"])
def test_an_example_without_a_batch_dimension_is_a_batch_of_one(metric: str, mode: str) -> None:
    ends = []
    for batched in (True, False):
        run = Run.of("kfac", mode, metric=KINDS[metric], loss=nn.MSELoss())
        for x, _ in batches(6, 1):
            y = torch.stack([x[0, 0], x[0, 1], x[0].prod()])
            run.step((x, y[None]) if batched else (x[0], y))
        ends.append(parameters(run.model))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_a_step_that_went_wrong_is_taken_back() -> None:
    run, data = Run.of("kfac", "adaptive"), batches(9)
    run.train(data[:8])
    good, damping = parameters(run.model), run.optimizer.damping
    for p in run.model.parameters():  # as if the last step had been far too long
        wrong = 30 * torch.ones_like(p)
        run.optimizer.state[p]["last"] += wrong
        p.data += wrong
    run.step(data[8])
    info = run.optimizer.info
    assert info.undone
    assert info.loss > 3
    assert run.optimizer.damping > damping
    assert info.step == 9
    last_but_one = Run.of("kfac", "adaptive")
    last_but_one.train(data[:7])
    torch.testing.assert_close(parameters(run.model), parameters(last_but_one.model))
    assert not torch.equal(parameters(run.model), good)
    run.train(batches(5, seed=4))
    assert not run.optimizer.info.undone


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_of_other_sizes_are_no_alarm(reduction: str) -> None:
    run = Run.of("kfac", "adaptive", loss=nn.CrossEntropyLoss(reduction=reduction))
    for k in range(12):
        run.step(batches(1, 20 if k % 3 else 400, seed=k)[0])
        assert not run.optimizer.info.undone
