"""metric="dense", kind="exact" is c Σ wₙ Jₙᵀ Hₙ Jₙ, for every likelihood, reduction and way of acting."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natgrad import ConfigError, Dense
from oracle import fisher as oracle

DTYPE = torch.float64
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.25], dtype=DTYPE)


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, generator=torch.Generator().manual_seed(5))


def classes(*shape: int, ignored: int | None = None) -> Tensor:
    y = torch.randint(3, shape, generator=torch.Generator().manual_seed(6))
    if ignored is not None:
        y.view(-1)[1] = ignored
    return y


def net(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs))


class Spatial(nn.Module):
    """Logits [N, 3, 2, 3] of an image, an event for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 2, 2, padding=1), nn.Conv2d(2, 3, (2, 1), groups=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv1d(2, 4, 2, groups=2, stride=2),
            nn.Conv1d(4, 2, 1, groups=2, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Tied(nn.Module):
    """One weight in two layers, one module called twice, positions that share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(torch.sin(self.first(x)))))


class Uncovered(nn.Module):
    """Normalisation, a bare parameter, a lookup, a transposed use and learned queries beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)
        self.scale, self.query = nn.Parameter(torch.rand(3)), nn.Parameter(torch.randn(5, 3))
        self.table = nn.Embedding(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.linear(x))) * self.scale + self.table((x[:, 0] > 0).long())
        return hidden @ self.linear.weight.T + (x @ self.linear(self.query).T).sum(1, keepdim=True)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.spread = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.body(x))
        return self.mean(hidden), F.softplus(self.spread(hidden))


def cases() -> Iterator:
    for reduction in ("mean", "sum"):
        ce = {"reduction": reduction}
        yield f"ce-{reduction}", net, nn.CrossEntropyLoss(**ce), real(5, 2), classes(5)
        weighted = nn.CrossEntropyLoss(weight=CLASS_WEIGHT, label_smoothing=0.1, ignore_index=2, **ce)
        yield f"ce-weighted-{reduction}", net, weighted, real(5, 2), classes(5, ignored=2)
        spatial = nn.CrossEntropyLoss(weight=CLASS_WEIGHT, **ce)
        yield f"ce-spatial-{reduction}", Spatial, spatial, real(3, 2, 2, 2), classes(3, 2, 3, ignored=-100)
        yield f"mse-{reduction}", net, nn.MSELoss(**ce), real(5, 2), real(5, 3)
        pos = nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHT, **ce)
        yield f"bce-{reduction}", net, pos, real(5, 2), (real(5, 3) > 0).to(DTYPE)
        yield f"poisson-{reduction}", net, nn.PoissonNLLLoss(**ce), real(5, 2), classes(5, 3).to(DTYPE)
        yield f"gaussian-{reduction}", TwoHeads, nn.GaussianNLLLoss(**ce), real(5, 2), real(5, 2)
        yield f"grouped-{reduction}", Grouped, nn.MSELoss(**ce), real(4, 2, 6), real(4, 2, 3)
        yield (
            f"positions-{reduction}",
            lambda: nn.Linear(2, 3),
            nn.MSELoss(**ce),
            real(4, 3, 2),
            real(4, 3, 3),
        )
        yield f"tied-{reduction}", Tied, nn.MSELoss(**ce), real(5, 3), real(5, 3)
        yield f"uncovered-{reduction}", Uncovered, nn.MSELoss(**ce), real(5, 3), real(5, 3)


CASES = {name: case for name, *case in cases()}


def batch(name: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    build, loss, x, y = CASES[name]
    return build().to(DTYPE), loss, x, y


@pytest.mark.parametrize("name", CASES)
def test_exact_is_the_definition(name: str, show: Callable) -> None:
    model, loss, x, y = batch(name)
    shown = show(Dense(), model, loss)
    shown.observe(x, y)
    torch.testing.assert_close(shown.dense(), oracle.fisher(model, loss, x, y))
    assert all(p.grad is None for p in model.parameters())


EMPIRICAL = [
    n for n in CASES if "weighted" not in n and "gaussian" not in n and "bce" not in n and "spatial" not in n
]


@pytest.mark.parametrize("name", EMPIRICAL)
def test_empirical_is_made_of_real_gradients(name: str, show: Callable) -> None:
    model, loss, x, y = batch(name)
    shown = show(Dense(kind="empirical"), model, loss)
    shown.observe(x, y)
    torch.testing.assert_close(shown.dense(), oracle.empirical(model, loss, x, y))


def test_empirical_of_one_event_an_example_is_the_gradients_second_moment(show: Callable) -> None:
    model, loss, x, y = batch("ce-mean")
    shown = show(Dense(kind="empirical"), model, loss)
    shown.observe(x, y)
    total = torch.zeros_like(shown.dense())
    for xn, yn in zip(x, y):
        model.zero_grad()
        loss(model(xn[None]), yn[None]).backward()
        g = oracle.gradient(model)
        total += torch.outer(g, g) / len(x)
    torch.testing.assert_close(shown.dense(), total)


@pytest.mark.parametrize("kind", ["mc", "rademacher"])
@pytest.mark.parametrize(
    "name", ["ce-weighted-mean", "ce-spatial-sum", "bce-mean", "poisson-sum", "gaussian-mean", "tied-mean"]
)
def test_sampled_kinds_converge_to_the_exact(name: str, kind: str, show: Callable) -> None:
    model, loss, x, y = batch(name)
    draws = []
    for seed in range(200):
        shown = show(Dense(kind=kind), model, loss, seed=seed)
        shown.observe(x, y)
        draws.append(shown.dense())
    samples, exact = torch.stack(draws), oracle.fisher(model, loss, x, y)
    error = samples.std(0) / len(draws) ** 0.5
    wrong = (
        samples.mean(0) - exact
    ).abs() > 4.5 * error + 1e-12  # a few hundred entries are compared at once
    assert not wrong.any()


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", ["ce-mean", "ce-sum", "mse-sum", "uncovered-mean", "positions-sum"])
def test_micro_batches_are_one_batch(name: str, kind: str, show: Callable) -> None:
    model, loss, x, y = batch(name)
    whole, parts = show(Dense(kind=kind), model, loss), show(Dense(kind=kind), model, loss)
    whole.observe(x, y)
    for k, rows in enumerate(torch.arange(len(x)).chunk(3)):
        parts.observe(x[rows], y[rows], first=k == 0)
    torch.testing.assert_close(parts.dense(), whole.dense())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_average_is_corrected_for_its_bias(reduction: str, show: Callable) -> None:
    model, loss, decay = net().to(DTYPE), nn.MSELoss(reduction=reduction), 0.8
    shown = show(Dense(decay=decay), model, loss)
    matrices, weights = [], []
    for step in range(4):
        x = real(5, 2) * (step + 1)
        shown.observe(x, real(5, 3), step)
        matrices.append(oracle.fisher(model, loss, x, real(5, 3)))
        weights = [w * decay for w in weights] + [1.0]
        expected = sum(w * F for w, F in zip(weights, matrices)) / sum(weights)
        torch.testing.assert_close(shown.dense(), expected)


def test_without_decay_only_the_last_batch_counts(show: Callable) -> None:
    model, loss = net().to(DTYPE), nn.MSELoss()
    shown = show(Dense(), model, loss)
    shown.observe(real(5, 2), real(5, 3), 0)
    shown.observe(real(4, 2) + 1, real(4, 3), 1)
    torch.testing.assert_close(shown.dense(), oracle.fisher(model, loss, real(4, 2) + 1, real(4, 3)))


def test_a_batch_that_says_nothing_counts_as_zero(show: Callable) -> None:
    model, loss = net().to(DTYPE), nn.CrossEntropyLoss(reduction="sum")
    shown = show(Dense(decay=0.5), model, loss)
    shown.observe(real(5, 2), classes(5), 0)
    before = shown.dense()
    shown.observe(real(5, 2), torch.full((5,), -100), 1)
    torch.testing.assert_close(shown.dense(), before * 0.5 / 1.5)


def test_solve_is_the_damped_inverse_and_restricts_to_what_moves(show: Callable) -> None:
    model, loss, x, y = batch("ce-mean")
    shown = show(Dense(), model, loss)
    shown.observe(x, y)
    F_, damping = oracle.fisher(model, loss, x, y), 0.03
    g = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    solved = shown.estimate.solve(g, damping, 0)
    expected = torch.linalg.solve(F_ + damping * torch.eye(len(F_), dtype=DTYPE), oracle.flat(g))
    torch.testing.assert_close(oracle.flat(solved), expected)
    some = {name: g[name] for name in ("0.bias", "2.weight")}
    index = oracle.positions(model, list(some))
    block = F_[index[:, None], index] + damping * torch.eye(len(index), dtype=DTYPE)
    solved = shown.estimate.solve(some, damping, 0)
    torch.testing.assert_close(oracle.flat(solved), torch.linalg.solve(block, oracle.flat(some)))


def test_its_state_restores_it(show: Callable) -> None:
    model, loss, x, y = batch("ce-mean")
    shown, other = (show(Dense(decay=0.9), model, loss) for _ in range(2))
    shown.observe(x, y, 0)
    other.estimate.load_state_dict(shown.estimate.state_dict())
    for one in (shown, other):
        one.observe(x + 1, y, 1)
    assert torch.equal(shown.dense(), other.dense())


def test_a_model_that_is_too_large_is_refused() -> None:
    with pytest.raises(ConfigError, match="kfac"):
        Dense().start(dict(nn.Linear(300, 300).named_parameters()))


def test_float32_agrees_to_its_precision(show: Callable) -> None:
    model, loss, x, y = batch("ce-mean")
    expected = oracle.fisher(model, loss, x, y)
    shown = show(Dense(), model.float(), loss)
    shown.observe(x.float(), y)
    assert shown.dense().dtype is torch.float32
    torch.testing.assert_close(shown.dense(), expected.float(), rtol=1e-4, atol=1e-6)


def test_kinds_and_decays_are_checked() -> None:
    for build in (lambda: Dense(kind="exakt"), lambda: Dense(decay=1.0), lambda: Dense(decay=-0.1)):
        with pytest.raises(Exception, match=r"exakt|decay"):
            build()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_step_that_is_taken_again_counts_anew(reduction: str, decay: float, show: Callable) -> None:
    """After a step was skipped, its number comes once more with a first micro-batch."""
    model, loss = net().to(DTYPE), nn.MSELoss(reduction=reduction)
    shown = show(Dense(decay=decay), model, loss)
    shown.observe(real(5, 2), real(5, 3), 0)
    shown.observe(real(5, 2), real(5, 3), 0)
    torch.testing.assert_close(shown.dense(), oracle.fisher(model, loss, real(5, 2), real(5, 3)))
