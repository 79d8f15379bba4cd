"""metric="block": F within each layer. And the moments that it shares with metric="dense"."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad import Block, ConfigError, Dense, StepError
from natgrad.metrics import moments
from oracle import fisher as oracle
from oracle.problems import MODELS, problem

DTYPE = torch.float64
CE = nn.CrossEntropyLoss()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).to(DTYPE)


def data(seed: int, n: int = 6) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, dtype=DTYPE, generator=source), torch.randint(3, (n,), generator=source)


def within(F: Tensor, model: nn.Module, layers: list[list[str]]) -> Tensor:
    kept = torch.zeros_like(F)
    for names in layers:
        index = oracle.positions(model, names)
        kept[index[:, None], index] = F[index[:, None], index]
    return kept


LAYERS = [["0.weight", "0.bias"], ["2.weight", "2.bias"]]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_it_is_the_average_over_steps(decay: float, reduction: str, show: Callable) -> None:
    model, loss = net(), nn.CrossEntropyLoss(reduction=reduction)
    shown = show(Block(decay=decay), model, loss)
    F, total = torch.zeros(()), 0.0
    for step in range(3):
        x, y = data(step)
        shown.observe(x[:2], y[:2], step)
        shown.observe(x[2:], y[2:], step, first=False)
        F, total = decay * F + oracle.fisher(model, loss, x, y), decay * total + 1
    torch.testing.assert_close(shown.dense(), within(F / total, model, LAYERS))


def test_a_block_is_what_acts_together_and_the_rest_goes_by_module(show: Callable) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))
            self.linear, self.norm = nn.Linear(2, 3), nn.LayerNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x * self.a + self.b))

    model, (x, y) = Mixed().to(DTYPE), data(0)
    operator = natgrad.fisher(model, CE, (x, y), "block")
    assert {block.space.names for block in operator.blocks} == {
        ("linear.weight", "linear.bias"),
        ("a", "b"),
        ("norm.weight", "norm.bias"),
    }
    layers = [list(block.space.names) for block in operator.blocks]
    torch.testing.assert_close(operator.to_dense(), within(oracle.fisher(model, CE, x, y), model, layers))


def test_solve_is_the_operators_and_a_frozen_part_is_left_out(show: Callable) -> None:
    model, (x, y) = net(), data(0)
    shown = show(Block(), model, CE)
    shown.observe(x, y)
    gradient = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    expected = shown.estimate.operator().solve(gradient, 0.2)
    found = shown.estimate.solve(gradient, 0.2, 0)
    assert found.keys() == expected.keys()
    for name in gradient:
        torch.testing.assert_close(found[name], expected[name])
    weights = {n: g for n, g in gradient.items() if n.endswith("weight")}
    F = oracle.fisher(model, CE, x, y)
    for name, solution in shown.estimate.solve(weights, 0.2, 0).items():
        index = oracle.positions(model, [name])
        matrix = F[index[:, None], index] + 0.2 * torch.eye(len(index), dtype=DTYPE)
        torch.testing.assert_close(
            solution.reshape(-1), torch.linalg.solve(matrix, weights[name].reshape(-1))
        )


@pytest.mark.parametrize("metric", [Block(decay=0.5), Dense(decay=0.5)])
def test_its_state_restores_it_to_the_last_bit(metric: natgrad.Metric, show: Callable) -> None:
    model = net()
    shown, other = (show(metric, model, CE) for _ in range(2))
    shown.observe(*data(0), 0)
    other.estimate.load_state_dict(shown.estimate.state_dict())
    for one in (shown, other):
        one.observe(*data(1), 1)
    assert torch.equal(shown.dense(), other.dense())
    show(metric, model, CE).estimate.load_state_dict(show(metric, model, CE).estimate.state_dict())


def test_it_needs_an_observation_and_room(show: Callable) -> None:
    with pytest.raises(StepError, match="no block was observed yet"):
        show(Block(), net(), CE).dense()
    with pytest.raises(ConfigError, match="decay=1.0"):
        Block(decay=1.0)
    with pytest.raises(ConfigError, match="for weight alone"):
        Block().start({"weight": nn.Parameter(torch.zeros(200, 200))})


class Changing(nn.Module):
    """Uses its parameters in another way in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head, self.mode = nn.Linear(2, 3), nn.Linear(3, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.linear(x))
        if self.mode == 1:  # several positions
            h = torch.tanh(self.linear(torch.stack([x, 2 * x], 1))).sum(1)
        if self.mode == 2:  # outside any rule too
            h = h + self.linear.bias
        return self.head(h)


@pytest.mark.parametrize("metric", [Dense(decay=0.5), Block(decay=0.5)])
def test_steps_that_use_parameters_differently_join_one_average(
    metric: natgrad.Metric, show: Callable
) -> None:
    model = Changing().to(DTYPE)
    shown = show(metric, model, CE)
    F, total = torch.zeros(()), 0.0
    for step, mode in enumerate((0, 1, 0, 2, 2)):
        model.mode = mode
        x, y = data(step)
        shown.observe(x, y, step)
        F, total = 0.5 * F + oracle.fisher(model, CE, x, y), 0.5 * total + 1
    layers = [["linear.weight", "linear.bias"], ["head.weight", "head.bias"]]
    expected = F / total if isinstance(metric, Dense) else within(F / total, model, layers)
    torch.testing.assert_close(shown.dense(), expected)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("waiting", "chunk"), [(1, 2**21), (2**27, 1), (1, 40)])
def test_moments_do_not_depend_on_how_the_work_is_cut(
    model: str, waiting: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem(model, "ce")
    monkeypatch.setattr(moments, "WAITING_BYTES", waiting)
    monkeypatch.setattr(moments, "CHUNK", chunk)
    found = natgrad.fisher(p.model, p.loss, (p.x, p.y), "dense")
    torch.testing.assert_close(found.to_dense(), oracle.fisher(p.model, p.loss, p.x, p.y))
