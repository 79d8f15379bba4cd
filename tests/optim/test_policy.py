"""A step on a policy: what it accepts, what it refuses, and what it leaves alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad import (
    Categorical,
    ConfigError,
    EmptyError,
    NaturalGradient,
    NonFiniteError,
    StepError,
    TargetError,
    TrustRegion,
)
from natgrad.steps import Trial
from tests.laws.test_policy_laws import batch, flat, network


def optimiser(model: nn.Module, metric: str = "exact", **options: Any) -> NaturalGradient:
    return NaturalGradient(model, Categorical(), metric=metric, lr=TrustRegion(), **options)


S, A, ADVANTAGES = batch(network(), Categorical())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda s, a, v: (s, a + 3, v), TargetError, "from 0 to 2"),
        (lambda s, a, v: (s, torch.where(a == a[0], -100, a), v), TargetError, "-100"),
        (lambda s, a, v: (s, a[:-1], v), TargetError, "9 observations"),
        (lambda s, a, v: (s, a.tolist(), v), TargetError, "list"),
        (lambda s, a, v: (s, a, v.tolist()), TargetError, "list"),
        (lambda s, a, v: (s, a, v[:-1]), TargetError, "advantages must be 9"),
        (lambda s, a, v: (s, a, v[:, None]), TargetError, "advantages must be 9"),
        (lambda s, a, v: (s, a, v.long()), TargetError, "int64"),
        (lambda s, a, v: (s[:0], a[:0], v[:0]), EmptyError, "no examples"),
        (lambda s, a, v: ("left", a, v), ConfigError, "inputs"),
        (lambda s, a, v: (s, a, v / 0), NonFiniteError, "an advantage is not finite in step 1, batch"),
        (lambda s, a, v: (s / 0, a, v), NonFiniteError, "not finite"),
    ],
)
def test_a_bad_batch_is_named_and_nothing_moves(
    change: Callable[..., tuple[Any, ...]], error: type[Exception], words: str
) -> None:
    model = network()
    optimizer, before = optimiser(model), flat(model)
    with pytest.raises(error, match=words):
        optimizer.step(natgrad.policy(model, *change(S, A, ADVANTAGES)))
    assert torch.equal(flat(model), before)
    optimizer.step(natgrad.policy(model, S, A, ADVANTAGES))  # and it goes on
    assert not torch.equal(flat(model), before)


def test_what_does_not_go_with_a_trust_region() -> None:
    model = network()
    given = natgrad.policy(model, S, A, ADVANTAGES)
    for other in (None, 0.1, natgrad.AdaptiveStep()):
        with pytest.raises(ConfigError, match=r"lr=natgrad\.TrustRegion"):
            NaturalGradient(model, nn.CrossEntropyLoss(), lr=other).step(given)
    with pytest.raises(ConfigError, match=r"lr=natgrad\.TrustRegion"):
        NaturalGradient(model).step(given)
    with pytest.raises(ConfigError, match="residuals"):
        NaturalGradient(model, lr=TrustRegion())
    for closure in (None, lambda: model(S).sum()):
        with pytest.raises(StepError, match=r"natgrad\.policy"):
            optimiser(model).step(closure)
    with pytest.raises(ConfigError, match="another model"):
        optimiser(network()).step(given)
    with pytest.raises(ConfigError, match="weight_decay"):
        optimiser(model, weight_decay=natgrad.L2(0.1))
    with pytest.raises(ConfigError, match="fallback"):
        optimiser(model, fallback=torch.optim.SGD)
    with pytest.raises(ConfigError, match="momentum"):
        optimiser(model, momentum=0.9)
    with pytest.raises(ConfigError, match="damping"):
        NaturalGradient(model, nn.CrossEntropyLoss(), lr=TrustRegion(), damping=natgrad.LevenbergMarquardt())


@pytest.mark.parametrize(
    "options",
    [
        {"kl": 0.0},
        {"kl": math.inf},
        {"kl": math.nan},
        {"backtracks": -1},
        {"shrink": 1.0},
        {"shrink": 0.0},
        {"accept": 1.0},
        {"accept": -0.1},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        TrustRegion(**options)


def test_the_search_shrinks_until_both_conditions_hold() -> None:
    tried: list[float] = []

    def attempt(alpha: float) -> Trial | None:
        tried.append(alpha)
        if alpha > 0.6:
            return None  # not finite
        if alpha > 0.3:
            return Trial(1.0, 0.0)  # worse
        return Trial(-alpha, 0.02 * alpha / 0.25)  # better, but too far above ⅛

    alpha, trial = TrustRegion(kl=0.01).search(-1.0, 0.02, attempt)
    assert tried[:3] == [1.0, 0.5, 0.25]
    assert tried[3] == pytest.approx(0.97 * 0.25 * math.sqrt(0.5))  # by the square law, rather than half
    assert alpha == tried[-1] <= 0.125
    assert trial is not None
    assert trial.divergence <= 0.01


def test_where_nothing_is_accepted_the_parameters_stay_and_info_says_so() -> None:
    model = network()
    # So long a region that the surrogate of so few states is another function there; and one try.
    optimizer = NaturalGradient(
        model, Categorical(), metric="exact", lr=TrustRegion(kl=1e4, backtracks=0, accept=0.99), damping=1e-9
    )
    before = flat(model)
    optimizer.step(natgrad.policy(model, S, A, ADVANTAGES))
    assert torch.equal(flat(model), before)
    assert (optimizer.info.alpha, optimizer.info.step_norm, optimizer.info.step) == (0.0, 0.0, 1)
    assert optimizer.info.actual is None


def test_equal_advantages_of_zero_move_nothing() -> None:
    model = network()
    optimizer, before = optimiser(model), flat(model)
    optimizer.step(natgrad.policy(model, S, A, torch.zeros_like(ADVANTAGES)))
    assert torch.equal(flat(model), before)
    assert optimizer.info.alpha == 0.0


def test_skipping_counts_steps_that_are_not_finite() -> None:
    model = network()
    optimizer, before = optimiser(model, on_nonfinite="skip"), flat(model)
    optimizer.step(natgrad.policy(model, S, A, ADVANTAGES * math.nan))
    assert torch.equal(flat(model), before)
    assert optimizer.info.skipped == 1


@pytest.mark.parametrize("metric", ["exact", "kfac", "diagonal"])
def test_gradients_buffers_random_state_and_mode_are_left_alone(metric: str) -> None:
    model = network()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state = torch.get_rng_state()
    optimiser(model, metric).step(natgrad.policy(model, S, A, ADVANTAGES))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_dropout_draws_the_same_masks_at_every_length() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    optimizer = NaturalGradient(model, Categorical(), metric="exact", lr=TrustRegion(kl=1e-8, backtracks=2))
    optimizer.step(natgrad.policy(model, S, A, ADVANTAGES))
    assert optimizer.info.alpha > 0  # other masks are farther away than that


def test_frozen_groups_stay_and_a_group_s_lr_is_a_factor_of_its_step() -> None:
    def after(rates: tuple[float, float], frozen: bool = False) -> tuple[nn.Module, NaturalGradient]:
        model = network()
        assert isinstance(model, nn.Sequential)
        groups = [
            {"params": list(model[0].parameters()), "lr": rates[0], "frozen": frozen},
            {"params": list(model[2].parameters()), "lr": rates[1]},
        ]
        optimizer = NaturalGradient(
            model, Categorical(), params=groups, metric="kfac", lr=TrustRegion(kl=1e-6)
        )
        optimizer.step(natgrad.policy(model, S, A, ADVANTAGES))
        return model, optimizer

    start = flat(network())
    (whole, one), (half, other) = after((1.0, 1.0)), after((0.5, 0.5))
    torch.testing.assert_close(flat(half) - start, 0.5 * (flat(whole) - start), rtol=0.04, atol=0)
    assert one.info.step_norm is not None
    assert other.info.step_norm == pytest.approx(0.5 * one.info.step_norm, rel=0.04)
    frozen = flat(after((1.0, 1.0), frozen=True)[0]) - start
    assert float(frozen[:12].abs().max()) == 0.0
    assert float(frozen[12:].abs().min()) > 0.0


def test_outputs_observations_in_a_dict_and_actions_of_several_parts() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 6, dtype=torch.float64)

        def forward(self, seen: Tensor, goal: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.net(seen + goal).view(-1, 3, 2))  # three classes, two parts

    parts = torch.stack([A, A.flip(0)], 1)
    moves = []
    for where in ("optimiser", "policy"):
        torch.manual_seed(0)
        model = Wrapped()
        own = {"outputs": lambda o: o.logits}
        optimizer = optimiser(model, **(own if where == "optimiser" else {}))
        before = flat(model)
        given = {"seen": S, "goal": S.flip(0)}
        optimizer.step(natgrad.policy(model, given, parts, ADVANTAGES, **(own if where == "policy" else {})))
        moves.append(flat(model) - before)
    assert float(moves[0].norm()) > 0
    assert torch.equal(*moves)


@pytest.mark.parametrize("metric", ["exact", "kfac", "matrixfree"])
def test_a_restored_run_goes_on_to_the_last_bit(metric: str) -> None:
    model, other = network(), network(seed=5)
    optimizer, resumed = optimiser(model, metric), optimiser(other, metric)
    resumed.step(natgrad.policy(other, S, A, ADVANTAGES))
    for _ in range(3):
        optimizer.step(natgrad.policy(model, S, A, ADVANTAGES))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        optimizer.step(natgrad.policy(model, S, A, ADVANTAGES))
        resumed.step(natgrad.policy(other, S, A, ADVANTAGES))
    assert torch.equal(flat(model), flat(other))


def test_float32_policies_learn_the_better_action() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = optimiser(model)
    states = torch.randn(200, 2)
    for _ in range(60):
        actions = Categorical().sample(model(states))
        advantages = (actions == 1).float() - 1 / 3
        optimizer.step(natgrad.policy(model, states, actions, advantages))
    assert float(model(states).detach().softmax(1)[:, 1].mean()) > 0.9
