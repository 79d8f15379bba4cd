"""A replay's products are those of the curvature's definition, whatever becomes of the model afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

from natgrad import OutputError
from natgrad.likelihoods import likelihood_from
from natgrad.likelihoods.base import bare
from natgrad.tape import Batch
from natgrad.tape import replay as module
from natgrad.tape.output_curvature import of_likelihood, of_loss, of_signals
from natgrad.tape.replay import Replay, Snapshot, total_product
from oracle import fisher as oracle
from oracle.problems import LOSSES, MODELS, Problem, problem

DTYPE = torch.float64


def find(z: Any) -> tuple[Tensor, ...]:
    return z if isinstance(z, tuple) else (z,)


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def dense(replay: Replay, model: nn.Module) -> Tensor:
    """The matrix, from its products with unit vectors."""
    values = oracle.trainable(model)
    identity, start, rows = torch.eye(oracle.flat(values).numel(), dtype=DTYPE), 0, {}
    for name, value in values.items():
        rows[name] = identity[:, start : start + value.numel()].reshape(-1, *value.shape)
        start += value.numel()
    found = replay.product(rows)
    return torch.cat(
        [found[name].flatten(1) if found[name].ndim > 1 else found[name][:, None] for name in values], 1
    )


def fisher_of(one: Problem, **options: Any) -> Replay:
    batch = Batch((one.x,), {}, one.y, len(one.x))
    of = of_likelihood(likelihood_from(one.loss), one.y, options.pop("weights", None))
    return Replay.gauss_newton(Snapshot.of(one.model), names(one.model), batch, find, of, **options)


def loss_hessian(one: Problem) -> Tensor:
    """∇²L, a row at a time.

    By a loop: torch.func.hessian, and jacrev of jacrev, are wrong on LayerNorm where finite differences are not.
    """
    values = {name: v.requires_grad_() for name, v in oracle.trainable(one.model).items()}
    z = functional_call(one.model, values, (one.x,))
    gradient = torch.autograd.grad(_loss(one, z), list(values.values()), create_graph=True)
    rows = []
    for slope in torch.cat([g.reshape(-1) for g in gradient]):
        found = torch.autograd.grad(slope, list(values.values()), retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows)


def _loss(one: Problem, z: Any) -> Tensor:
    if isinstance(one.loss, nn.GaussianNLLLoss):
        return one.loss(z[0], one.y, z[1])
    return one.loss(z, one.y)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fisher_of_every_model(model: str, reduction: str) -> None:
    one = problem(model, "ce", reduction)
    torch.testing.assert_close(
        dense(fisher_of(one), one.model), oracle.fisher(one.model, one.loss, one.x, one.y)
    )


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "ce soft"])
def test_fisher_of_every_loss(loss: str) -> None:
    one = problem("tokens", loss)
    torch.testing.assert_close(
        dense(fisher_of(one), one.model), oracle.fisher(one.model, one.loss, one.x, one.y, lambda z: z)
    )


@pytest.mark.parametrize("kind", ["mc", "empirical", "rademacher"])
@pytest.mark.parametrize("model", ["linear", "tokens", "spatial"])
def test_signals_of_other_kinds(model: str, kind: str) -> None:
    one = problem(model, "mse")
    with torch.no_grad():
        z = one.model(one.x)
    source = torch.Generator().manual_seed(1)
    signals = list(likelihood_from(one.loss).signals(z, one.y, kind, source, len(one.x)))
    batch = Batch((one.x,), {}, one.y, len(one.x))
    of = of_signals([(s,) for s in signals], len(one.x))
    replay = Replay.gauss_newton(Snapshot.of(one.model), names(one.model), batch, find, of)
    scores = oracle.scores(one.model, one.x, signals[0])
    torch.testing.assert_close(dense(replay, one.model), scores.T @ scores)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", ["linear", "tokens", "layer norm"])
def test_gauss_newton_and_hessian_of_every_loss(model: str, loss: str) -> None:
    one = problem(model, loss)
    likelihood, batch = likelihood_from(one.loss), Batch((one.x,), {}, one.y, len(one.x))
    H = loss_hessian(one)
    snapshot = Snapshot.of(one.model)
    replay = Replay.hessian(snapshot, names(one.model), batch, find, likelihood)
    torch.testing.assert_close(dense(replay, one.model), H, rtol=1e-7, atol=1e-9)
    # The generalised Gauss–Newton matrix: J from torch.func, and the loss's Hessian in z.
    with torch.no_grad():
        z = find(one.model(one.x))
    flat = torch.cat([part.reshape(-1) for part in z])

    def from_flat(v: Tensor) -> Tensor:
        parts = v.split([part.numel() for part in z])
        return _loss(one, bare(tuple(p.reshape(part.shape) for p, part in zip(parts, z))))

    J = oracle.jacobian(one.model, one.x)
    expected = J.T @ hessian(from_flat)(flat) @ J
    replay = Replay.gauss_newton(snapshot, names(one.model), batch, find, of_loss(likelihood, one.y))
    torch.testing.assert_close(dense(replay, one.model), expected, rtol=1e-7, atol=1e-9)
    if loss in ("ce", "ce weighted", "mse", "bce", "poisson") and model == "linear":  # a natural parameter
        torch.testing.assert_close(dense(fisher_of(one), one.model), expected, rtol=1e-7, atol=1e-9)


def test_weights_multiply_examples() -> None:
    one = problem("spatial", "ce")
    weights = torch.tensor([0.0, 1.0, 2.5, 0.3, 1.0], dtype=DTYPE)
    likelihood, batch, snapshot = (
        likelihood_from(one.loss),
        Batch((one.x,), {}, one.y, 5),
        Snapshot.of(one.model),
    )
    where = names(one.model)

    def parts(make: Any) -> Tensor:
        return sum(
            w * dense(make(Batch((x[None],), {}, y[None], 1)), one.model) / 5
            for w, x, y in zip(weights, one.x, one.y)
        )

    expected = parts(
        lambda b: Replay.gauss_newton(snapshot, where, b, find, of_likelihood(likelihood, b.targets))
    )
    torch.testing.assert_close(dense(fisher_of(one, weights=weights), one.model), expected)
    ggn = Replay.gauss_newton(snapshot, where, batch, find, of_loss(likelihood, one.y, weights))
    torch.testing.assert_close(dense(ggn, one.model), expected)
    expected = parts(lambda b: Replay.hessian(snapshot, where, b, find, likelihood))
    found = Replay.hessian(snapshot, where, batch, find, likelihood, weights)
    torch.testing.assert_close(dense(found, one.model), expected)


def test_it_is_a_value_and_disturbs_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    one = Problem(model, nn.CrossEntropyLoss(), torch.randn(6, 3, dtype=DTYPE), torch.randint(3, (6,)), "")
    state = torch.get_rng_state()
    replay = fisher_of(one, rng_state=state)
    batch = Batch((one.x,), {}, one.y, 6)
    curved = Replay.hessian(
        Snapshot.of(model), names(model), batch, find, likelihood_from(one.loss), rng_state=state
    )
    before = dense(replay, model), dense(curved, model)
    torch.testing.assert_close(before[0], before[0].T)
    torch.testing.assert_close(before[1], before[1].T)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    model.eval()
    torch.randn(3)
    after = dense(replay, model), dense(curved, model)
    assert not model.training
    assert not model[2].training
    for a, b in zip(before, after):
        assert torch.equal(a, b)
    for name, b in model.named_buffers():
        assert torch.equal(b, buffers[name])
    assert all(p.grad is None for p in model.parameters())


def test_some_parameters_and_unused_ones() -> None:
    one = problem("linear", "ce")
    one.model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=DTYPE)))
    F = oracle.fisher(one.model, one.loss, one.x, one.y)
    chosen = ["2.weight", "unused", "0.bias"]
    batch = Batch((one.x,), {}, one.y, 5)
    likelihood, snapshot = likelihood_from(one.loss), Snapshot.of(one.model)
    place = oracle.positions(one.model, chosen)
    v = {name: torch.randn(2, *one.model.get_parameter(name).shape, dtype=DTYPE) for name in chosen}
    flat = torch.cat([v[name].flatten(1) for name in chosen], 1)
    for replay, matrix in (
        (Replay.gauss_newton(snapshot, chosen, batch, find, of_likelihood(likelihood, one.y)), F),
        (Replay.hessian(snapshot, chosen, batch, find, likelihood), None),
    ):
        found = replay.product(v)
        assert list(found) == chosen
        assert not found["unused"].any()
        if matrix is not None:
            result = torch.cat([found[name].flatten(1) for name in chosen], 1)
            torch.testing.assert_close(result, flat @ matrix[place[:, None], place])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Branching(nn.Module):
    """Looks at a value, which no batched transform allows."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.head(x.mean(1))
        return z.tanh() if float(z.detach().sum()) > 1e9 else z.sin()


@pytest.mark.parametrize("build", [Attention, Recurrent, Branching])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_models_that_are_hard_to_differentiate(build: type, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x, y = build().to(dtype), torch.randn(3, 2, 4, dtype=dtype), torch.randint(3, (3,))
    loss = nn.CrossEntropyLoss()
    replay = fisher_of(Problem(model, loss, x, y, ""))
    wide = build().double()
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})

    def z(values: Mapping[str, Tensor]) -> Tensor:
        return functional_call(wide, dict(values), (x.double(),)).reshape(-1)

    values = oracle.trainable(wide)
    rows = []  # a row of J at a time, by reverse mode alone
    with sdpa_kernel(SDPBackend.MATH):
        outputs = z({name: v.requires_grad_() for name, v in values.items()})
        for one in outputs:
            grads = torch.autograd.grad(one, list(values.values()), retain_graph=True)
            rows.append(torch.cat([g.reshape(-1) for g in grads]))
    J = torch.stack(rows)
    F = J.T @ oracle.output_information(loss, outputs.detach().reshape(3, 3), y) @ J
    v = {name: torch.randn(2, *p.shape, dtype=dtype) for name, p in model.named_parameters()}
    found = replay.product(v)
    flat = torch.cat([v[name].flatten(1) for name in values], 1).double()
    result = torch.cat([found[name].flatten(1) for name in values], 1).double()
    torch.testing.assert_close(result, flat @ F, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-6)


class Doubled(torch.autograd.Function):
    """No forward-mode derivative, and no batched form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class DoubledOnce(Doubled):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class Opaque(nn.Module):
    def __init__(self, function: type) -> None:
        super().__init__()
        self.head, self.function = nn.Linear(3, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(self.head(x))


def test_functions_of_a_users_own() -> None:
    x, y = torch.randn(2, 3, dtype=DTYPE), torch.zeros(2).long()
    one = Problem(Opaque(Doubled).double(), nn.CrossEntropyLoss(), x, y, "")
    J = 2 * torch.cat(
        [torch.eye(3, dtype=DTYPE).kron(row) for row in torch.cat([x, torch.ones(2, 1)], 1)[:, None]]
    )
    order = [o * 4 + i for o in range(3) for i in range(3)] + [3, 7, 11]  # weight by rows, then bias
    with torch.no_grad():
        H = oracle.output_information(one.loss, one.model(x), y)
    torch.testing.assert_close(dense(fisher_of(one), one.model), (J.T @ H @ J)[order][:, order])


def test_an_operation_without_derivatives_is_refused() -> None:
    x, y = torch.randn(2, 3, dtype=DTYPE), torch.zeros(2).long()
    one = Problem(Opaque(DoubledOnce).double(), nn.CrossEntropyLoss(), x, y, "")
    with pytest.raises(OutputError, match="forward-mode"):
        dense(fisher_of(one), one.model)


def test_portions_and_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    one = problem("linear", "ce", "sum")
    F = oracle.fisher(one.model, one.loss, one.x, one.y)
    monkeypatch.setattr(module, "AT_ONCE", 3)
    replay = fisher_of(one)
    torch.testing.assert_close(dense(replay, one.model), F)
    both = Replay(total_product([replay, replay], [0.5, 2.0]))
    torch.testing.assert_close(dense(both, one.model), 2.5 * F)
    none = {name: p.new_zeros(0, *p.shape) for name, p in one.model.named_parameters()}
    assert {name: tuple(t.shape) for name, t in replay.product(none).items()} == {
        name: tuple(t.shape) for name, t in none.items()
    }
