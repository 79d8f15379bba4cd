"""Differential operators against nested torch.func, their gradients by parameters, and known solutions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from natgrad import pde
from natgrad.errors import ConfigError, EmptyError, OutputError
from oracle import taylor as oracle

DTYPE = torch.float64
N = 5


def mlp(inputs: int, outputs: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 7), activation(), nn.Linear(7, 6), activation(), nn.Linear(6, outputs)
    ).to(DTYPE)


class Residual(nn.Module):
    """A connection past a layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(inputs, 6), nn.Linear(6, 6), nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        assert x.dtype == DTYPE
        h = torch.tanh(self.first(x))
        h = h + torch.sin(self.inner(h))
        return self.last(h)


class Fourier(nn.Module):
    """Frequencies that are not trained, and a network on them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(inputs, 4))
        self.net = mlp(8 + inputs, outputs, nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        phase = 2 * math.pi * x @ self.frequencies
        return self.net(torch.cat([torch.sin(phase), torch.cos(phase), x], dim=-1))


class Hard(nn.Module):
    """Zero on the boundary of the unit cube, whatever the network."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.net = mlp(inputs, outputs, nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        return torch.prod(x * (1 - x), dim=1, keepdim=True) * self.net(x)


class Separable(nn.Module):
    """Products of a network for each coordinate, and a scale."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp(1, 3) for _ in range(inputs))
        self.last, self.scale = nn.Linear(3, outputs), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.nets[0](x[:, :1])
        for k, net in enumerate(self.nets[1:], 1):
            h = h * net(x[:, k, None])
        return self.scale * self.last(h)


class Norm(nn.LayerNorm):
    """torch's third derivatives of layer_norm are wrong (2.13: finite differences say so), and so it is spelt out."""

    spelt_out = False

    def forward(self, z: Tensor) -> Tensor:
        if not self.spelt_out:
            return super().forward(z)
        centred = z - z.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + self.eps) * self.weight + self.bias


class Normed(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(inputs, 6), Norm(6), nn.Softplus(), nn.Linear(6, 6), nn.ELU(inplace=True)
        )
        self.last = nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.net(x))


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "mlp": mlp,
    "residual": Residual,
    "fourier": Fourier,
    "hard": Hard,
    "separable": Separable,
    "normed": Normed,
}
RESIDUALS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "laplacian": pde.laplacian,
    "gradient": lambda m, x: pde.gradient(m, x).flatten(1),
    "poisson": lambda m, x: pde.laplacian(m, x) + torch.sin(x[:, :1]),
    "divergence": pde.divergence,
    "heat": lambda m, x: pde.heat(m, x, 0.3),
    "heat-first": lambda m, x: pde.heat(m, x, torch.tensor(0.3, dtype=DTYPE), time=0),
    "heat-varying": lambda m, x: pde.heat(m, x, x[:, :1] ** 2),
    "wave": lambda m, x: pde.wave(m, x, 2.0),
    "wave-middle": lambda m, x: pde.wave(m, x, 2.0, time=1),
    "helmholtz": lambda m, x: pde.helmholtz(m, x, 3.0),
    "advection": lambda m, x: pde.advection(m, x, torch.tensor([0.5, -2.0], dtype=DTYPE)),
    "advection-varying": lambda m, x: pde.advection(m, x, x[:, 1:], time=0),
}


def expected(name: str, model: Any, x: Tensor) -> Tensor:
    first, pure = oracle.gradient(model, x), oracle.second(model, x).diagonal(dim1=1, dim2=2).transpose(1, 2)
    velocity = torch.tensor([0.5, -2.0], dtype=DTYPE)
    match name:
        case "gradient":
            return first.flatten(1)
        case "poisson":
            return pure.sum(1) + torch.sin(x[:, :1])
        case "divergence":
            return first[:, 0, :1] + first[:, 1, 1:2] + first[:, 2, 2:]
        case "heat":
            return first[:, 2] - 0.3 * (pure[:, 0] + pure[:, 1])
        case "heat-first":
            return first[:, 0] - 0.3 * (pure[:, 1] + pure[:, 2])
        case "heat-varying":
            return first[:, 2] - x[:, :1] ** 2 * (pure[:, 0] + pure[:, 1])
        case "wave":
            return pure[:, 2] - 4 * (pure[:, 0] + pure[:, 1])
        case "wave-middle":
            return pure[:, 1] - 4 * (pure[:, 0] + pure[:, 2])
        case "helmholtz":
            return pure.sum(1) + 9 * model(x)
        case "advection":
            return first[:, 2] + velocity[0] * first[:, 0] + velocity[1] * first[:, 1]
        case "advection-varying":
            return first[:, 0] + x[:, 1:2] * first[:, 1] + x[:, 2:] * first[:, 2]
    return pure.sum(1)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", RESIDUALS)
def test_operators_and_their_gradients_by_parameters_and_points(name: str, model: str) -> None:
    net, x = MODELS[model](3, 3).to(DTYPE), torch.rand(N, 3, dtype=DTYPE).requires_grad_()
    found = RESIDUALS[name](net, x)
    for module in net.modules():
        module.spelt_out = True
    right = expected(name, net, x)
    torch.testing.assert_close(found, right)
    weights, wanted = torch.randn_like(right), [*net.parameters(), x]
    ours = torch.autograd.grad(found, wanted, weights, materialize_grads=True)
    theirs = torch.autograd.grad(right, wanted, weights, materialize_grads=True)
    torch.testing.assert_close(ours, theirs)


def test_burgers() -> None:
    net, x = mlp(2, 1), torch.rand(N, 2, dtype=DTYPE)
    first, second = oracle.gradient(net, x), oracle.second(net, x)
    expected = first[:, 1] + net(x) * first[:, 0] - 0.01 * second[:, 0, 0]
    torch.testing.assert_close(pde.burgers(net, x, 0.01), expected)
    expected = first[:, 0] + net(x) * first[:, 1] - 0.01 * second[:, 1, 1]
    torch.testing.assert_close(pde.burgers(net, x, 0.01, time=0), expected)


def test_known_solutions() -> None:
    x = torch.rand(N, 2, dtype=DTYPE)
    zero = torch.zeros(N, 1, dtype=DTYPE)
    torch.testing.assert_close(
        pde.heat(lambda p: torch.exp(-0.4 * p[:, 1:]) * torch.sin(2 * p[:, :1]), x, 0.1), zero
    )
    torch.testing.assert_close(pde.wave(lambda p: torch.sin(p[:, :1] - 3 * p[:, 1:]), x, 3.0), zero)
    torch.testing.assert_close(
        pde.helmholtz(lambda p: torch.sin(3 * p[:, :1]) * torch.cos(4 * p[:, 1:]), x, 5.0), zero
    )
    torch.testing.assert_close(pde.burgers(lambda p: p[:, :1] / (1 + p[:, 1:]), x, 0.5), zero)
    velocity = torch.tensor([2.0], dtype=DTYPE)
    torch.testing.assert_close(pde.advection(lambda p: (p[:, :1] - 2 * p[:, 1:]) ** 3, x, velocity), zero)
    torch.testing.assert_close(pde.divergence(lambda p: torch.stack([-p[:, 1], p[:, 0]], 1), x), zero)


def test_values_and_gradients_come_together() -> None:
    net, x = mlp(3, 2), torch.randn(N, 3, dtype=DTYPE)
    value, slopes = pde.value_and_gradient(net, x)
    torch.testing.assert_close(value, net(x))
    torch.testing.assert_close(slopes, oracle.gradient(net, x))
    torch.testing.assert_close(pde.gradient(net, x), slopes)


def test_a_mixed_derivative_is_a_difference_of_two_pure_ones() -> None:
    net, x = mlp(2, 2), torch.randn(N, 2, dtype=DTYPE)
    diagonals = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=DTYPE)
    found = pde.derivatives(net, x, directions=diagonals, second=[[0.25, -0.25]])
    torch.testing.assert_close(found.second[:, 0], oracle.second(net, x)[:, 0, 1])
    torch.testing.assert_close(
        found.gradient, torch.einsum("kd,ndc->nkc", diagonals, oracle.gradient(net, x))
    )


def test_derivatives_by_parameters_of_derivatives_by_parameters() -> None:
    """What a line search by curvature, or a second-order method on top, needs."""
    net, x = mlp(2, 1), torch.randn(3, 2, dtype=DTYPE)
    names = [name for name, _ in net.named_parameters()]

    def loss(operator: Callable[..., Tensor], *values: Tensor) -> Tensor:
        model = lambda p: functional_call(net, dict(zip(names, values)), (p,))  # noqa: E731
        return operator(model, x).square().sum()

    values = [p.detach().requires_grad_() for p in net.parameters()]
    direction = [torch.randn_like(v) for v in values]
    products = []
    for operator in (pde.laplacian, oracle.mapped_laplacian):
        slopes = torch.autograd.grad(
            loss(operator, *values), values, create_graph=True, materialize_grads=True
        )
        along = sum((g * d).sum() for g, d in zip(slopes, direction))
        products.append(torch.autograd.grad(along, values, materialize_grads=True))
    torch.testing.assert_close(products[0], products[1])


@pytest.mark.parametrize(
    "second", ["laplacian", "diagonal", [[1.0, 0.0, 0.0]], [[1.0, 2.0, 0.0], [0.5, 0.0, 1.0]]]
)
def test_batched_backward_passes(second: Any) -> None:
    """As per-example gradients take them."""
    net, x = mlp(3, 1), torch.randn(N, 3, dtype=DTYPE)
    found = pde.derivatives(net, x, second=second).second
    count = found.numel()
    signals = torch.eye(count, dtype=DTYPE).reshape(count, *found.shape)
    values = list(net.parameters())[:-1]  # but the last bias
    batched = torch.autograd.grad(found, values, signals, retain_graph=True, is_grads_batched=True)
    for k, signal in enumerate(signals):
        one = torch.autograd.grad(found, values, signal, retain_graph=True)
        torch.testing.assert_close([b[k] for b in batched], list(one))


def test_under_transforms_over_parameters() -> None:
    net, x = mlp(2, 1), torch.randn(N, 2, dtype=DTYPE)
    values = {name: p.detach() for name, p in net.named_parameters()}
    ensemble = {name: torch.stack([v, 2 * v, v + 0.1]) for name, v in values.items()}

    def residual(given: dict[str, Tensor]) -> Tensor:
        return pde.laplacian(lambda p: functional_call(net, given, (p,)), x)

    found = vmap(residual)(ensemble)
    for k in range(3):
        torch.testing.assert_close(found[k], residual({name: v[k] for name, v in ensemble.items()}))
    rows = torch.func.jacrev(residual)(values)
    flat = torch.cat([rows[name].reshape(N, -1) for name in values], 1)
    torch.testing.assert_close(flat, oracle.residual_jacobian(net, oracle.mapped_laplacian, x))


def test_forward_mode_over_parameters() -> None:
    from natgrad.tape.jacobian import _load_forward_mode

    _load_forward_mode()
    net, x = mlp(2, 1), torch.randn(N, 2, dtype=DTYPE)
    values = {name: p.detach() for name, p in net.named_parameters()}
    tangents = {name: torch.randn_like(v) for name, v in values.items()}
    _, image = torch.func.jvp(
        lambda given: pde.laplacian(lambda p: functional_call(net, given, (p,)), x), (values,), (tangents,)
    )
    rows = oracle.residual_jacobian(net, oracle.mapped_laplacian, x)
    flat = torch.cat([t.flatten() for t in tangents.values()])
    torch.testing.assert_close(image[:, 0], rows @ flat)


def test_without_gradients_in_float32_and_on_one_point() -> None:
    net, x = mlp(3, 1), torch.randn(1, 3, dtype=DTYPE)
    with torch.no_grad():
        found = pde.laplacian(net, x)
    assert not found.requires_grad
    torch.testing.assert_close(found, oracle.laplacian(net, x))
    single = pde.laplacian(net.float(), x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, rtol=1e-4, atol=1e-5)


def test_the_model_and_the_points_are_left_as_they_were() -> None:
    net, x = nn.Sequential(nn.Linear(2, 4), nn.ReLU(inplace=True), nn.Linear(4, 1)), torch.randn(N, 2)
    before, points = {k: v.clone() for k, v in net.state_dict().items()}, x.clone()

    def model(p: Tensor) -> Tensor:
        p *= 2
        return net(p)

    pde.laplacian(model, x).sum().backward()
    assert torch.equal(x, points)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), ConfigError, "floating dtype"),
        (torch.zeros(3), ConfigError, r"\[N, d\]"),
        (torch.zeros(3, 0), ConfigError, r"\[N, d\]"),
        (torch.zeros(0, 2), EmptyError, "no points"),
    ],
)
@pytest.mark.parametrize("operator", [pde.laplacian, pde.gradient, pde.heat, pde.divergence])
def test_points_that_are_none(operator: Any, x: Tensor, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        operator(nn.Linear(2, 2), x)


def test_arguments_out_of_range() -> None:
    net, x = nn.Linear(2, 1), torch.rand(N, 2)
    for wrong in ("hessian", [[1.0]], [], [1.0, 1.0], [[float("nan"), 1.0]], torch.ones(2)):
        with pytest.raises(ConfigError, match="second"):
            pde.derivatives(net, x, second=wrong)
    for directions in (torch.ones(2), torch.ones(1, 3), torch.ones(0, 2)):
        with pytest.raises(ConfigError, match="directions"):
            pde.derivatives(net, x, directions=directions)
    with pytest.raises(ConfigError, match="time=2"):
        pde.heat(net, x, time=2)
    with pytest.raises(ConfigError, match="at least two"):
        pde.wave(nn.Linear(1, 1), x[:, :1])
    with pytest.raises(ConfigError, match="as many outputs"):
        pde.divergence(net, x)
    with pytest.raises(ConfigError, match="velocity"):
        pde.advection(net, x, torch.ones(2))
    with pytest.raises(ConfigError, match="one function"):
        pde.burgers(nn.Linear(2, 2), x, 0.1)
    with pytest.raises(ConfigError, match="one dimension of space"):
        pde.burgers(nn.Linear(3, 1), torch.rand(N, 3), 0.1)
    with pytest.raises(ConfigError, match=r"diffusivity .* \[5\] for 5 points"):
        pde.heat(net, x, torch.ones(N))


def test_models_that_are_no_functions_of_points() -> None:
    x = torch.rand(N, 2)
    with pytest.raises(OutputError, match="does not depend"):
        pde.laplacian(lambda p: torch.ones(N, 1), x)
    with pytest.raises(OutputError, match=r"\[N, C\].*\[5\]"):
        pde.laplacian(lambda p: p[:, 0], x)
    with pytest.raises(OutputError, match="tuple"):
        pde.laplacian(lambda p: (p, p), x)
    with pytest.raises(OutputError, match="3 rows for 5 points"):
        pde.laplacian(lambda p: p[:3], x)
