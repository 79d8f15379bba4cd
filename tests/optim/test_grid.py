"""`natgrad.GridSearch`: the best length of a logarithmic grid, all of them evaluated together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad
from natgrad import ConfigError, GridSearch, NaturalGradient
from natgrad.likelihoods import Residuals
from natgrad.optim.linearised import APART
from tests.laws.test_least_squares_laws import DTYPE, flat, network, oracle, points, scaled_blocks, two_blocks

X = points(9)
Closure = Callable[[], Any]


def plain(model: nn.Module) -> Tensor:
    return model(X) - X[:, :2].exp()


def complex_(model: nn.Module) -> Tensor:
    z = model(X)
    return torch.complex((z[:, 0] * z[:, 1]).sin(), z[:, 1] ** 2)


def dropped(model: nn.Module) -> Tensor:
    return F.dropout(model(X), 0.5) - X[:, :2]


def laplacian(model: nn.Module) -> dict[str, Tensor]:
    return {"inner": natgrad.pde.laplacian(model, X) + 1, "edge": model(X[:3])}


def by_autograd(model: nn.Module) -> Tensor:
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return slope - X


def by_func(model: nn.Module) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(model))(X).flatten(1) - 0.1


def branching(model: nn.Module) -> Tensor:
    """No function that can be batched: what it does depends on a value."""
    z = model(X)
    return z - 1 if float(z.detach().sum()) > 0 else z + 1


TOGETHER = [plain, two_blocks, complex_, dropped, laplacian, by_func]


def optimizer_of(model: nn.Module, damping: float = 1e-3, **options: Any) -> NaturalGradient:
    return NaturalGradient(model, metric="exact", lr=GridSearch(**options), damping=damping)


@pytest.mark.parametrize("residuals", [*TOGETHER, by_autograd, branching])
def test_lengths_that_go_together_lose_what_each_loses_alone(residuals: Callable[[Any], Any]) -> None:
    models = [network(seed=3) for _ in range(2)]
    optimizers = [optimizer_of(model) for model in models]
    optimizers[1]._agreed.add(APART)
    state = torch.get_rng_state()
    for k in range(4):
        infos = []
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.set_rng_state(state)
            torch.manual_seed(k)
            optimizer.step(lambda: residuals(model))  # noqa: B023
            infos.append((optimizer.info.alpha, optimizer.info.actual, torch.rand(1).item()))
        assert infos[0] == pytest.approx(infos[1], rel=1e-9)
    torch.testing.assert_close(*map(flat, models))
    if residuals in TOGETHER:
        assert APART not in optimizers[0]._agreed


def test_the_step_is_the_best_of_the_grid() -> None:
    model, damping = network(), 1e-4
    r, J = oracle(model, scaled_blocks)
    delta = -torch.linalg.solve(J.T @ J + damping * torch.eye(J.shape[1], dtype=DTYPE), J.T @ r)
    before = flat(model)
    optimizer = NaturalGradient(
        model, Residuals(weights={"edge": 4.0}), metric="gram", lr=GridSearch(finest=12), damping=damping
    )
    losses = {}
    for k in range(13):
        nn.utils.vector_to_parameters(before + 0.5**k * delta, model.parameters())
        losses[0.5**k] = 0.5 * float(scaled_blocks(model).detach().square().sum())
    nn.utils.vector_to_parameters(before.clone(), model.parameters())
    optimizer.step(lambda: two_blocks(model))
    length = min(losses, key=losses.__getitem__)
    assert optimizer.info.alpha == length
    assert optimizer.info.actual == pytest.approx(losses[length] - 0.5 * float(r @ r))
    torch.testing.assert_close(flat(model), before + length * delta, rtol=1e-8, atol=1e-10)


def test_with_momentum_the_direction_is_springs() -> None:
    model, twin = network(seed=1), network(seed=1)
    ours = optimizer_of(model, damping=1.0, momentum=0.7, finest=0)
    springs = NaturalGradient(twin, metric="exact", lr=natgrad.SPRING(1.0, 0.7), damping=1.0)
    for seed in range(4):
        x = points(20, seed)
        ours.step(lambda: model(x) - x[:, :2].sin())  # noqa: B023
        springs.step(lambda: twin(x) - x[:, :2].sin())  # noqa: B023
        assert ours.info.alpha == 1.0
    torch.testing.assert_close(flat(model), flat(twin))


def test_a_closure_that_holds_a_parameter_itself_is_evaluated_length_by_length() -> None:
    model = network()
    weight, bias = model[2].weight, model[2].bias
    optimizer = optimizer_of(model)

    def residuals() -> Tensor:
        return F.linear(torch.tanh(X @ X.T[:, :6] + weight.mean()), weight, bias) - X[:, :2]

    before = float(residuals().detach().square().mean())
    for _ in range(3):
        optimizer.step(residuals)
    assert APART in optimizer._agreed
    assert float(residuals().detach().square().mean()) < 0.5 * before


def test_where_no_length_lowers_the_loss_nothing_moves() -> None:
    model = nn.Linear(3, 2).to(DTYPE)
    optimizer = optimizer_of(model, damping=1e-12)

    def go() -> None:
        for _ in range(5):  # the first solves it, and rounding may leave something to the second
            optimizer.step(lambda: plain(model))

    with pytest.warns(natgrad.StallWarning):
        go()
    before = flat(model)
    optimizer.step(lambda: plain(model))
    assert optimizer.info.stalled
    assert optimizer.damping == 1e-12
    assert torch.equal(flat(model), before)


def test_lengths_at_which_residuals_are_not_finite_are_passed_by() -> None:
    model = nn.Linear(1, 1, bias=False).to(DTYPE)
    nn.init.constant_(model.weight, 1.0)
    optimizer = optimizer_of(model, damping=1e-9)
    # The whole Gauss–Newton step for log w = −5 goes to w = −4.
    optimizer.step(lambda: model(torch.ones(1, 1, dtype=DTYPE)).log() + 5.0)
    assert optimizer.info.alpha == 0.125
    assert model.weight.item() == pytest.approx(1 - 0.125 * 5, rel=1e-6)


@pytest.mark.parametrize(
    "damping", [natgrad.LevenbergMarquardt(initial=1e-2), natgrad.NoiseFloor()], ids=repr
)
def test_it_takes_a_rule_for_the_damping(damping: Any) -> None:
    model = network()
    optimizer = NaturalGradient(model, metric="exact", lr=GridSearch(), damping=damping)
    losses = [float(optimizer.step(lambda: plain(model))) for _ in range(8)]
    assert losses[-1] < 1e-2 * losses[0]


def test_buffers_and_the_generator_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).to(DTYPE).eval()
    optimizer = optimizer_of(model)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    optimizer.step(lambda: plain(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"finest": -1}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        GridSearch(**options)


def test_it_is_for_residuals() -> None:
    with pytest.raises(ConfigError, match="lr must be"):
        NaturalGradient(network(), nn.MSELoss(), lr=GridSearch())
