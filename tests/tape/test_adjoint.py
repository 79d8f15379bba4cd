"""J v by two reverse passes, where an operation has no forward mode: what forward mode gives without that operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import natgrad
from natgrad import OutputError
from natgrad.tape import Batch, jacobian_products


class Cube(torch.autograd.Function):
    """x³, as users write their own functions: no forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


class CubeOnce(Cube):
    """The same, of which no second derivative is known."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Net(nn.Module):
    """A normalisation with running averages, dropout, attention, a parameter that takes no part, and a cube."""

    def __init__(self, cube: Any) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.unused, self.cube = nn.Parameter(torch.ones(2)), cube

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.dropout(self.norm(self.first(x)), 0.3, self.training)
        h = h.view(-1, 1, 2, 4)
        h = nn.functional.scaled_dot_product_attention(h, h, h).flatten(1)
        return self.last(self.cube(h))


def twins(dtype: torch.dtype, *cubes: Any) -> list[Net]:
    nets = []
    for cube in cubes:
        torch.manual_seed(0)
        nets.append(Net(cube).to(dtype))
    return nets


def plain(x: Tensor) -> Tensor:
    return x**3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_are_those_of_forward_mode(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    own, usual = twins(dtype, Cube.apply, plain)
    batch = Batch((torch.randn(6, 4, dtype=dtype),), {}, None, 6)
    v = {name: torch.randn_like(p) for name, p in own.named_parameters()}
    tangents = [v, {"last.weight": v["last.weight"]}, {"unused": v["unused"]}]
    buffers = {name: b.clone() for name, b in own.named_buffers()}
    state = torch.get_rng_state()
    (z, images), (expected, others) = (
        jacobian_products(m, dict(m.named_parameters()), batch, tangents, lambda z: (z,))
        for m in (own, usual)
    )
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(images, others, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-5)
    assert images[0][0].any()
    assert not images[2][0].any()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[name]) for name, b in own.named_buffers())
    assert all(p.grad is None for p in own.parameters())


@pytest.mark.parametrize("metric", ["kfac", "tempered"])
def test_adaptive_steps_are_those_of_forward_mode(metric: str) -> None:
    ends = []
    for model in twins(torch.float64, Cube.apply, plain):
        loss_fn = nn.CrossEntropyLoss()
        optimizer = natgrad.NaturalGradient(model, loss_fn, metric=metric)
        torch.manual_seed(2)
        for _ in range(4):
            x, y = torch.randn(20, 4, dtype=torch.float64), torch.randint(3, (20,))
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
            assert optimizer.info.alpha > 0
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    torch.testing.assert_close(*ends)


def test_what_can_be_differentiated_once_only_is_said_before_anything_moves() -> None:
    (model,) = twins(torch.float64, CubeOnce.apply)
    loss_fn = nn.CrossEntropyLoss()
    optimizer = natgrad.NaturalGradient(model, loss_fn)
    before = [p.detach().clone() for p in model.parameters()]
    loss_fn(model(torch.randn(6, 4, dtype=torch.float64)), torch.randint(3, (6,))).backward()
    with pytest.raises(OutputError, match=r"forward-mode.*second.*lr="):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
