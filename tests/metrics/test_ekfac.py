"""metric="ekfac": F's diagonal in K-FAC's eigenbasis, averaged over steps, and carried over when the basis turns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad import EKFAC, KFAC, ConfigError, NonFiniteError, StepError
from natgrad.operators import EigenKronecker
from oracle import fisher as oracle
from oracle.problems import problem

DTYPE = torch.float64


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).to(DTYPE)


def data(seed: int, n: int = 6) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, dtype=DTYPE, generator=source), torch.randint(3, (n,), generator=source)


def blocks(shown) -> dict[str, EigenKronecker]:
    found = shown.estimate.operator().blocks
    assert all(isinstance(block, EigenKronecker) for block in found)
    return {block.space.names[0].rpartition(".")[0]: block for block in found}


def diagonal_in(F: Tensor, block: EigenKronecker, model: nn.Module) -> Tensor:
    """diag(Uᵀ F U) with U = U_G ⊗ U_A, by products with each basis vector; F in the model's order."""
    index = oracle.positions(model, block.space.names)
    own = F[index[:, None], index]
    values = torch.zeros_like(block.values)
    for o in range(values.shape[0]):
        for i in range(values.shape[1]):
            V = torch.outer(block.U_G[:, o], block.U_A[:, i])
            flat = torch.cat([V[:, :-1].reshape(-1), V[:, -1]])
            values[o, i] = flat @ own @ flat
    return values


CE = nn.CrossEntropyLoss()


@pytest.mark.parametrize("loss", [CE, nn.CrossEntropyLoss(reduction="sum")])
def test_it_is_the_diagonal_in_kfacs_basis(loss: nn.Module, show: Callable) -> None:
    model, (x, y) = net(), data(0)
    shown, kfac = show(EKFAC(kind="exact"), model, loss), show(KFAC(kind="exact"), model, loss)
    shown.observe(x, y)
    kfac.observe(x, y)
    F = oracle.fisher(model, loss, x, y)
    for (name, block), pair in zip(blocks(shown).items(), kfac.estimate.operator().blocks):
        torch.testing.assert_close(block.U_A.T @ block.U_A, torch.eye(len(block.U_A), dtype=DTYPE))
        for U, factor in ((block.U_A, pair.A), (block.U_G, pair.G)):
            rotated = U.T @ factor @ U
            torch.testing.assert_close(rotated, torch.diag(rotated.diagonal()), rtol=0, atol=1e-12)
        torch.testing.assert_close(block.values, diagonal_in(F, block, model), msg=name)
    assert all(p.grad is None for p in model.parameters())


def test_in_one_basis_it_is_the_average_over_steps(show: Callable) -> None:
    """S = Σ εᵗ⁻ˢ S_s / Σ εᵗ⁻ˢ, in the basis of the first step."""
    model = net()
    shown = show(EKFAC(kind="exact", decay=0.5, refresh=100), model, CE)
    F, total = 0.0, 0.0
    for step in range(3):
        x, y = data(step)
        shown.observe(x, y, step)
        shown.estimate.solve({n: torch.ones_like(p) for n, p in model.named_parameters()}, 1.0, step)
        F, total = 0.5 * F + oracle.fisher(model, CE, x, y), 0.5 * total + 1
    for block in blocks(shown).values():
        torch.testing.assert_close(block.values, diagonal_in(F / total, block, model))


def test_when_the_basis_turns_the_old_operator_keeps_its_diagonal_there(show: Callable) -> None:
    model, (x0, y0), (x1, y1) = net(), data(0), data(1)
    gradient = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    shown = show(EKFAC(kind="exact", decay=0.5, refresh=1), model, CE)
    shown.observe(x0, y0, 0)
    shown.estimate.solve(gradient, 1.0, 0)
    order = [n for n, _ in model.named_parameters()]
    old = shown.estimate.operator().restrict(order).to_dense()
    shown.observe(x1, y1, 1)
    shown.estimate.solve(gradient, 1.0, 1)
    new = oracle.fisher(model, CE, x1, y1)
    for block in blocks(shown).values():
        expected = (0.5 * diagonal_in(old, block, model) + diagonal_in(new, block, model)) / 1.5
        torch.testing.assert_close(block.values, expected)
    # So the trace is the exact average's, however often the basis turned.
    trace = (0.5 * oracle.fisher(model, CE, x0, y0).trace() + new.trace()) / 1.5
    torch.testing.assert_close(shown.estimate.operator().trace(), trace)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_of_a_step_are_one_batch(reduction: str, show: Callable) -> None:
    model, loss = net(), nn.CrossEntropyLoss(reduction=reduction)
    gradient = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    whole, parts = (show(EKFAC(kind="exact", decay=0.5), model, loss) for _ in range(2))
    for step in range(3):
        x, y = data(step)
        whole.observe(x, y, step)
        parts.observe(x[:2], y[:2], step)
        parts.observe(x[2:], y[2:], step, first=False)
        one, other = (shown.estimate.solve(gradient, 0.1, step) for shown in (whole, parts))
        for name in gradient:
            torch.testing.assert_close(one[name], other[name])


@pytest.mark.parametrize("name", ["linear", "tokens", "grouped conv2d", "conv1d"])
def test_solve_is_the_operators(name: str, show: Callable) -> None:
    p = problem(name, "ce")
    shown = show(EKFAC(kind="exact"), p.model, p.loss)
    shown.observe(p.x, p.y)
    gradient = {n: torch.randn_like(v) for n, v in p.model.named_parameters()}
    found = shown.estimate.solve(gradient, 0.3, 0)
    expected = shown.estimate.operator().restrict(list(gradient)).solve(gradient, 0.3)
    for n in gradient:
        torch.testing.assert_close(found[n], expected[n])


def test_a_frozen_bias_moves_with_none(show: Callable) -> None:
    model, (x, y) = net(), data(0)
    shown = show(EKFAC(kind="exact"), model, CE)
    shown.observe(x, y)
    weights = {n: torch.ones_like(p) for n, p in model.named_parameters() if n.endswith("weight")}
    found = shown.estimate.solve(weights, 0.1, 0)
    padded = {n: weights.get(n, torch.zeros_like(p)) for n, p in model.named_parameters()}
    expected = shown.estimate.operator().restrict(list(padded)).solve(padded, 0.1)
    for n in weights:
        torch.testing.assert_close(found[n], expected[n])


def test_a_block_that_is_seen_late_has_a_basis_of_its_own(show: Callable) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.both = nn.Linear(2, 3), nn.Linear(3, 3), False

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) if self.both else self.first(x)

    model = Late().to(DTYPE)
    shown = show(EKFAC(kind="exact", decay=0.5, refresh=10), model, CE)
    gradient = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    shown.observe(*data(0), 0)
    assert set(shown.estimate.solve(gradient, 0.1, 0)) == {"first.weight", "first.bias"}
    model.both = True
    x, y = data(1)
    shown.observe(x, y, 1)
    assert set(shown.estimate.solve(gradient, 0.1, 1)) == set(gradient)
    second = blocks(shown)["second"]
    torch.testing.assert_close(second.values, diagonal_in(oracle.fisher(model, CE, x, y), second, model))


def test_its_state_restores_it(show: Callable) -> None:
    model = net()
    gradient = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    shown, other = (show(EKFAC(kind="exact", refresh=2), model, CE) for _ in range(2))
    for step in range(3):
        shown.observe(*data(step), step)
        shown.estimate.solve(gradient, 0.1, step)
    other.estimate.load_state_dict(shown.estimate.state_dict())
    for step in range(3, 6):
        for one in (shown, other):
            one.observe(*data(step), step)
        first, second = (one.estimate.solve(gradient, 0.1, step) for one in (shown, other))
        assert all(torch.equal(first[name], second[name]) for name in gradient)


def test_a_batch_that_is_not_finite_enters_no_average(show: Callable) -> None:
    model, (x, y) = net(), data(0)
    shown = show(EKFAC(kind="exact"), model, CE)
    shown.observe(x, y, 0)
    before = shown.dense()
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        shown.observe(torch.full_like(x, torch.inf), y, 1)
    assert torch.equal(shown.dense(), before)


def test_it_needs_an_observation(show: Callable) -> None:
    shown = show(EKFAC(), net(), CE)
    with pytest.raises(StepError, match="no eigenvalue was observed yet"):
        shown.dense()
    with pytest.raises(StepError, match="no eigenvalue was observed yet"):
        shown.estimate.solve({}, 0.1, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "decay=1.0"),
        ({"refresh": 0}, "at least 1 step"),
        ({"factors": 0}, "at least 1 step"),
        ({"examples": 0}, "examples=0"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EKFAC(**options)


def test_it_trains() -> None:
    """A regression whose loss begins near 100, and whose condition number is 10⁴."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).to(DTYPE)
    x = torch.randn(64, 4, dtype=DTYPE) * torch.tensor([1.0, 10.0, 0.1, 3.0], dtype=DTYPE)
    y = x @ torch.ones(4, 1, dtype=DTYPE)
    loss_fn = nn.MSELoss()
    optimizer = natgrad.NaturalGradient(model, loss_fn, metric=EKFAC(kind="exact"))
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
    assert loss_fn(model(x), y).item() < 1e-3
