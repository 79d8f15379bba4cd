"""z-loss is the negative log of a likelihood too, of y and of an observation that log Z = 0; H is that one's Fisher."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad.errors import ConfigError, OutputError
from natgrad.likelihoods import Categorical, likelihood_from
from oracle import fisher as fisher_oracle
from oracle import likelihoods as oracle

ZETA = 0.03
DTYPE = torch.float64


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss with outputs and targets, and each event's c tₖ."""

    loss: natgrad.CrossEntropyLoss
    z: Tensor
    y: Tensor
    coefficients: Tensor  # [events, C]

    def naive(self, z: Tensor) -> Tensor:
        """Σ over events of −Σ tₖ log pₖ + ζ s log² Z, one event at a time."""
        total = z.new_zeros(())
        for own, t in zip(z.movedim(1, -1).reshape(-1, z.shape[1]), self.coefficients):
            log_z = own.exp().sum().log()
            total = total - (t * (own - log_z)).sum() + ZETA * t.sum() * log_z**2
        return total


def cases() -> Iterator:
    grid = itertools.product(
        ("mean", "sum"),
        (None, torch.tensor([0.5, 0.0, 2.0, 1.25], dtype=DTYPE)),
        (0.0, 0.2),
        ("index", "ignored", "ignore=1", "probabilities"),
        ((6, 4), (3, 4, 2)),
    )
    for reduction, weight, smoothing, kind, shape in grid:
        source = torch.Generator().manual_seed(0)
        z = torch.randn(shape, dtype=DTYPE, generator=source) + 1.0
        count, ignore = z.numel() // 4, 1 if kind == "ignore=1" else -100
        if kind == "probabilities":
            y = torch.rand(shape, dtype=DTYPE, generator=source)
        else:
            y = torch.arange(count) % 4
            if kind == "ignored":
                y[1], y[4] = ignore, ignore
            y = y.view(shape[0], *shape[2:])
        t = torch.tensor(oracle.categorical_coefficients(y, 4, weight, smoothing, ignore), dtype=DTYPE)
        c = oracle.categorical_constant(y, weight, ignore, reduction, count)
        options = {"label_smoothing": smoothing, "ignore_index": ignore, "reduction": reduction}
        loss = natgrad.CrossEntropyLoss(weight, z_loss=ZETA, **options)
        name = f"{kind}-{reduction}-{'weight' if weight is not None else 'plain'}-{smoothing}-{len(shape)}d"
        yield pytest.param(Case(loss, z, y, c * t), id=name)


CASES = list(cases())


def dense(likelihood: Categorical, z: Tensor, y: Tensor | None) -> Tensor:
    identity = torch.eye(z.numel(), dtype=z.dtype).view(-1, *z.shape)
    return likelihood.fisher_product(z, identity, y).view(z.numel(), z.numel())


def joint_fisher(z: Tensor, zeta: float) -> Tensor:
    """E[score scoreᵀ] of one event's y ~ softmax(z) and u ~ N(log Z, 1/(2ζ)), y enumerated and u by quadrature."""
    log_z = z.logsumexp(0).detach()
    u, mass_u = oracle.support(torch.distributions.Normal(log_z, (2 * zeta) ** -0.5, validate_args=False))
    mass_y = z.softmax(0)

    def log_density(a: Tensor) -> Tensor:  # [y, u]
        of_u = torch.distributions.Normal(a.logsumexp(0), (2 * zeta) ** -0.5, validate_args=False)
        return a.log_softmax(0)[:, None] + of_u.log_prob(u)[None]

    scores = torch.func.jacrev(log_density)(z)
    return torch.einsum("y,u,yua,yub->ab", mass_y, mass_u, scores, scores)


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_the_formulas(case: Case) -> None:
    likelihood = likelihood_from(case.loss)
    assert isinstance(likelihood, Categorical)
    expected = torch.func.grad_and_value(case.naive)(case.z)
    for function in (case.loss, likelihood.loss):
        found = torch.func.grad_and_value(lambda z, own=function: own(z, case.y))(case.z)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", CASES)
def test_fisher_is_that_of_classes_and_of_log_z(case: Case) -> None:
    z, events = case.z.flatten(), oracle.categorical_events(case.z.shape)
    expected = torch.zeros(z.numel(), z.numel(), dtype=DTYPE)
    for event, scale in zip(events, case.coefficients.sum(1)):
        index = torch.tensor(event)
        expected[index[:, None], index] = scale * joint_fisher(z[index], ZETA)
    likelihood = likelihood_from(case.loss)
    torch.testing.assert_close(dense(likelihood, case.z, case.y), expected, rtol=1e-9, atol=1e-12)
    signals = list(likelihood.signals(case.z, case.y, "exact"))
    mask = torch.block_diag(*[torch.ones(4, 4, dtype=DTYPE)] * len(events))
    if case.z.dim() == 2:  # events are examples, so that signals keep them apart
        found = sum(torch.outer(s.flatten(), s.flatten()) for s in signals) * mask
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    else:
        rows = torch.stack(signals).flatten(2)
        found = torch.block_diag(*torch.einsum("kna,knb->nab", rows, rows))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert len(signals) <= case.z[0].numel()


@pytest.mark.parametrize("case", CASES)
def test_what_the_hessian_has_beyond_is_log_z_times_the_classes(case: Case) -> None:
    """∇²h = H + 2ζ log Z · c s (diag p − p pᵀ): the only part that is left out, indefinite where log Z < 0."""
    plain = dataclasses.replace(likelihood_from(case.loss), z_loss=0.0)
    log_z = case.z.logsumexp(1, keepdim=True).expand(case.z.shape).flatten()
    beyond = 2 * ZETA * log_z[:, None] * dense(plain, case.z, case.y)
    found = dense(likelihood_from(case.loss), case.z, case.y) + beyond
    torch.testing.assert_close(found, oracle.hessian(case.naive, case.z), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_empirical_signal_is_each_events_gradient(case: Case) -> None:
    (signal,) = likelihood_from(case.loss).signals(case.z, case.y, "empirical")
    gradient = torch.func.grad(case.naive)(case.z).movedim(1, -1).reshape(-1, 4)
    roots = case.coefficients.sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(roots * signal.movedim(1, -1).reshape(-1, 4), gradient)


@pytest.mark.parametrize("kind", ["mc", "rademacher"])
def test_random_signals_have_mean_zero_and_the_fisher_as_second_moment(kind: str) -> None:
    draws = 20_000
    z = torch.tensor([[1.0, -0.5, 0.3, 2.0]], dtype=DTYPE)
    likelihood = Categorical(reduction="sum", z_loss=0.4)
    (rows,) = likelihood.signals(z.expand(draws, 4), kind=kind, generator=torch.Generator().manual_seed(0))
    for samples, expected in (
        (rows, torch.zeros(4, dtype=DTYPE)),
        (rows[:, :, None] * rows[:, None], dense(likelihood, z, None)),
    ):
        error = samples.std(0) / math.sqrt(draws)
        assert torch.all((samples.mean(0) - expected).abs() <= 4 * error + 1e-12)


@pytest.mark.parametrize("case", CASES[:6])
def test_the_divergence_has_h_as_its_hessian(case: Case) -> None:
    likelihood, z = likelihood_from(case.loss), case.z
    H = dense(likelihood, z, case.y)
    step = 1e-4 * torch.randn(z.numel(), dtype=DTYPE)
    found = likelihood.divergence(z, z + step.view(z.shape), case.y).sum()
    torch.testing.assert_close(found, 0.5 * step @ H @ step, rtol=2e-3, atol=0.0)


def test_without_a_coefficient_it_is_torchs_loss_to_the_last_bit() -> None:
    z, y = torch.randn(5, 4), torch.tensor([0, 3, 1, -100, 2])
    theirs = nn.CrossEntropyLoss(label_smoothing=0.1)(z, y)
    assert torch.equal(natgrad.CrossEntropyLoss(label_smoothing=0.1)(z, y), theirs)
    for kind in ("mc", "rademacher", "exact", "empirical"):
        ours, plain = (
            list(one.signals(z, y, kind, torch.Generator().manual_seed(0)))
            for one in (likelihood_from(natgrad.CrossEntropyLoss()), likelihood_from(nn.CrossEntropyLoss()))
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_half_precision_outputs_keep_their_type() -> None:
    z, y = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    found = natgrad.CrossEntropyLoss(z_loss=0.1)(z.bfloat16(), y)
    assert found.dtype == torch.bfloat16
    assert found.float() == pytest.approx(float(natgrad.CrossEntropyLoss(z_loss=0.1)(z, y)), rel=0.02)


def test_the_fisher_of_a_model_is_jhj() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(DTYPE)
    x, y = torch.randn(6, 3, dtype=DTYPE), torch.tensor([0, 1, 2, -100, 1, 0])
    loss = natgrad.CrossEntropyLoss(z_loss=ZETA, label_smoothing=0.1)
    F = natgrad.fisher(model, loss, [(x, y)], metric=natgrad.Dense("exact")).to_dense()
    z, J = model(x).detach(), fisher_oracle.jacobian(model, x)
    torch.testing.assert_close(F, J.T @ dense(likelihood_from(loss), z, y) @ J)


def test_a_step_knows_how_far_log_z_is_to_go() -> None:
    """Logits that are raised together change no class: the classes' F has nothing there, and λ alone would bound it."""
    shift = nn.Linear(1, 4).to(DTYPE)
    with torch.no_grad():
        shift.weight.zero_()
        shift.bias.fill_(2.0)
    optimizer = natgrad.NaturalGradient(
        shift, loss := natgrad.CrossEntropyLoss(z_loss=1e-4), metric=natgrad.Dense("exact"), lr=1.0,
        damping=1e-9,
    )  # fmt: skip
    x, y = torch.ones(4, 1, dtype=DTYPE), torch.arange(4)
    loss(shift(x), y).backward()
    optimizer.step()
    assert shift(x).logsumexp(1).abs().max() < 1e-3


def test_in_an_ordinary_loop() -> None:
    torch.manual_seed(0)
    model, loss = (
        nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)),
        natgrad.CrossEntropyLoss(z_loss=1e-2),
    )
    optimizer = natgrad.NaturalGradient(model, loss)
    x, y = torch.randn(32, 3), torch.randint(4, (32,))
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.85 * values[0]


@pytest.mark.parametrize("bad", [-1e-4, math.nan, math.inf])
def test_a_coefficient_out_of_range_is_refused(bad: float) -> None:
    for build in (Categorical, natgrad.CrossEntropyLoss):
        with pytest.raises(ConfigError, match="z_loss must be finite and at least 0"):
            build(z_loss=bad)


def test_what_the_loss_refuses() -> None:
    with pytest.raises(ConfigError, match="reduction must be"):
        natgrad.CrossEntropyLoss(reduction="none")
    with pytest.raises(OutputError, match="needs a batch dimension"):
        natgrad.CrossEntropyLoss()(torch.zeros(3), torch.tensor(1))
