"""Parameter groups, schedulers, weight decay, coverage and the fallback."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad import L2, ConfigError, CoverageWarning, EmptyError, FixedStep, ModelChangedError
from natgrad.optim.remainder import Remainder
from oracle import fisher as oracle
from tests.optim.runs import DTYPE, METRICS, MODES, Run, batches, net, parameters


def by_kind(model: nn.Module, **of_biases: Any) -> list[dict[str, Any]]:
    """Weights in one group, biases in another."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if n.endswith("weight")]},
        {"params": [p for n, p in named if n.endswith("bias")], **of_biases},
    ]


def by_layer(model: nn.Module, **of_last: Any) -> list[dict[str, Any]]:
    return [{"params": list(model[0].parameters())}, {"params": list(model[3].parameters()), **of_last}]


@pytest.mark.parametrize("split", [by_kind, by_layer])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", METRICS)
def test_groups_of_equal_options_are_one_group(metric: str, mode: str, split: Callable) -> None:
    model = net()
    whole, parts = Run.of(metric, mode), Run.of(metric, mode, model, params=split(model))
    data = batches(5)
    torch.testing.assert_close(parts.train(data), whole.train(data), rtol=1e-10, atol=1e-12)


def test_parameters_may_come_with_their_names() -> None:
    model = net()
    run = Run.of("kfac", "adaptive", model, params=model.named_parameters())
    assert torch.equal(run.train(batches(3)), Run.of("kfac", "adaptive").train(batches(3)))
    with pytest.raises(ConfigError, match="not the model's"):
        natgrad.NaturalGradient(model, nn.MSELoss(), nn.Linear(2, 2).parameters())


@pytest.mark.parametrize("metric", METRICS)
def test_each_group_has_its_own_lr(metric: str) -> None:
    steps = []
    for lr in (0.1, 0.05):
        model = net()
        run = Run.of(
            metric,
            "fixed",
            model,
            params=by_layer(model, lr=lr),
            lr=FixedStep(0.1, kl_clip=None),
            momentum=None,
        )
        start = parameters(model)
        steps.append(run.train(batches(1)) - start)
    torch.testing.assert_close(steps[1][:15], steps[0][:15])
    torch.testing.assert_close(steps[1][15:], 0.5 * steps[0][15:])


@pytest.mark.parametrize("metric", METRICS)
def test_in_adaptive_steps_a_groups_lr_is_a_factor_of_the_step(metric: str) -> None:
    steps = []
    for factor in (1.0, 0.5, 0.0):
        model = net()
        run = Run.of(metric, "adaptive", model, params=by_layer(model, lr=factor))
        start = parameters(model)
        steps.append(run.train(batches(1)) - start)
    for factor, step in zip((0.5, 0.0), steps[1:]):
        torch.testing.assert_close(step[:15], steps[0][:15])
        torch.testing.assert_close(step[15:], factor * steps[0][15:])


def test_rho_is_of_the_step_that_was_taken_whatever_the_factors() -> None:
    for factors in ((1.0, 1.0), (0.3, 0.3), (1.0, 0.2), (0.0, 0.0)):
        model = net()
        groups = by_layer(model, lr=factors[1])
        groups[0]["lr"] = factors[0]
        run = Run.of("dense", "adaptive", model, params=groups, damping=natgrad.LevenbergMarquardt(period=1))
        (batch,) = batches(1, size=30)
        before, start = run.step(batch), parameters(net())
        info, step = run.optimizer.info, parameters(model) - start
        with torch.no_grad():
            after = run.value(batch).item()
        fresh = net()
        run.loss(fresh(batch[0]), batch[1]).backward()
        F = oracle.fisher(fresh, run.loss, *batch) + info.damping * torch.eye(len(start), dtype=DTYPE)
        predicted = float(oracle.gradient(fresh) @ step + 0.5 * step @ F @ step)
        assert info.predicted == pytest.approx(predicted, rel=1e-6, abs=1e-15)
        if factors == (0.0, 0.0):
            assert info.rho is None  # a step of length zero says nothing about λ
            assert run.optimizer.damping == info.damping
        else:
            assert info.actual == pytest.approx(after - before)
            assert info.rho == pytest.approx((after - before) / predicted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", METRICS)
def test_schedulers_change_the_step(metric: str, mode: str) -> None:
    data = batches(4)
    plain, steady, falling = (Run.of(metric, mode, momentum=0.0) for _ in range(3))
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(steady.optimizer, lambda step: 1.0),
        torch.optim.lr_scheduler.StepLR(falling.optimizer, step_size=2, gamma=0.5),
    ]
    lengths = []
    for k, batch in enumerate(data):
        for run, scheduler in zip((plain, steady, falling), (None, *schedulers)):
            start = parameters(run.model)
            run.step(batch)
            if scheduler is not None:
                scheduler.step()
            if k == 2:
                lengths.append(parameters(run.model) - start)
    assert torch.equal(lengths[0], lengths[1])
    torch.testing.assert_close(lengths[2], 0.5 * lengths[0])


def test_an_adaptive_run_warms_up_from_zero() -> None:
    run = Run.of("kfac", "adaptive")
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: min(1.0, step / 5))
    start = parameters(run.model)
    for k, batch in enumerate(batches(10)):
        run.step(batch)
        scheduler.step()
        if k == 0:
            assert torch.equal(parameters(run.model), start)
            first = run.optimizer.info.damping
            assert run.optimizer.damping == first
    assert run.optimizer.info.damping < 10 * first


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", METRICS)
def test_a_frozen_group_stays_and_is_let_go_again(metric: str, mode: str) -> None:
    model = net()
    run = Run.of(metric, mode, model, params=by_layer(model, frozen=True))
    start = parameters(model)
    run.train(batches(3))
    assert torch.equal(parameters(model)[15:], start[15:])
    assert not torch.equal(parameters(model)[:15], start[:15])
    run.optimizer.param_groups[1]["frozen"] = False
    run.train(batches(1))
    assert not torch.equal(parameters(model)[15:], start[15:])


@pytest.mark.parametrize("mode", MODES)
def test_freezing_a_group_is_training_the_rest_alone(mode: str) -> None:
    """The exact metric is restricted to what moves."""
    first, second = net(), net()
    frozen = Run.of("dense", mode, first, params=by_layer(first, frozen=True))
    alone = Run.of("dense", mode, second, params=second[0].parameters())
    torch.testing.assert_close(frozen.train(batches(6)), alone.train(batches(6)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("metric", METRICS)
def test_requires_grad_may_be_taken_away_meanwhile(metric: str) -> None:
    run = Run.of(metric, "adaptive")
    run.train(batches(2))
    run.model[0].requires_grad_(False)
    start = parameters(run.model)
    run.train(batches(3))
    assert torch.equal(parameters(run.model)[:15], start[:15])
    assert not torch.equal(parameters(run.model)[15:], start[15:])
    run.model[0].requires_grad_(True)
    run.train(batches(2))
    assert not torch.equal(parameters(run.model)[:15], start[:15])


@pytest.mark.parametrize("mode", MODES)
def test_each_group_has_its_own_metric(mode: str) -> None:
    model = net()
    run = Run.of("kfac", mode, model, params=by_layer(model, metric="euclidean"))
    coverage = {row.name: (row.metric, row.rule) for row in run.optimizer.coverage()}
    assert coverage["3.weight"] == ("Euclidean", "gradient")
    run.train(batches(5))
    coverage = {row.name: (row.metric, row.rule) for row in run.optimizer.coverage()}
    assert coverage["0.weight"] == ("KFAC", "linear")


def test_biases_may_follow_the_gradient_under_weights_that_do_not() -> None:
    model = net()
    run = Run.of("kfac", "fixed", model, params=by_kind(model, metric="euclidean"), lr=0.1, momentum=0.0)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    run.train(batches(1))
    for name, p in model.named_parameters():
        plain = start[name] - 0.1 * p.grad
        assert torch.allclose(p, plain) == name.endswith("bias")


def test_the_kl_clip_is_not_for_a_euclidean_group() -> None:
    model = net()
    size = FixedStep(5.0, kl_clip=1e-6)
    run = Run.of("dense", "fixed", model, params=by_layer(model, metric="euclidean"), lr=size, momentum=None)
    start = model[3].bias.detach().clone()
    run.train(batches(1))
    torch.testing.assert_close(model[3].bias.detach(), start - 5.0 * model[3].bias.grad)


@pytest.mark.parametrize("metric", ["diagonal", "dense", "kfac", "kfac-lazy"])
def test_the_kl_clip_bounds_the_divergence(metric: str) -> None:
    for bound in (1e-4, 1e-2):
        run = Run.of(metric, "fixed", lr=FixedStep(10.0, kl_clip=bound), momentum=None, damping=1e-3)
        for batch in batches(4):
            start, fresh = parameters(run.model), net()
            fresh.load_state_dict(run.model.state_dict())
            run.step(batch)
            step = parameters(run.model) - start
            estimate = run.optimizer._curvature.estimates[0][1].operator()
            if metric != "kfac-lazy":  # its inverse is of older factors
                assert float(0.5 * step @ (estimate @ step)) <= bound * (1 + 1e-9)
            assert run.optimizer.info.alpha < 10


@pytest.mark.parametrize("mode", MODES)
def test_weight_decay_is_decoupled(mode: str) -> None:
    """What decay adds to a step is −α lr·decay θ, whatever the metric."""
    steps, start = [], parameters(net())
    for decay in (0.0, 0.1):
        run = Run.of("kfac", mode, weight_decay=decay, momentum=0.0)
        steps.append(run.train(batches(1)) - start)
        alpha = run.optimizer.info.alpha
    if mode == "fixed":
        torch.testing.assert_close(steps[1] - steps[0], -0.1 * 0.1 * start)
    else:
        ratio = (steps[1] - steps[0]) / start
        assert float(ratio.max()) < 0
        assert -float(ratio.mean()) == pytest.approx(0.1 * alpha, rel=0.5)  # each layer by its own α


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", METRICS)
def test_each_group_has_its_own_weight_decay(metric: str, mode: str) -> None:
    model = net()
    run = Run.of(metric, mode, model, params=by_kind(model, weight_decay=0.0), weight_decay=0.5)
    other = Run.of(metric, mode, net())
    for one in (run, other):
        one.train(batches(1))
    for (name, p), q in zip(run.model.named_parameters(), other.model.parameters()):
        assert torch.equal(p, q) == name.endswith("bias")


@pytest.mark.parametrize("mode", MODES)
def test_l2_is_part_of_the_loss(mode: str) -> None:
    """The exact metric with L2(η): Δ = −(F + (λ+η)I)⁻¹(∇L + ηθ)."""
    eta, damping, model = 0.2, 0.05, net()
    size = {"lr": FixedStep(1.0, kl_clip=None)} if mode == "fixed" else {"lr": natgrad.AdaptiveStep(coarse=0)}
    run = Run.of("dense", mode, model, weight_decay=L2(eta), momentum=None, damping=damping, **size)
    (batch,) = batches(1, size=30)
    start, F = parameters(model), oracle.fisher(model, run.loss, *batch)
    value = run.step(batch)
    eye = torch.eye(len(F), dtype=DTYPE)
    g = oracle.gradient(model) + eta * start
    direction = -torch.linalg.solve(F + (damping + eta) * eye, g)
    step = parameters(model) - start
    if mode == "fixed":
        torch.testing.assert_close(step, direction)
    else:
        Q = F + (damping + eta) * eye
        alpha = -(g @ direction) / (direction @ Q @ direction)
        torch.testing.assert_close(step, alpha * direction, rtol=1e-5, atol=1e-9)
        assert run.optimizer.info.loss == pytest.approx(value + 0.5 * eta * float(start @ start))
        assert run.optimizer.info.predicted == pytest.approx(
            float(g @ step + 0.5 * step @ Q @ step), rel=1e-6
        )


def test_l2_is_measured_by_rho() -> None:
    run = Run.of("dense", "adaptive", weight_decay=L2(0.5), damping=natgrad.LevenbergMarquardt(period=1))
    (batch,) = batches(1, size=30)

    def penalised() -> float:
        with torch.no_grad():
            return run.value(batch).item() + 0.25 * float(parameters(run.model).square().sum())

    before = penalised()
    run.step(batch)
    assert run.optimizer.info.actual == pytest.approx(penalised() - before, rel=1e-6)


# ---- coverage ------------------------------------------------------------------------------------------------


class Einsum(nn.Module):
    """Scale and shift by a function for which there is no rule."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        scaled = torch.einsum("nd,d->nd", x, self.weight)
        return scaled + torch.einsum("nd,d->nd", torch.ones_like(x), self.bias)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.norm, self.last = nn.Linear(2, 5), Einsum(5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


def test_what_no_rule_covers_is_announced_once_and_listed() -> None:
    run = Run.of("kfac", "adaptive", Scaled())
    with pytest.warns(CoverageWarning, match=r"norm\.weight, norm\.bias") as caught:
        run.step(batches(1)[0])
    assert caught[0].filename.endswith("runs.py")  # where step() was called
    run.train(batches(3))  # no second warning, which would be an error
    coverage = run.optimizer.coverage()
    assert coverage.uncovered == ("norm.weight", "norm.bias")
    assert "einsum" in str(coverage)
    assert len(coverage) == 6
    rows = {row.name: row for row in coverage}
    assert rows["first.weight"].factors == (3, 5)
    assert rows["last.weight"].rule == "linear"


@pytest.mark.parametrize(
    ("metric", "told", "diagonal"),
    [
        ("kfac", "3² + 5²", (False, False)),
        (natgrad.KFAC(largest=4), "3² + 5", (False, True)),
        (natgrad.EKFAC(sides="outputs"), "3 + 5²", (True, False)),
        ("tempered", "3² + 5²", (False, False)),
        ("diagonal", "", (False, False)),
        ("gram", "", (False, False)),
    ],
    ids=str,
)
def test_coverage_tells_which_factors_there_are(metric: Any, told: str, diagonal: tuple) -> None:
    model, loss = net(), nn.CrossEntropyLoss()
    run = Run(model, loss, natgrad.NaturalGradient(model, loss, metric=metric))
    run.train(batches(1))
    row = next(row for row in run.optimizer.coverage() if row.name == "0.weight")
    assert (row.diagonal, row.rule) == (diagonal, "linear")
    line = next(line for line in str(run.optimizer.coverage()).splitlines() if line.startswith("0.weight"))
    assert line.partition("linear")[2].strip() == told


@pytest.mark.filterwarnings("ignore::natgrad.CoverageWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", ["kfac", "diagonal"])
def test_by_default_they_have_a_diagonal_of_squared_gradients(metric: str, mode: str) -> None:
    run = Run.of(metric, mode, Scaled(), momentum=0.0)
    before = run.model.norm.weight.detach().clone()
    run.train(batches(1))
    step, g = run.model.norm.weight.detach() - before, run.model.norm.weight.grad
    expected = -g / (len(batches(1)[0][0]) * g.square() + run.optimizer.info.damping)
    assert torch.nn.functional.cosine_similarity(step, expected, dim=0) == pytest.approx(1.0)
    assert step.norm() > 0


def test_the_diagonal_of_squared_gradients_is_one_of_the_fisher_information() -> None:
    """At the optimum the mean square of a batch's gradient is F/N; and a step's trials are one observation."""
    remainder, source = Remainder(), torch.Generator().manual_seed(0)
    for step in range(400):  # N(0, 2²) scores: F = 4, in batches of 8
        g = 2 * torch.randn(8, 500, dtype=DTYPE, generator=source).mean(0)
        remainder.observe({"p": g}, 8, step)
        remainder.observe({"p": 100 * g}, 8, step)
    solved = remainder.solve({"p": torch.ones(500, dtype=DTYPE)}, {"p": 1.0})["p"]
    assert solved.mean() == pytest.approx(1 / (4.0 + 1.0), rel=0.1)
    state = Remainder()
    state.load_state_dict(remainder.state_dict())
    torch.testing.assert_close(state.solve({"p": torch.ones(500, dtype=DTYPE)}, {"p": 1.0})["p"], solved)


@pytest.mark.parametrize("mode", MODES)
def test_or_an_optimiser_of_the_users(mode: str) -> None:
    run = Run.of("kfac", mode, Scaled(), fallback=lambda params: torch.optim.SGD(params, lr=0.25))
    before = run.model.norm.weight.detach().clone()
    with pytest.warns(CoverageWarning, match="optimiser of yours"):
        run.step(batches(1)[0])
    torch.testing.assert_close(run.model.norm.weight.detach(), before - 0.25 * run.model.norm.weight.grad)
    run.train(batches(3))


@pytest.mark.filterwarnings("ignore::natgrad.CoverageWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fallback", [None, lambda params: torch.optim.SGD(params, lr=0.1)])
@pytest.mark.parametrize("metric", ["kfac", "diagonal"])
def test_a_model_of_which_nothing_is_covered_is_trained_all_the_same(
    metric: str, fallback: Any, mode: str
) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, 3, dtype=DTYPE))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ni,io->no", x, self.w)

    run = Run.of(metric, mode, Bare(), fallback=fallback)
    run.train(batches(3))
    assert run.model.w.abs().sum() > 0


def test_the_exact_metric_covers_everything() -> None:
    run = Run.of("dense", "adaptive", Scaled())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train(batches(3))
    assert run.optimizer.coverage().uncovered == ()


class Tied(nn.Module):
    """A lookup and a linear map with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.table((x[:, 0] > 0).long()), self.table.weight)


class Both(nn.Module):
    """A linear map and a scale with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.linear.weight[0])


@pytest.mark.parametrize("metric", ["kfac", "ekfac", "diagonal"])
def test_a_tied_embedding_is_covered(metric: str) -> None:
    run = Run.of(metric, "adaptive", Tied())
    run.train(batches(4))  # a warning would be an error
    assert not run.optimizer.coverage().uncovered


def test_curvature_that_lacks_a_use_is_announced() -> None:
    run = Run.of("kfac", "adaptive", Both())
    with pytest.warns(CoverageWarning, match=r"the curvature of linear\.weight lacks"):
        run.step(batches(1)[0])
    (row,) = run.optimizer.coverage()
    assert (row.rule, row.reason) == ("linear", "mul beside a linear map")


@pytest.mark.filterwarnings("ignore::natgrad.CoverageWarning")
@pytest.mark.parametrize("fallback", [None, lambda params: torch.optim.SGD(params, lr=0.1)])
def test_a_parameter_that_joins_the_graph_late_is_trained(fallback: Any) -> None:
    class Late(Scaled):
        late = False

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=DTYPE))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale if self.late else super().forward(x)

    run = Run.of("kfac", "adaptive", Late(), fallback=fallback)
    run.train(batches(2))
    run.model.late = True
    run.train(batches(2))
    assert not torch.equal(run.model.scale.detach(), torch.ones(3, dtype=DTYPE))


# ---- what can't be -------------------------------------------------------------------------------------------


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model = net().requires_grad_(False)
    with pytest.raises(EmptyError, match="requires_grad"):
        natgrad.NaturalGradient(model, nn.MSELoss())
    with pytest.raises(EmptyError):
        natgrad.NaturalGradient(nn.Tanh(), nn.MSELoss())
    with pytest.raises(EmptyError):
        natgrad.NaturalGradient(model, nn.MSELoss(), [{"params": list(model.parameters())}])


def test_a_parameter_that_joins_or_leaves_is_noticed_before_anything_moves() -> None:
    for change in ("joins", "leaves", "grows", "thaws"):
        model = net()
        if change == "thaws":
            model[0].requires_grad_(False)
        run = Run.of("kfac", "adaptive", model)
        run.train(batches(1))
        if change == "joins":
            model.append(nn.Linear(3, 3).double())
        elif change == "leaves":
            model[0].bias = None
        elif change == "grows":
            model[3].weight.data = torch.randn(4, 5, dtype=DTYPE)
            model[3].bias = None
            model[3].bias = nn.Parameter(torch.zeros(4, dtype=DTYPE), requires_grad=False)
        else:
            model[0].requires_grad_(True)
        start = parameters(model)
        with pytest.raises(ModelChangedError, match="optimiser"):
            run.step(batches(1)[0])
        assert torch.equal(parameters(model), start)


def test_groups_are_fixed_after_construction() -> None:
    run = Run.of("kfac", "adaptive")
    with pytest.raises(ConfigError, match="fixed"):
        run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
