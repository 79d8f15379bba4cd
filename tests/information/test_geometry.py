"""Lengths of paths and true divergences, against closed forms and against F."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import natgrad
from natgrad import ConfigError, TargetError, VectorError
from natgrad.likelihoods import likelihood_from
from oracle import fisher as oracle
from oracle.problems import COVERED, LOSSES, Problem, problem, problems

DTYPE = torch.float64


class Parameter(nn.Module):
    """z = θ, once for every example."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(value)

    def forward(self, x: Tensor) -> Tensor:
        return self.theta.expand(len(x), -1)


# ------------------------------------------------------------------------------------------------- divergence


def torch_divergence(loss: nn.Module, z: Any, other: Any, p: Problem) -> Tensor:
    """The sum over events by torch.distributions, with unit weights and before any reduction."""
    d = torch.distributions
    if isinstance(loss, nn.CrossEntropyLoss):
        families = [d.Categorical(logits=v.movedim(1, -1)) for v in (z, other)]
    elif isinstance(loss, nn.BCEWithLogitsLoss):
        families = [d.Bernoulli(logits=v) for v in (z, other)]
    elif isinstance(loss, nn.PoissonNLLLoss):
        families = [d.Poisson(v.exp()) for v in (z, other)]
    elif isinstance(loss, nn.GaussianNLLLoss):
        families = [d.Normal(mean, variance.sqrt()) for mean, variance in (z, other)]
    else:
        families = [d.Normal(v, 1.0) for v in (z, other)]
    return d.kl_divergence(*families)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["ce", "mse", "bce", "poisson", "gaussian"])
def test_the_true_divergence_is_that_of_torch(loss: str, reduction: str) -> None:
    p = problem("linear", loss, reduction)
    delta = torch.randn_like(oracle.parameters(p.model))
    found = natgrad.kl(p.model, p.loss, p.parts(2, len(p.x) - 2), delta)
    with torch.no_grad():
        z = p.model(p.x)
        torch.nn.utils.vector_to_parameters(oracle.parameters(p.model) + delta, p.model.parameters())
        events = torch_divergence(p.loss, z, p.model(p.x), p)
    expected = events.mean() if reduction == "mean" else events.sum()
    if loss == "mse":  # the squared error is twice a Gaussian's
        expected = 2 * expected
    torch.testing.assert_close(found.true, expected)


@settings(max_examples=12)
@given(p=problems(COVERED, LOSSES), weighted=st.booleans())
def test_the_prediction_is_the_quadratic_form_of_f(p: Problem, weighted: bool) -> None:
    weights = torch.rand(len(p.x), dtype=DTYPE) if weighted else None
    F = natgrad.fisher(p.model, p.loss, (p.x, p.y), "dense", weights=weights)
    delta = 1e-4 * torch.randn(F.space.numel, dtype=DTYPE)
    found = natgrad.kl(p.model, p.loss, p.parts(1, len(p.x) - 1), F.space.unflatten(delta), weights=weights)
    torch.testing.assert_close(found.predicted, 0.5 * delta @ F.to_dense() @ delta)
    torch.testing.assert_close(found.true, found.predicted, rtol=2e-2, atol=1e-13)  # with the same weights


def test_divergence_in_single_precision_has_its_digits() -> None:
    """Far below float32's rounding of the loss itself."""
    model = Parameter(torch.randn(1, 4)).float()
    x, delta = torch.zeros(3, 1), torch.full((4,), 1e-3)
    found = natgrad.kl(model, nn.CrossEntropyLoss(), x, delta * torch.tensor([1.0, -1.0, 2.0, 0.5]))
    torch.testing.assert_close(found.true, found.predicted, rtol=1e-2, atol=0)
    assert found.true > 0


def test_a_likelihood_of_ones_own_may_say_its_divergence() -> None:
    class Mine(natgrad.Gaussian):
        def _divergence(self, outputs: Any, other: Any, targets: Any) -> Tensor:
            return super(natgrad.Gaussian, self)._divergence(outputs, other, targets)

    with pytest.raises(ConfigError, match="Mine does not say its divergence; define _divergence"):
        Mine().divergence(torch.zeros(2), torch.zeros(2))
    with pytest.raises(natgrad.OutputError, match="the outputs' shapes"):
        natgrad.Gaussian().divergence(torch.zeros(2), torch.zeros(3))


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).to(DTYPE)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x, y = torch.randn(5, 3, dtype=DTYPE), torch.randint(2, (5,))
    delta = 1e-4 * torch.randn(sum(p.numel() for p in model.parameters()), dtype=DTYPE)
    state = torch.get_rng_state()
    found = natgrad.kl(model, nn.CrossEntropyLoss(), (x, y), delta)
    torch.testing.assert_close(
        found.true, found.predicted, rtol=0.05, atol=0
    )  # the same masks before and after
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


# ----------------------------------------------------------------------------------------------------- length


def test_for_a_gaussian_it_is_euclidean() -> None:
    """F = I for the mean of a unit Gaussian: lengths are ordinary ones."""
    model, x = Parameter(torch.zeros(2, dtype=DTYPE)), torch.zeros(3, 1, dtype=DTYPE)
    path = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]], dtype=DTYPE)
    loss = nn.MSELoss(reduction="sum")  # c = 2, three examples: F = 6 I
    found = natgrad.length(model, loss, x, path)
    torch.testing.assert_close(found, torch.tensor(6 * math.sqrt(6), dtype=DTYPE))
    named = [{"theta": corner} for corner in path]
    torch.testing.assert_close(natgrad.length(model, loss, [x[:1], x[1:]], named), found)


def test_for_a_bernoulli_it_is_twice_an_arc() -> None:
    """ds = √(σ(1 − σ)) dz = d(2 arcsin √σ): the distance on the circle of square roots, for a path of any speed."""
    model, x = Parameter(torch.zeros(1, dtype=DTYPE)), torch.zeros(4, 1, dtype=DTYPE)
    z = torch.tensor([[-1.0], [0.5], [2.0]], dtype=DTYPE)
    arcs = 2 * torch.asin(torch.sigmoid(z).sqrt()).squeeze(1)
    found = natgrad.length(model, nn.BCEWithLogitsLoss(), x, z, nodes=8)
    torch.testing.assert_close(found, arcs[2] - arcs[0], rtol=1e-9, atol=0)
    rough = natgrad.length(model, nn.BCEWithLogitsLoss(), x, z, nodes=1)
    assert 1e-6 < abs(rough - found) < 0.05


@settings(max_examples=6)
@given(p=problems(losses=("ce weighted", "mse", "bce", "gaussian")))
def test_a_short_path_has_the_length_that_f_says(p: Problem) -> None:
    F = natgrad.fisher(p.model, p.loss, (p.x, p.y), "dense")
    theta = oracle.parameters(p.model)
    delta = 1e-5 * torch.randn_like(theta)
    found = natgrad.length(p.model, p.loss, p.parts(2, len(p.x) - 2), torch.stack([theta, theta + delta]))
    torch.testing.assert_close(found, F.norm(delta), rtol=1e-3, atol=0)


def test_a_length_does_not_depend_on_how_parameters_are_scaled() -> None:
    """What a reparametrisation does to a path it undoes in F."""

    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.zeros(2, 3, dtype=DTYPE)), scale

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.scale * self.weight).T

    x, path = torch.randn(5, 3, dtype=DTYPE), torch.randn(3, 6, dtype=DTYPE)
    lengths = [natgrad.length(Scaled(s), nn.CrossEntropyLoss(), x, path / s) for s in (1.0, 7.0)]
    torch.testing.assert_close(*lengths)


def test_paths_and_steps_that_do_not_fit() -> None:
    p = problem("linear", "ce")
    P = oracle.parameters(p.model).numel()
    data, zero = (p.x, p.y), torch.zeros(P, dtype=DTYPE)
    with pytest.raises(ConfigError, match="two corners or more; this has 1"):
        natgrad.length(p.model, p.loss, data, [zero])
    with pytest.raises(ConfigError, match="nodes=0"):
        natgrad.length(p.model, p.loss, data, [zero, zero], nodes=0)
    with pytest.raises(VectorError, match=f"has {P} entries, but this one has {P + 1}"):
        natgrad.kl(p.model, p.loss, data, torch.zeros(P + 1, dtype=DTYPE))
    with pytest.raises(VectorError, match="the space has no parameter 'nope'"):
        natgrad.kl(p.model, p.loss, data, {"nope": zero})
    with pytest.raises(VectorError, match="this has 2 axes"):
        natgrad.kl(p.model, p.loss, data, zero[None])
    with pytest.raises(TargetError, match="batch 0: "):
        natgrad.kl(p.model, p.loss, (p.x, p.y + 7), zero)


# ------------------------------------------------------------------------------------------- the mass of a batch


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", ["linear", "tokens"])
def test_the_mass_is_what_a_mean_divides_by(model: str, loss: str) -> None:
    """mean · mass = sum, up to one factor for every batch."""
    p = problem(model, loss, examples=6)
    mean, total = (likelihood_from(problem(model, loss, r, examples=6).loss) for r in ("mean", "sum"))
    with torch.no_grad():
        z = p.model(p.x)
        for part in (slice(0, 2), slice(2, 6)):
            cut = tuple(v[part] for v in z) if isinstance(z, tuple) else z[part]
            mass = mean.mass(cut, p.y[part])
            torch.testing.assert_close(mean.loss(cut, p.y[part]) * mass, total.loss(cut, p.y[part]))
            assert total.mass(cut, p.y[part]) == mass
