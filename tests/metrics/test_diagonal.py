"""metric="diagonal" is the diagonal of the definition, however a weight is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import natgrad.metrics.diagonal as diagonal_module
import natgrad.operators.layerrows as layerrows
from natgrad import Diagonal, StepError
from oracle import fisher as oracle

DTYPE = torch.float64


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, generator=torch.Generator().manual_seed(5))


def classes(*shape: int) -> Tensor:
    return torch.randint(3, shape, generator=torch.Generator().manual_seed(6))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 2, padding=1), nn.Tanh(), nn.Conv2d(4, 3, (2, 1), stride=2))


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv1d(4, 2, 1, groups=2, bias=False))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(torch.sin(self.first(x)))))


def cases() -> Iterator:
    for reduction in ("mean", "sum"):
        ce, mse = nn.CrossEntropyLoss(reduction=reduction), nn.MSELoss(reduction=reduction)
        yield f"ce-{reduction}", net, ce, real(5, 2), classes(5)
        yield f"spatial-{reduction}", images, ce, real(3, 2, 3, 3), classes(3, 2, 2)
        yield f"positions-{reduction}", net, mse, real(4, 3, 2), real(4, 3, 3)
        yield f"grouped-{reduction}", grouped, mse, real(4, 2, 5), real(4, 2, 4)
        yield f"tied-{reduction}", Tied, mse, real(5, 3), real(5, 3)


CASES = {name: case for name, *case in cases()}


def batch(name: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    build, loss, x, y = CASES[name]
    return build().to(DTYPE), loss, x, y


def values(shown) -> Tensor:
    return shown.estimate.operator().diagonal()


@pytest.mark.parametrize("name", CASES)
def test_exact_is_the_diagonal_of_the_definition(name: str, show: Callable) -> None:
    model, loss, x, y = batch(name)
    shown = show(Diagonal(kind="exact"), model, loss)
    shown.observe(x, y)
    torch.testing.assert_close(values(shown), oracle.fisher(model, loss, x, y).diagonal())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_empirical_is_made_of_squared_gradients(name: str, show: Callable) -> None:
    model, loss, x, y = batch(name)
    shown = show(Diagonal(kind="empirical"), model, loss)
    shown.observe(x, y)
    torch.testing.assert_close(values(shown), oracle.empirical(model, loss, x, y).diagonal())


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, show: Callable) -> None:
    model, loss, x, y = batch("spatial-mean")
    monkeypatch.setattr(layerrows, "PORTION", 1)
    monkeypatch.setattr(diagonal_module, "COLUMN_BYTES", 1)
    shown = show(Diagonal(kind="exact"), model, loss)
    shown.observe(x, y)
    torch.testing.assert_close(values(shown), oracle.fisher(model, loss, x, y).diagonal())


@pytest.mark.parametrize("kind", ["mc", "rademacher"])
@pytest.mark.parametrize("name", ["ce-mean", "spatial-sum", "tied-mean"])
def test_sampled_kinds_converge_to_the_exact(name: str, kind: str, show: Callable) -> None:
    model, loss, x, y = batch(name)
    draws = []
    for seed in range(250):
        shown = show(Diagonal(kind=kind), model, loss, seed=seed)
        shown.observe(x, y)
        draws.append(values(shown))
    samples = torch.stack(draws)
    error = samples.std(0) / len(draws) ** 0.5
    exact = oracle.fisher(model, loss, x, y).diagonal()
    assert torch.all((samples.mean(0) - exact).abs() <= 4 * error + 1e-12)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", ["ce-mean", "ce-sum", "spatial-sum", "positions-mean"])
def test_micro_batches_are_one_batch(name: str, kind: str, show: Callable) -> None:
    model, loss, x, y = batch(name)
    whole, parts = show(Diagonal(kind=kind), model, loss), show(Diagonal(kind=kind), model, loss)
    whole.observe(x, y)
    for k, rows in enumerate(torch.arange(len(x)).chunk(2)):
        parts.observe(x[rows], y[rows], first=k == 0)
    torch.testing.assert_close(values(parts), values(whole))


class Either(nn.Module):
    """Takes one of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 3), nn.Linear(2, 3)
        self.way = "left"

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.way)(x)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_layer_that_joins_late_is_averaged_over_its_own_steps(reduction: str, show: Callable) -> None:
    model, loss, x, y = Either().to(DTYPE), nn.MSELoss(reduction=reduction), real(5, 2), real(5, 3)
    shown = show(Diagonal(kind="exact", decay=0.9), model, loss)
    for step in range(3):
        shown.observe(x, y, step)
    model.way = "right"
    shown.observe(x, y, 3)  # in a step of its own
    found = shown.estimate.operator().values
    torch.testing.assert_close(found["right.weight"], found["left.weight"])
    model.way = "left"
    shown.observe(x, y, 4)
    model.way = "right"
    shown.observe(x, y, 4, first=False)  # in the second micro-batch of a step
    found = shown.estimate.operator().values
    torch.testing.assert_close(found["right.weight"], found["left.weight"])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_average_is_corrected_for_its_bias(reduction: str, show: Callable) -> None:
    model, loss, decay = net().to(DTYPE), nn.MSELoss(reduction=reduction), 0.8
    shown = show(Diagonal(kind="exact", decay=decay), model, loss)
    diagonals, weights = [], []
    for step in range(4):
        x = real(5, 2) * (step + 1)
        shown.observe(x, real(5, 3), step)
        diagonals.append(oracle.fisher(model, loss, x, real(5, 3)).diagonal())
        weights = [w * decay for w in weights] + [1.0]
        expected = sum(w * d for w, d in zip(weights, diagonals)) / sum(weights)
        torch.testing.assert_close(values(shown), expected)


@pytest.mark.parametrize("root", [False, True])
def test_solve_divides(root: bool, show: Callable) -> None:
    model, loss, x, y = batch("ce-mean")
    shown = show(Diagonal(kind="exact", root=root), model, loss)
    shown.observe(x, y)
    d = oracle.fisher(model, loss, x, y).diagonal()
    g = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    solved = oracle.flat(shown.estimate.solve(g, 0.03, 0))
    torch.testing.assert_close(solved, oracle.flat(g) / ((d.sqrt() if root else d) + 0.03))
    some = {"0.bias": g["0.bias"]}
    assert list(shown.estimate.solve(some, 0.03, 0)) == ["0.bias"]
    torch.testing.assert_close(values(shown), d)  # solving changes nothing


def test_it_must_have_seen_a_batch(show: Callable) -> None:
    model, loss, _, _ = batch("ce-mean")
    with pytest.raises(StepError, match="loss"):
        show(Diagonal(), model, loss).estimate.operator()


def test_its_state_restores_it(show: Callable) -> None:
    model, loss, x, y = batch("ce-mean")
    shown, other = (show(Diagonal(kind="exact"), model, loss) for _ in range(2))
    shown.observe(x, y, 0)
    other.estimate.load_state_dict(shown.estimate.state_dict())
    for one in (shown, other):
        one.observe(x + 1, y, 4)
    assert torch.equal(values(shown), values(other))
