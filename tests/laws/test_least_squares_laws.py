"""Laws of the step on residuals, against the explicit Jacobian by torch.func."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

import natgrad
from natgrad.likelihoods import Residuals

DTYPE = torch.float64
EXACT = ["exact", "rectangular", "gram", "dense", natgrad.MatrixFree(progress=0.0)]
Closure = Callable[[], Any]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(outputs: int = 2, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).to(DTYPE)


def points(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, dtype=DTYPE, generator=seeded(seed))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def oracle(
    model: nn.Module, residuals: Callable[[Callable[[Tensor], Tensor]], Tensor]
) -> tuple[Tensor, Tensor]:
    """r and J by torch.func; `residuals` is given the model as a function, and scales its blocks itself."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def r(values: dict[str, Tensor]) -> Tensor:
        return residuals(lambda x: functional_call(model, values, (x,)))

    jacobian = jacrev(r)(parameters)
    return r(parameters), torch.cat([j.flatten(1) for j in jacobian.values()], 1)


def two_blocks(call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    inner, edge = points(7, 2), points(5, 3)
    return {"inner": call(inner) - inner[:, :2].sin(), "edge": call(edge)[:, 0] * 3}


def scaled_blocks(call: Callable[[Tensor], Tensor]) -> Tensor:
    named = two_blocks(call)
    return torch.cat([named["inner"].reshape(-1) / 7**0.5, named["edge"] * (4 / 5) ** 0.5])


@pytest.mark.parametrize("metric", EXACT, ids=str)
def test_the_step_is_the_damped_gauss_newton_step(metric: Any) -> None:
    model = network()
    r, J = oracle(model, scaled_blocks)
    damping = 1e-2
    expected = flat(model) - 0.5 * torch.linalg.solve(
        J.T @ J + damping * torch.eye(J.shape[1], dtype=DTYPE), J.T @ r
    )
    optimizer = natgrad.NaturalGradient(
        model, Residuals(weights={"edge": 4.0}), metric=metric, lr=0.5, damping=damping
    )
    loss = optimizer.step(lambda: two_blocks(model))
    assert float(loss) == pytest.approx(0.5 * float(r @ r), rel=1e-13)
    torch.testing.assert_close(flat(model), expected, rtol=1e-8, atol=1e-10)
    assert optimizer.info.grad_norm == pytest.approx(float((J.T @ r).norm()), rel=1e-10)


@pytest.mark.parametrize("metric", EXACT, ids=str)
def test_spring_minimises_its_least_squares_problem(metric: Any) -> None:
    """‖Jδ + r‖² + λ‖δ − μδ₀‖², in three steps on three sets of points."""
    model, damping, mu = network(), 1e-2, 0.8
    optimizer = natgrad.NaturalGradient(model, metric=metric, lr=0.3, momentum=mu, damping=damping)
    previous = torch.zeros(flat(model).numel(), dtype=DTYPE)
    for seed in range(3):
        x = points(4, seed)
        r, J = oracle(model, lambda call: ((call(x) - x[:, :2]) / 2).reshape(-1))  # noqa: B023
        stacked = torch.cat([J, damping**0.5 * torch.eye(J.shape[1], dtype=DTYPE)])
        delta = torch.linalg.lstsq(stacked, torch.cat([-r, damping**0.5 * mu * previous])[:, None]).solution[
            :, 0
        ]
        expected = flat(model) + 0.3 * delta
        optimizer.step(lambda: model(x) - x[:, :2])  # noqa: B023
        torch.testing.assert_close(flat(model), expected, rtol=1e-7, atol=1e-9)
        previous = delta


def test_a_linear_model_is_solved_in_one_step_whatever_its_conditioning() -> None:
    model = nn.Linear(6, 1).to(DTYPE)
    x = torch.randn(40, 6, dtype=DTYPE, generator=seeded(0)) * 10.0 ** -torch.arange(6, dtype=DTYPE)
    truth = torch.randn(6, 1, dtype=DTYPE, generator=seeded(1))
    y = x @ truth - 2.0
    optimizer = natgrad.NaturalGradient(model, metric="exact", lr=1.0, damping=0.0)
    optimizer.step(lambda: model(x) - y)
    torch.testing.assert_close(model.weight[0], truth[:, 0], rtol=1e-8, atol=0)
    assert float((model(x) - y).detach().square().mean()) < 1e-20


@pytest.mark.parametrize("metric", ["exact", "gram"])
def test_complex_residuals_count_as_two_real_ones(metric: str) -> None:
    x = points(6)

    def parts(call: Callable[[Tensor], Tensor]) -> Tensor:
        z = call(x)
        return torch.cat([(z[:, 0] * z[:, 1]).sin(), z[:, 1] ** 2]) / 6**0.5

    model = network()
    r, J = oracle(model, parts)
    expected = flat(model) - J.T @ torch.linalg.solve(J @ J.T + 0.1 * torch.eye(12, dtype=DTYPE), r)

    def closure() -> Tensor:
        z = model(x)
        return torch.complex((z[:, 0] * z[:, 1]).sin(), z[:, 1] ** 2)

    natgrad.NaturalGradient(model, metric=metric, lr=1.0, damping=0.1).step(closure)
    torch.testing.assert_close(flat(model), expected, rtol=1e-9, atol=1e-11)


class Mixed(nn.Module):
    """A model in which points see one another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.tanh(h - h.mean(0)))


def test_points_that_depend_on_one_another_get_the_right_rows_all_the_same() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixed().to(DTYPE)
    x = points(5)
    r, J = oracle(model, lambda call: (call(x)[:, 0] - 1) / 5**0.5)
    expected = flat(model) - J.T @ torch.linalg.solve(J @ J.T + 0.1 * torch.eye(5, dtype=DTYPE), r)
    optimizer = natgrad.NaturalGradient(model, metric="gram", lr=1.0, damping=0.1)
    with pytest.warns(natgrad.CoverageWarning, match="depend on one another"):
        optimizer.step(lambda: model(x)[:, 0] - 1)
    torch.testing.assert_close(flat(model), expected, rtol=1e-9, atol=1e-11)


def test_two_blocks_from_one_forward_pass_get_the_right_rows() -> None:
    """Twice as many rows pass through the layers as a block has points: they are not two positions of one point."""
    model = network(1)
    x = points(10)

    def halves(call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        z = call(x)[:, 0]
        return {"a": z[:5] - 1, "b": z[5:] + 2}

    r, J = oracle(model, lambda call: torch.cat(list(halves(call).values())) / 5**0.5)
    expected = flat(model) - J.T @ torch.linalg.solve(J @ J.T + 0.1 * torch.eye(10, dtype=DTYPE), r)
    with pytest.warns(natgrad.CoverageWarning):
        natgrad.NaturalGradient(model, metric="gram", lr=1.0, damping=0.1).step(lambda: halves(model))
    torch.testing.assert_close(flat(model), expected, rtol=1e-9, atol=1e-11)


def laplacian(model: nn.Module, x: Tensor) -> Tensor:
    """By plain autograd."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return torch.stack(
        [torch.autograd.grad(first[:, k].sum(), x, create_graph=True)[0][:, k] for k in range(x.shape[1])]
    ).sum(0)


@pytest.mark.parametrize("lr", [1.0, None])
@pytest.mark.parametrize("metric", ["exact", "gram", "dense"])
def test_residuals_may_hold_derivatives_by_autograd(metric: str, lr: float | None) -> None:
    model = network(1)
    x = points(6)
    optimizer = natgrad.NaturalGradient(model, metric=metric, lr=lr, damping=1e-1)

    def pure(call: Callable[[Tensor], Tensor]) -> Tensor:
        def u(one: Tensor) -> Tensor:
            return call(one[None])[0, 0]

        return (torch.func.vmap(lambda one: jacrev(jacrev(u))(one).diagonal().sum())(x) + 1) / 6**0.5

    r, J = oracle(model, pure)
    expected = flat(model) - J.T @ torch.linalg.solve(J @ J.T + 0.1 * torch.eye(6, dtype=DTYPE), r)
    before = float(optimizer.step(lambda: laplacian(model, x) + 1))
    assert before == pytest.approx(0.5 * float(r @ r), rel=1e-10)
    if lr is None:
        assert float((laplacian(model, x) + 1).detach().square().mean()) / 2 < before
    else:
        torch.testing.assert_close(flat(model), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("metric", ["exact", "gram", "dense", "kfac", "ekfac", "diagonal", "euclidean"])
def test_every_metric_lowers_the_loss_without_a_learning_rate(metric: str) -> None:
    model = network(1)
    x = points(30)
    optimizer = natgrad.NaturalGradient(model, metric=metric)
    closure: Closure = lambda: F.softplus(model(x)) - x[:, :1].sin() - 1  # noqa: E731
    losses = [float(optimizer.step(closure)) for _ in range(10)]
    assert all(after <= 1.1 * before for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]


class Amplitude(nn.Module):
    """Log ψ of spins, complex."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, parts)).to(DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return torch.view_as_complex(z) if z.shape[1] == 2 else z[:, 0]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("metric", ["exact", "gram"])
def test_stochastic_reconfiguration_is_the_natural_gradient_of_the_energy(
    metric: str, parts: int, weighted: bool
) -> None:
    """δ = −(Re⟨ΔO† ΔO⟩ + λI)⁻¹ Re⟨ΔO† ΔE⟩, with the scores of an explicit Jacobian."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Amplitude(parts)
    x = torch.randn(7, 4, dtype=DTYPE, generator=seeded(1)).sign()
    energies = torch.randn(7, dtype=torch.complex128 if parts == 2 else DTYPE, generator=seeded(2))
    weights = torch.rand(7, dtype=DTYPE, generator=seeded(3)) if weighted else torch.ones(7, dtype=DTYPE)
    p = weights / weights.sum()
    values = {name: v.detach() for name, v in model.named_parameters()}
    names = [name.removeprefix("net.") for name in values]
    jacobian = jacrev(lambda v: functional_call(model.net, v, (x,)))(
        dict(zip(names, values.values(), strict=True))
    )
    O = torch.cat([j.flatten(2) for j in jacobian.values()], 2)
    O = torch.complex(O[:, 0], O[:, 1]) if parts == 2 else O[:, 0]
    centred, off = O - p.to(O.dtype) @ O, energies - (p.to(energies.dtype) * energies).sum()
    S = (centred.conj().T * p.to(O.dtype)) @ centred
    force = (centred.conj().T * p.to(O.dtype)) @ off
    S, force = (t.real if t.is_complex() else t for t in (S, force))
    expected = flat(model) - 0.3 * torch.linalg.solve(S + 0.05 * torch.eye(len(S), dtype=DTYPE), force)
    optimizer = natgrad.NaturalGradient(model, metric=metric, lr=0.3, damping=0.05)
    energy = optimizer.step(natgrad.reconfigure(model, x, energies, weights if weighted else None))
    mean = (p.to(energies.dtype) * energies).sum()
    assert float(energy) == pytest.approx(float(mean.real), rel=1e-12)
    torch.testing.assert_close(flat(model), expected, rtol=1e-8, atol=1e-10)


def test_reconfiguration_says_what_it_lacks() -> None:
    model = Amplitude(1)
    x, energies = torch.ones(3, 4, dtype=DTYPE), torch.ones(3, dtype=DTYPE)
    before = flat(model)
    with pytest.raises(natgrad.ConfigError, match="lr="):
        natgrad.NaturalGradient(model, metric="exact").step(natgrad.reconfigure(model, x, energies))
    with pytest.raises(natgrad.ConfigError, match="gram"):
        natgrad.NaturalGradient(model, metric="kfac", lr=0.1).step(natgrad.reconfigure(model, x, energies))
    with pytest.raises(natgrad.OutputError, match="local energies"):
        natgrad.NaturalGradient(model, metric="exact", lr=0.1).step(
            natgrad.reconfigure(model, x, energies[:2])
        )
    with pytest.raises(natgrad.NonFiniteError, match="finite"):
        natgrad.NaturalGradient(model, metric="exact", lr=0.1).step(
            natgrad.reconfigure(model, x, energies / 0)
        )
    assert torch.equal(flat(model), before)
