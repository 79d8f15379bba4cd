"""Laws of the natural policy gradient, against the explicit Fisher matrix by torch.func."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import natgrad
from natgrad.likelihoods import Categorical, Gaussian, HeteroscedasticGaussian, Likelihood

DTYPE = torch.float64
STATES, ACTIONS = 9, 3
EXACT = ["exact", "rectangular", "gram", "dense", natgrad.MatrixFree(progress=0.0)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Spread(nn.Module):
    """Mean and variance of a Gaussian policy."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body, self.mean, self.scale = nn.Linear(2, 4), nn.Linear(4, outputs), nn.Linear(4, outputs)

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(s))
        return self.mean(h), nn.functional.softplus(self.scale(h)) + 0.1


def network(seed: int = 0, spread: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if spread:
            return Spread(ACTIONS).to(DTYPE)
        return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, ACTIONS)).to(DTYPE)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def batch(model: nn.Module, likelihood: Likelihood) -> tuple[Tensor, Tensor, Tensor]:
    states = torch.randn(STATES, 2, dtype=DTYPE, generator=seeded(1))
    with torch.no_grad():
        actions = likelihood.sample(model(states), seeded(2))
    return states, actions, torch.randn(STATES, dtype=DTYPE, generator=seeded(3))


def log_prob(outputs: Any, action: Tensor) -> Tensor:
    """Of one state's action, by torch.distributions."""
    if isinstance(outputs, tuple):
        return (
            torch.distributions.Normal(outputs[0], outputs[1].sqrt(), validate_args=False)
            .log_prob(action)
            .sum()
        )
    if action.is_floating_point():
        return torch.distributions.Normal(outputs, 1.0, validate_args=False).log_prob(action).sum()
    return torch.log_softmax(outputs, -1).gather(-1, action[None])[0]


def joined(outputs: Any) -> Tensor:
    return torch.cat(outputs) if isinstance(outputs, tuple) else outputs


def information(outputs: Any) -> Tensor:
    """H of one state, in the flat outputs, nats."""
    if isinstance(outputs, tuple):
        variance = outputs[1]
        return torch.diag(torch.cat([1 / variance, 0.5 / variance**2]))
    return torch.eye(len(outputs), dtype=DTYPE)


def oracle(
    model: nn.Module, states: Tensor, actions: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor, Callable[[Tensor], tuple[float, float]]]:
    """∇h, F in nats per state, and a function of δ: the change of h and the mean KL."""
    values = {name: p.detach().clone() for name, p in model.named_parameters()}

    def outputs(parameters: dict[str, Tensor], s: Tensor) -> Any:
        z = functional_call(model, parameters, (s[None],))
        return tuple(part[0] for part in z) if isinstance(z, tuple) else z[0]

    def score(s: Tensor, a: Tensor) -> Tensor:
        parts = jacrev(lambda p: log_prob(outputs(p, s), a))(values)
        return torch.cat([g.reshape(-1) for g in parts.values()])

    gradient = -(vmap(score)(states, actions) * advantages[:, None]).mean(0)
    if actions.is_floating_point():
        rows = []
        for s in states:
            parts = jacrev(lambda p, s=s: joined(outputs(p, s)))(values)
            J = torch.cat([j.flatten(1) for j in parts.values()], 1)
            rows.append(J.mT @ information(outputs(values, s)) @ J)
        F = torch.stack(rows).mean(0)
    else:  # the sum over every action
        F = torch.zeros(len(gradient), len(gradient), dtype=DTYPE)
        for a in range(ACTIONS):
            scores = vmap(lambda s: score(s, torch.tensor(a)))(states)  # noqa: B023
            weight = vmap(lambda s: log_prob(outputs(values, s), torch.tensor(a)).exp())(states)  # noqa: B023
            F += scores.mT @ (scores * weight[:, None]) / STATES

    def measure(delta: Tensor) -> tuple[float, float]:
        sizes = [v.numel() for v in values.values()]
        moved = {n: v + d.view_as(v) for (n, v), d in zip(values.items(), delta.split(sizes), strict=True)}
        change = kl = 0.0
        for s, a, advantage in zip(states, actions, advantages, strict=True):
            before, after = outputs(values, s), outputs(moved, s)
            ratio = (log_prob(after, a) - log_prob(before, a)).exp()
            change -= float((ratio - 1) * advantage) / STATES
            kl += float(_kl(before, after, a)) / STATES
        return change, kl

    return gradient, F, measure


def _kl(before: Any, after: Any, action: Tensor) -> Tensor:
    D = torch.distributions
    if isinstance(before, tuple):
        (m, v), (n, w) = before, after
        return D.kl_divergence(D.Normal(m, v.sqrt()), D.Normal(n, w.sqrt())).sum()
    if action.is_floating_point():
        return D.kl_divergence(D.Normal(before, 1.0), D.Normal(after, 1.0)).sum()
    return D.kl_divergence(D.Categorical(logits=before), D.Categorical(logits=after))


CASES = [
    (Categorical(), False),
    (Categorical(reduction="sum"), False),
    (Gaussian(), False),
    (Gaussian(reduction="sum"), False),
    (HeteroscedasticGaussian(), True),
    (HeteroscedasticGaussian(reduction="sum"), True),
]
names = [f"{type(likelihood).__name__}-{likelihood.reduction}" for likelihood, _ in CASES]


def check_step(likelihood: Likelihood, spread: bool, metric: Any) -> None:
    model = network(spread=spread)
    data = batch(model, likelihood)
    gradient, F, measure = oracle(model, *data)
    before, damping, kl = flat(model), 1e-2, 1e-6
    delta = -torch.linalg.solve(F + damping * torch.eye(len(F), dtype=DTYPE), gradient)
    length = math.sqrt(2 * kl / float(delta @ F @ delta))
    # So small a region that the divergence is its quadratic form to a part in a thousand.
    region = natgrad.TrustRegion(kl=kl)
    optimizer = natgrad.NaturalGradient(model, likelihood, metric=metric, lr=region, damping=damping)
    loss = optimizer.step(natgrad.policy(model, *data))
    taken = flat(model) - before
    alpha, info = optimizer.info.alpha, optimizer.info
    assert float(loss) == pytest.approx(-float(data[2].mean()), rel=1e-12)
    assert 0.9 * length < alpha <= length * (1 + 1e-7)
    torch.testing.assert_close(taken, alpha * delta, rtol=1e-6, atol=1e-9 * alpha * float(delta.abs().max()))
    change, nats = measure(taken)
    assert nats <= kl * (1 + 1e-9)
    assert info.actual == pytest.approx(change, rel=1e-5)
    assert info.predicted == pytest.approx(float(gradient @ taken), rel=1e-6)
    assert info.step_norm == pytest.approx(float(taken @ F @ taken) ** 0.5, rel=1e-6)
    assert info.grad_norm == pytest.approx(float(gradient.norm()), rel=1e-9)


@pytest.mark.parametrize(("likelihood", "spread"), CASES, ids=names)
def test_the_step_is_the_natural_policy_gradient_for_every_family_and_reduction(
    likelihood: Likelihood, spread: bool
) -> None:
    check_step(likelihood, spread, "exact")


@pytest.mark.parametrize("metric", EXACT, ids=str)
def test_the_step_is_the_natural_policy_gradient_for_every_exact_metric(metric: Any) -> None:
    check_step(Categorical(), False, metric)


@pytest.mark.parametrize(("likelihood", "spread"), CASES, ids=names)
def test_the_divergence_is_half_the_squared_step_to_third_order(likelihood: Likelihood, spread: bool) -> None:
    """Whatever κ, in nats per state: no reduction, and no number of an action's parts, changes its unit."""
    errors = []
    for kl in (1e-4, 1e-6):
        model = network(spread=spread)
        data = batch(model, likelihood)
        measure = oracle(model, *data)[2]
        before = flat(model)
        region = natgrad.TrustRegion(kl=kl, backtracks=40, shrink=0.999)
        optimizer = natgrad.NaturalGradient(model, likelihood, metric="exact", lr=region)
        optimizer.step(natgrad.policy(model, *data))
        nats = measure(flat(model) - before)[1]
        assert optimizer.info.step_norm is not None
        half = 0.5 * optimizer.info.step_norm**2
        assert 0.9 * kl < nats <= kl * (1 + 1e-9)
        errors.append(abs(nats - half))
    assert errors[0] < 0.1 * 1e-4
    assert (
        errors[1] < errors[0] * 100**-1.4
    )  # |δ| is a tenth, so a thousandth; a hundredth would be second order


@pytest.mark.parametrize("metric", ["kfac", "ekfac", "diagonal", "euclidean", "exact"])
@pytest.mark.parametrize("kl", [1e-3, 0.3])
def test_no_step_of_any_metric_leaves_the_region_or_worsens_the_surrogate(metric: str, kl: float) -> None:
    model = network()
    optimizer = natgrad.NaturalGradient(model, Categorical(), metric=metric, lr=natgrad.TrustRegion(kl=kl))
    for _ in range(5):
        data = batch(model, Categorical())
        measure = oracle(model, *data)[2]
        before = flat(model)
        optimizer.step(natgrad.policy(model, *data))
        change, nats = measure(flat(model) - before)
        assert 0 < nats <= kl * (1 + 1e-9)
        assert change < 0
        assert change == pytest.approx(optimizer.info.actual, rel=1e-9)


def test_the_step_does_not_depend_on_how_the_policy_is_parametrised() -> None:
    """A linear map of the hidden units: the exact step takes the same policy, the plain gradient another."""
    states = torch.randn(STATES, 2, dtype=DTYPE, generator=seeded(1))
    mix = torch.randn(4, 4, dtype=DTYPE, generator=seeded(5)) + 2 * torch.eye(4, dtype=DTYPE)

    def after(metric: str, mixed: bool) -> Tensor:
        model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, ACTIONS)).to(DTYPE)
        source = network()
        with torch.no_grad():
            model[0].weight.copy_(source[0].weight)
            model[0].bias.copy_(source[0].bias)
            model[1].weight.copy_(source[2].weight)
            model[1].bias.copy_(source[2].bias)
            if mixed:
                model[0].weight.copy_(mix @ model[0].weight)
                model[0].bias.copy_(mix @ model[0].bias)
                model[1].weight.copy_(model[1].weight @ torch.linalg.inv(mix))
        actions = torch.arange(STATES) % ACTIONS
        advantages = torch.randn(STATES, dtype=DTYPE, generator=seeded(3))
        region = natgrad.TrustRegion(kl=1e-8)
        optimizer = natgrad.NaturalGradient(model, Categorical(), metric=metric, lr=region, damping=1e-12)
        start = torch.log_softmax(model(states).detach(), 1)
        optimizer.step(natgrad.policy(model, states, actions, advantages))
        return (torch.log_softmax(model(states).detach(), 1) - start) / optimizer.info.step_norm

    torch.testing.assert_close(after("exact", True), after("exact", False), rtol=1e-3, atol=1e-3)
    plain = after("euclidean", True) - after("euclidean", False)
    assert float(plain.abs().max()) > 0.05
