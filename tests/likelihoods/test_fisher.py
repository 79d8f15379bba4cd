"""H is the Fisher information of the very loss that torch computes, for every combination of options."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from natgrad.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Outputs,
    Poisson,
    likelihood_from,
)
from oracle import likelihoods as oracle


@dataclasses.dataclass(frozen=True)
class Case:
    """A torch loss with outputs and targets, and H's ingredients by the oracle."""

    loss: nn.Module
    z: Tensor
    y: Tensor
    family: Callable
    events: list[list[int]]
    weights: list[float]  # c wₙ

    @property
    def likelihood(self) -> Likelihood:
        return likelihood_from(self.loss)

    def fisher(self) -> Tensor:
        return oracle.fisher(self.family, self.z.flatten(), self.events, self.weights)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def categorical_cases() -> Iterator:
    grid = itertools.product(
        ("mean", "sum"),
        (None, torch.tensor([0.5, 0.0, 2.0, 1.25], dtype=torch.float64)),
        (0.0, 0.2),
        ("index", "ignored", "ignore=1", "probabilities"),
        ((6, 4), (3, 4, 2), (2, 4, 1, 3)),
    )
    for reduction, weight, smoothing, kind, shape in grid:
        events = oracle.categorical_events(shape)
        count = len(events)
        ignore = 1 if kind == "ignore=1" else -100
        if kind == "probabilities":
            y = uniform(*shape)
            y[0] = y[0] / y[0].sum(0)  # the others need not sum to one
        else:
            y = torch.tensor([n % 4 for n in range(count)])
            if kind == "ignored":
                y[1], y[4] = ignore, ignore
            y = y.view(shape[0], *shape[2:])
        t = oracle.categorical_coefficients(y, 4, weight, smoothing, ignore)
        c = oracle.categorical_constant(y, weight, ignore, reduction, count)
        loss = nn.CrossEntropyLoss(
            weight=weight, label_smoothing=smoothing, ignore_index=ignore, reduction=reduction
        )
        case = Case(loss, normal(*shape), y, oracle.categorical, events, [c * sum(row) for row in t])
        name = (
            f"ce-{kind}-{reduction}-{'weight' if weight is not None else 'plain'}-{smoothing}-{len(shape)}d"
        )
        yield pytest.param(case, id=name)


def bernoulli_cases() -> Iterator:
    grid = itertools.product(
        ("mean", "sum"),
        (None, "last", "first", "full"),
        (None, "scalar", "last"),
        ("hard", "soft"),
        ((4, 3), (2, 3, 2)),
    )
    for reduction, weight, pos_weight, kind, shape in grid:
        if len(shape) == 3 and (weight != "first" or kind == "hard"):
            continue  # one more dimension changes nothing but how weights broadcast
        sizes = {
            "scalar": (),
            "last": shape[-1:],
            "first": (shape[0], *(1,) * (len(shape) - 1)),
            "full": shape,
        }
        w = None if weight is None else uniform(*sizes[weight], seed=2) * 2
        q = None if pos_weight is None else uniform(*sizes[pos_weight], seed=3) * 3
        y = uniform(*shape) if kind == "soft" else (uniform(*shape) < 0.5).double()
        c = 1.0 if reduction == "sum" else 1 / y.numel()
        weights = [c * s for s in oracle.bernoulli_weights(y, w, q)]
        loss = nn.BCEWithLogitsLoss(weight=w, pos_weight=q, reduction=reduction)
        case = Case(loss, normal(*shape), y, oracle.bernoulli, oracle.element_events(shape), weights)
        yield pytest.param(case, id=f"bce-{kind}-{reduction}-{weight}-{pos_weight}-{len(shape)}d")


def elementwise_cases() -> Iterator:
    shapes = ((5,), (3, 2), (2, 2, 2))
    for reduction, shape in itertools.product(("mean", "sum"), shapes):
        count = math.prod(shape)
        c = 1.0 if reduction == "sum" else 1 / count
        events = oracle.element_events(shape)
        loss = nn.MSELoss(reduction=reduction)
        y = normal(*shape, seed=4)
        mse = Case(loss, normal(*shape), y, oracle.gaussian, events, [2 * c] * count)
        yield pytest.param(mse, id=f"mse-{reduction}-{len(shape)}d")
        for full in (False, True):
            loss = nn.PoissonNLLLoss(full=full, reduction=reduction)
            counts = torch.arange(count, dtype=torch.float64).view(shape)
            case = Case(loss, normal(*shape), counts, oracle.poisson, events, [c] * count)
            yield pytest.param(case, id=f"poisson-{reduction}-full={full}-{len(shape)}d")


CASES = [*categorical_cases(), *bernoulli_cases(), *elementwise_cases()]


def dense(likelihood: Likelihood, z: Tensor, y: Tensor | None) -> Tensor:
    """H by its products with the identity, all in one call."""
    identity = torch.eye(z.numel(), dtype=z.dtype).view(-1, *z.shape)
    return likelihood.fisher_product(z, identity, y).view(z.numel(), z.numel())


@pytest.mark.parametrize("case", CASES)
def test_loss_is_torchs_in_value_and_gradient(case: Case) -> None:
    z, z_torch = case.z.clone().requires_grad_(), case.z.clone().requires_grad_()
    ours, torchs = case.likelihood.loss(z, case.y), case.loss(z_torch, case.y)
    ours.backward()
    torchs.backward()
    assert torch.equal(ours, torchs)
    assert torch.equal(z.grad, z_torch.grad)


@pytest.mark.parametrize("case", CASES)
def test_fisher_is_the_expected_square_of_the_score_and_the_hessian(case: Case) -> None:
    H = dense(case.likelihood, case.z, case.y)
    torch.testing.assert_close(H, case.fisher(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        H, oracle.hessian(lambda z: case.loss(z, case.y), case.z), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("case", CASES)
def test_exact_signals_sum_to_the_fisher(case: Case) -> None:
    signals = list(case.likelihood.signals(case.z, case.y, "exact"))
    H = sum(torch.outer(s.flatten(), s.flatten()) for s in signals)
    mask = within_examples(case.z.shape, case.z.shape[0])
    torch.testing.assert_close(H * mask, case.fisher(), rtol=1e-9, atol=1e-12)
    assert 0 < len(signals) <= case.z.numel() // case.z.shape[0]
    assert all(s.shape == case.z.shape and s.any() for s in signals)


@pytest.mark.parametrize("case", CASES)
def test_empirical_signal_is_the_scaled_gradient_of_each_event(case: Case) -> None:
    """∇h in the coordinates of event n is c wₙ ∇nllₙ, and the signal is sqrt(c wₙ) ∇nllₙ."""
    (signal,) = case.likelihood.signals(case.z, case.y, "empirical")
    z = case.z.clone().requires_grad_()
    gradient = torch.autograd.grad(case.loss(z, case.y), z)[0].flatten()
    signal, root = signal.flatten(), torch.zeros(z.numel(), dtype=z.dtype)
    for event, weight in zip(case.events, case.weights, strict=True):
        root[event] = math.sqrt(weight)
    torch.testing.assert_close(root * signal, gradient, rtol=1e-9, atol=1e-12)
    assert not signal[root == 0].any()


def within_examples(shape: torch.Size, examples: int) -> Tensor:
    """1 where two flat coordinates belong to one example."""
    example = torch.arange(math.prod(shape)) // (math.prod(shape) // examples)
    return (example[:, None] == example).double()


def one_event(family: str, z: Tensor, y: Tensor) -> tuple[Likelihood, Outputs, Tensor, float]:
    """A batch with the same event for each target: its likelihood of reduction "sum", outputs, targets and c."""
    rows = z.expand(len(y), -1).clone()
    if family == "categorical":
        return Categorical(reduction="sum"), rows, y.long(), 1.0
    if family == "heteroscedastic":
        return HeteroscedasticGaussian(reduction="sum"), (rows[:, 0], rows[:, 1]), y, 1.0
    kind = {"bernoulli": Bernoulli, "poisson": Poisson, "gaussian": Gaussian}[family]
    return kind(reduction="sum"), rows, y.view(-1, 1), 2.0 if family == "gaussian" else 1.0


FAMILIES = ["categorical", "bernoulli", "poisson", "gaussian", "heteroscedastic"]


def one_output(family: str) -> Tensor:
    return {"categorical": normal(4), "heteroscedastic": torch.tensor([0.3, 1.7], dtype=torch.float64)}.get(
        family, normal(1)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_log_prob_is_the_familys_and_normalised(family: str) -> None:
    z, distribution = one_output(family), getattr(oracle, family)
    y, _ = oracle.support(distribution(z))
    likelihood, outputs, targets, _ = one_event(family, z, y)
    log_prob = likelihood.log_prob(outputs, targets)
    assert log_prob.shape == targets.shape
    torch.testing.assert_close(log_prob.flatten(), distribution(z).log_prob(y))
    if family in ("categorical", "bernoulli", "poisson"):
        assert math.isclose(log_prob.exp().sum().item(), 1.0, rel_tol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_score_is_zero_and_its_expected_square_is_the_fisher(family: str) -> None:
    """The scores are natgrad's own, the expectation is the oracle's."""
    z, distribution = one_output(family), getattr(oracle, family)
    y, mass = oracle.support(distribution(z))
    likelihood, outputs, targets, c = one_event(family, z, y)
    (signal,) = likelihood.signals(outputs, targets, "empirical")
    parts = signal if isinstance(signal, tuple) else (signal,)
    scores = torch.cat([s.reshape(len(y), -1) for s in parts], 1) / math.sqrt(c)
    mean, second = oracle.score_moments(distribution, z)
    zero = torch.zeros_like(mean)
    torch.testing.assert_close(mean, zero, rtol=0, atol=1e-12)
    torch.testing.assert_close(mass @ scores, zero, rtol=0, atol=1e-12)
    torch.testing.assert_close((scores * mass[:, None]).T @ scores, second, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_divergence_is_half_the_squared_fisher_length(family: str) -> None:
    """KL(z‖z + δ) = ½ δᵀHδ + O(δ³): halving δ divides the gap by eight."""
    z, distribution = one_output(family), getattr(oracle, family)
    likelihood, outputs, _, c = one_event(family, z, torch.zeros(1))
    direction = normal(z.numel(), seed=7)

    def gap(size: float) -> float:
        delta = size * direction
        parts = delta.split([1, 1]) if family == "heteroscedastic" else delta.view(1, -1)
        product = likelihood.fisher_product(outputs, parts)
        length = delta @ (torch.cat(product) if isinstance(product, tuple) else product.flatten()) / c
        kl = torch.distributions.kl_divergence(distribution(z), distribution(z + delta))
        return abs((kl - 0.5 * length).item())

    assert gap(1e-2) < 1e-4
    assert gap(1e-2) < 1e-15 or 6 < gap(2e-2) / gap(1e-2) < 10


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss, nn.PoissonNLLLoss])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_targets_every_weight_is_one(loss: type[nn.Module], reduction: str) -> None:
    z = normal(6, 4)
    y = torch.arange(6) % 4 if loss is nn.CrossEntropyLoss else torch.ones(6, 4, dtype=torch.float64)
    plain = likelihood_from(loss(reduction=reduction))
    weighted = plain
    if loss is nn.CrossEntropyLoss:
        weighted = likelihood_from(
            loss(weight=uniform(4), ignore_index=1, label_smoothing=0.1, reduction=reduction)
        )
    if loss is nn.BCEWithLogitsLoss:
        weighted = likelihood_from(loss(pos_weight=uniform(4), reduction=reduction))
    torch.testing.assert_close(dense(weighted, z, None), dense(plain, z, y), rtol=1e-12, atol=0)


def test_elementwise_weight_counts_without_targets() -> None:
    z, w = normal(3, 4), uniform(4)
    likelihood = likelihood_from(nn.BCEWithLogitsLoss(weight=w))
    torch.testing.assert_close(dense(likelihood, z, None), dense(likelihood, z, torch.zeros(3, 4)))


@pytest.mark.parametrize("kind", ["exact", "mc", "rademacher", "empirical"])
def test_nothing_is_measured_where_every_event_is_ignored(kind: str) -> None:
    likelihood, z, y = (
        likelihood_from(nn.CrossEntropyLoss(weight=uniform(4))),
        normal(3, 4),
        torch.full((3,), -100),
    )
    assert not dense(likelihood, z, y).any()
    assert not any(s.any() for s in likelihood.signals(z, y, kind))
    if kind == "exact":
        assert not list(likelihood.signals(z, y, kind))
