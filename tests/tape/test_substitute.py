"""A model that holds one module, or one weight, under two names is evaluated elsewhere and stays what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad.tape.substitute import call_with


def shared_linear() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))


def shared_norm() -> nn.Module:
    norm = nn.BatchNorm1d(4)
    return nn.Sequential(nn.Linear(4, 4), norm, nn.Tanh(), norm, nn.Linear(4, 3))


def tied() -> nn.Module:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(4, 3))


@pytest.fixture(params=[shared_linear, shared_norm, tied])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return request.param().double()


def tensors(model: nn.Module) -> list[tuple[str, str, int]]:
    """Which object stands where."""
    return [
        (prefix, key, id(own))
        for prefix, module in model.named_modules(remove_duplicate=False)
        for key, own in (*module._parameters.items(), *module._buffers.items())
    ]


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,))


def test_the_value_is_that_of_a_model_with_these_parameters(model: nn.Module) -> None:
    (x, _), model = data(), model.eval()
    before, reference = tensors(model), copy.deepcopy(model)
    values = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.copy_(values[name])
    torch.testing.assert_close(call_with(model, values, (x,), {}), reference(x), rtol=0, atol=0)
    assert tensors(model) == before


USES: dict[str, Callable[[nn.Module, nn.Module, Tensor, Tensor], object]] = {
    metric: lambda m, l, x, y, metric=metric: natgrad.fisher(m, l, (x, y), metric=metric).trace()
    for metric in ("kfac", "diagonal", "dense", "gram", "lowrank", "matrixfree")
} | {
    "hessian": lambda m, l, x, y: natgrad.hessian(m, l, (x, y)).to_dense(),
    "replayed": lambda m, l, x, y: natgrad.fisher(
        m, l, (x, y), metric=natgrad.MatrixFree(memory=0)
    ).to_dense(),
}


@pytest.mark.filterwarnings("ignore::natgrad.CoverageWarning")
@pytest.mark.parametrize("use", USES)
def test_curvature_leaves_the_model_as_it_was(model: nn.Module, use: str) -> None:
    x, y = data()
    before, values = tensors(model), copy.deepcopy(model.state_dict())
    USES[use](model, nn.CrossEntropyLoss(), x, y)
    assert tensors(model) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])


@pytest.mark.filterwarnings("ignore::natgrad.CoverageWarning")
def test_the_adaptive_optimiser_trains_it(model: nn.Module) -> None:
    (x, y), loss = data(), nn.CrossEntropyLoss()
    before, optimizer = tensors(model), natgrad.NaturalGradient(model, loss)
    first = loss(model(x), y).item()
    for _ in range(10):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    assert tensors(model) == before
    assert loss(model(x), y).item() < first
