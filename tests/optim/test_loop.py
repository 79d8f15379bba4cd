"""The contract of the training loop, for every metric and strategy."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad import AdaptiveStep, StepError
from tests.optim.runs import METRICS, MODES, Run, batches, for_every, net, parameters


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
    for x, y in batches(5):
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


@pytest.mark.parametrize("metric", ["kfac", "tempered"])
def test_a_step_that_went_wrong_is_taken_back(metric: str) -> None:
    run, data = Run.of(metric, "adaptive"), batches(9)
    run.train(data[:8])
    good, damping = parameters(run.model), run.optimizer.damping
    usual = run.optimizer._witness
    for p in run.model.parameters():  # as if the last step had been far too long
        wrong = 30 * torch.randn_like(p)
        run.optimizer.state[p]["last"] += wrong
        p.data += wrong
    run.step(data[8])
    info = run.optimizer.info
    assert info.undone
    assert info.loss > 3
    if metric == "kfac":
        assert run.optimizer.damping > damping
    else:  # its λ is for rounding only
        assert run.optimizer._witness.alpha == usual.alpha / 4
    assert info.step == 9
    last_but_one = Run.of(metric, "adaptive")
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


def test_a_batch_that_is_merely_hard_takes_nothing_back() -> None:
    """It would have been as hard before the last step."""
    run, data = Run.of("kfac", "adaptive"), batches(30)
    run.train(data[:29])
    alarm, (x, _) = run.optimizer._alarm, data[29]
    with torch.no_grad():
        wrong = run.model(20 * x).argmin(1)
    run.step((20 * x, wrong))
    assert alarm.rings(run.optimizer.info.loss)
    assert not run.optimizer.info.undone


@pytest.mark.parametrize("metric", ["kfac", "ekfac"])
def test_with_a_learning_rate_curvature_is_looked_at_more_seldom(metric: str) -> None:
    """Every fifth step at most where steps adapt, every twentieth where they are many and small."""

    def longest(lr: float | None) -> int:
        torch.manual_seed(0)
        model, loss_fn = nn.Linear(4, 3), nn.CrossEntropyLoss()
        optimizer = natgrad.NaturalGradient(model, loss_fn, metric=metric, lr=lr)
        looked = []
        for step in range(160):
            optimizer.zero_grad()
            loss_fn(model(torch.randn(64, 4)), torch.randint(3, (64,))).backward()
            if optimizer._curvature.observed:
                looked.append(step)
            optimizer.step()
        return max(b - a for a, b in itertools.pairwise(looked))

    assert longest(None) == 5
    assert longest(1e-3) == 20


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_present_gradient_counts_once_or_twice_in_the_average(nesterov: bool) -> None:
    """Δ = −m with m ← βm + (1 − β)g, or −(βm + (1 − β)g), by the definitions; the metric is the identity."""
    size = AdaptiveStep(0.0, settle=0, coarse=0, nesterov=nesterov)
    run = Run.of("euclidean", "adaptive", lr=size)
    m: Tensor | None = None
    for step, batch in enumerate(batches(15)):
        before = parameters(run.model)
        run.step(batch)
        g = torch.cat([p.grad.reshape(-1) for p in run.model.parameters()])
        keep = min(0.9, 1 - 1 / (step + 1))
        m = g if m is None else keep * m + (1 - keep) * g
        slope = keep * m + (1 - keep) * g if nesterov else m
        torch.testing.assert_close(parameters(run.model) - before, -run.optimizer.info.alpha * slope)


class Told(nn.Module):
    """A model that is told things beside its batch: a number, a word, a flag, a list, and a tensor by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(
        self, x: Tensor, scale: float, how: str, *, flag: bool, sizes: list[int], shift: Tensor
    ) -> Tensor:
        assert how == "so"
        assert flag
        assert sizes == [40, 2]
        return self.net(scale * x + shift)


class ToldRun(Run):
    def value(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        shift = torch.full_like(x, 0.5)
        return self.loss(self.model(x, 2.0, "so", flag=True, sizes=[40, 2], shift=shift), target=y)


@for_every
def test_a_model_may_be_told_more_than_its_batch(metric: str, mode: str) -> None:
    """Keywords, numbers and words: the steps are those of the same model that is given one tensor."""
    plain = Run.of(metric, mode)
    told = ToldRun.of(metric, mode, Told())
    assert isinstance(told, ToldRun)
    for x, y in batches(6):
        plain.step((2.0 * x + 0.5, y))
        told.step((x, y))
    torch.testing.assert_close(parameters(told.model), parameters(plain.model))
