"""Every rule carries first and second derivatives as nested torch.func finds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from natgrad import pde
from oracle import taylor as oracle

DTYPE = torch.float64
N, D, H = 4, 3, 6

Function = Callable[[Any], Any]


def features(width: int = H, seed: int = 0) -> nn.Module:
    """Something smooth, in which no derivative is zero."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, width), nn.Tanh(), nn.Linear(width, width)).to(DTYPE)


def agree(model: Function, x: Tensor) -> None:
    """Values, gradients, and second derivatives in every form, with the oracle's."""
    second = oracle.second(model, x)
    pure = second.diagonal(dim1=1, dim2=2).transpose(1, 2)
    weights = torch.tensor([[0.0, 2.0, -0.5], [0.0, 1.0, 0.0]], dtype=DTYPE)
    for asked, expected in (
        (None, None),
        ("laplacian", pure.sum(1, keepdim=True)),
        ("diagonal", pure),
        ([[1.0, 1.0, 0.0]], pure[:, :2].sum(1, keepdim=True)),
        ([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], pure[:, 1:]),
        (weights, torch.einsum("lk,nkc->nlc", weights, pure)),
    ):
        found = pde.derivatives(model, x, second=asked)
        torch.testing.assert_close(found.value, model(x))
        torch.testing.assert_close(found.gradient, oracle.gradient(model, x))
        if expected is None:
            assert found.second is None
        else:
            torch.testing.assert_close(found.second, expected)


def composed(function: Function, positive: bool = False) -> Function:
    inner = features()
    if positive:
        return lambda x: function(0.5 + inner(x) ** 2)
    return lambda x: function(inner(x))


ELEMENTWISE: dict[str, Function] = {
    "tanh": torch.tanh,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "atan": torch.atan,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "reciprocal": torch.reciprocal,
    "square": torch.square,
    "abs": torch.abs,
    "abs-built-in": abs,
    "erf": torch.erf,
    "special.erf": torch.special.erf,
    "sigmoid": torch.sigmoid,
    "special.expit": torch.special.expit,
    "logsigmoid": F.logsigmoid,
    "softplus": lambda z: F.softplus(z, beta=1.5),
    "silu": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "gelu-tanh": lambda z: F.gelu(z, approximate="tanh"),
    "elu": lambda z: F.elu(z, alpha=1.3),
    "celu": lambda z: F.celu(z, alpha=2.0),  # torch rounds 1 / alpha to float32 in its derivative
    "selu": F.selu,
    "relu": F.relu,
    "torch.relu": torch.relu,
    "relu6": F.relu6,
    "hardtanh": lambda z: F.hardtanh(z, -0.1, 0.2),
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
    "clamp": lambda z: z.clamp(-0.1, 0.2),
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "method": lambda z: z.sin().tanh(),
    "cube": lambda z: z**3,
    "pow-0": lambda z: z**0 + z,
    "pow-1": lambda z: z**1,
    "pow-tensor": lambda z: z ** torch.arange(1, H + 1).to(z),
    "exponential": lambda z: 2.5**z,
    "exponential-tensor": lambda z: torch.full((H,), 1.5, dtype=DTYPE) ** z,
}
POSITIVE: dict[str, Function] = {
    "log": torch.log,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "pow-half": lambda z: z**-1.5,
    "pow-jet": lambda z: z**z,
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "inplace-relu": lambda: nn.ReLU(inplace=True),
    "inplace-elu": lambda: nn.ELU(inplace=True),
    "inplace-silu": lambda: nn.SiLU(inplace=True),
    "inplace-mish": lambda: nn.Mish(inplace=True),
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "prelu": lambda: nn.PReLU(H),
    "prelu-1": nn.PReLU,
    "layer-norm": lambda: nn.LayerNorm(H),
    "layer-norm-bare": lambda: nn.LayerNorm(H, elementwise_affine=False),
    "rms-norm": lambda: nn.RMSNorm(H),
    "batch-norm": lambda: nn.BatchNorm1d(H).eval(),
    "softmax": lambda: nn.Softmax(dim=1),
    "log-softmax": lambda: nn.LogSoftmax(dim=-1),
    "dropout": lambda: nn.Dropout(0.5).eval(),
    "identity": nn.Identity,
    "flatten": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Flatten()),
    "conv1d": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Flatten()),
    "conv2d": lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.Tanh(), nn.Flatten()),
}

A = torch.linspace(-1, 1, H * H, dtype=DTYPE).reshape(H, H)
EACH = torch.linspace(1, 2, N * H, dtype=DTYPE).reshape(N, H)


def chain(z: Tensor) -> Tensor:
    z = z + 1
    z *= 2
    z += z
    z -= 0.5
    z /= 3
    return z.sin_()


SHAPES: dict[str, Function] = {
    "linear-of-positions": lambda z: F.linear(z.unflatten(1, (2, 3)), A[:3, :3], A[0, :3]).tanh().flatten(1),
    "matmul": lambda z: z @ A,
    "matmul-vector": lambda z: (z @ A[0]).unsqueeze(1),
    "matmul-left": lambda z: (A[:4, :3] @ z.unflatten(1, (3, 2))).flatten(1),
    "mm": lambda z: torch.mm(z, A),
    "addmm": lambda z: torch.addmm(A[0], z, A, beta=0.5, alpha=2),
    "addmm-jet": lambda z: torch.addmm(z, z, A),
    "bmm-jets": lambda z: torch.bmm(z.unflatten(1, (2, 3)), z.unflatten(1, (3, 2))).flatten(1),
    "attention": lambda z: (
        torch.softmax(z.unflatten(1, (3, 2)) @ z.unflatten(1, (3, 2)).mT, -1) @ z.unflatten(1, (3, 2))
    ).flatten(1),
    "einsum": lambda z: torch.einsum("nd,hd->nh", z, A),
    "einsum-jets": lambda z: torch.einsum("na,nb->nab", z, z.sin()).flatten(1),
    "addcmul": lambda z: torch.addcmul(z, z, z, value=0.5),
    "arithmetic": lambda z: (2 - z) / (3 + z) - z * (1 - z) / 2 + -z - (z - 1) * A[0] + A[1] / (2 + z**2),
    "alpha": lambda z: torch.add(z, z.sin(), alpha=2) + torch.sub(A[0], z, alpha=3),
    "in-place": chain,
    "broadcast-in": lambda z: z[:, :1] * A[0] + z[:, :1] + A[1] + z[:, 1:2] * z + (z[:, :1] + z),
    "columns": lambda z: torch.stack([z[:, 0] * z[:, 1], z[..., 2], z[:, -1].sin()], dim=1),
    "stack-last": lambda z: torch.stack(z.unbind(1), dim=-1) + torch.stack([z, z * z], -1)[..., 1],
    "cat": lambda z: torch.cat([z.sin(), z, torch.ones_like(z)], dim=-1),
    "column-stack": lambda z: torch.column_stack([z[:, 0], z]) * torch.hstack([z, z[:, :1]]),
    "cat-flat": lambda z: torch.cat([z, z**2], 1),
    "index": lambda z: z[:, [2, 0]] + z[:, torch.tensor([1, 1])] + z[:, 1:5:2] + z[:, None, :2].squeeze(1),
    "mask": lambda z: z[:, torch.tensor([True, False, True, False, False, True])],
    "index-select": lambda z: (
        z.index_select(1, torch.tensor([0, 3])) + z.narrow(1, 2, 2) + z.select(1, 0)[:, None]
    ),
    "chunk": lambda z: torch.cat([part**2 for part in z.chunk(2, dim=-1)], 1),
    "split": lambda z: torch.cat([part**2 for part in z.split([1, 5], 1)] + [*torch.split(z, 4, dim=1)], 1),
    "sum": lambda z: z.sum(1, keepdim=True) + z.sum(dim=-1, keepdim=True) * z.sum(axis=1).unsqueeze(-1),
    "mean": lambda z: z.unflatten(1, (2, 3)).mean((1, 2)).reshape(-1, 1) + z.mean(-1, True),
    "prod": lambda z: torch.prod(z[:, :3], dim=1, keepdim=True) + z.prod(1)[:, None],
    "norm": lambda z: z.norm(dim=1, keepdim=True) + torch.linalg.vector_norm(z, dim=-1, keepdim=True),
    "views": lambda z: z.view(-1, 2, 3).transpose(1, 2).permute(0, 2, 1).mT.reshape(len(z), -1).flip(1),
    "view-as": lambda z: z.reshape_as(A.new_empty(len(z), H)).view_as(z).expand_as(z).type_as(A).contiguous(),
    "expand": lambda z: (z[:, :1].expand(-1, H) * z).repeat(1, 2).clone().to(DTYPE),
    "squeeze": lambda z: z.unsqueeze(1).squeeze(1).unsqueeze(-1).squeeze(-1).unsqueeze(2).squeeze((1, 2)),
    "where": lambda z: (
        torch.where(z > 0, z * z, z) + torch.where(z < 0, 0.0, z) + torch.where(z > 0, A[0], z)
    ),
    "maximum": lambda z: torch.maximum(z, z.sin() + 0.1) + torch.minimum(A[0], z),
    "likeness": lambda z: (
        z * torch.ones_like(z) + torch.zeros_like(z) + z.new_ones(H) + torch.sign(z) + z.detach()
    ),
    "facts": lambda z: z * z.shape[1] + z.size(-1) + z.dim() + len(z.shape) + (z.dtype == DTYPE) + z.ndim,
    "expand-plain": lambda z: z + A[0].expand_as(z) + A[0].to(z),
    "log-softmax": lambda z: torch.log_softmax(z, -1) + F.softmax(z, dim=1),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_functions(name: str) -> None:
    agree(composed(ELEMENTWISE[name]), torch.randn(N, D, dtype=DTYPE))


@pytest.mark.parametrize("name", POSITIVE)
def test_functions_of_positive_numbers(name: str) -> None:
    agree(composed(POSITIVE[name], positive=True), torch.randn(N, D, dtype=DTYPE))


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    module = MODULES[name]().to(DTYPE)
    agree(composed(module), torch.randn(N, D, dtype=DTYPE))


@pytest.mark.parametrize("name", SHAPES)
def test_arithmetic_and_shapes(name: str) -> None:
    agree(composed(SHAPES[name]), torch.randn(N, D, dtype=DTYPE))


@pytest.mark.parametrize("name", SHAPES)
def test_arithmetic_and_shapes_of_the_points_themselves(name: str) -> None:
    """Whose second derivatives are none: products and bends start them."""
    widen = torch.linspace(-1, 2, D * H, dtype=DTYPE).reshape(D, H)
    agree(lambda x: SHAPES[name](x @ widen), torch.randn(N, D, dtype=DTYPE))


def test_powers_at_zero() -> None:
    x = torch.zeros(2, D, dtype=DTYPE)
    agree(lambda z: z**2 + z**1 + z**3 + torch.square(z), x)


def test_constants_that_have_a_row_for_each_example() -> None:
    inner, x = features(), torch.randn(N, D, dtype=DTYPE)
    found = pde.laplacian(lambda z: inner(z) * EACH + EACH - z[:, :1] * EACH[:, 0:1], x)
    torch.testing.assert_close(found, oracle.laplacian(inner, x) * EACH)


def test_examples_may_be_left_out_or_reordered_inside() -> None:
    inner, x = features(), torch.randn(N, D, dtype=DTYPE)
    seen = []

    def model(z: Any) -> Any:
        u = inner(z)
        seen.append(
            (u[1:3] ** 2, u[torch.tensor([2, 0])] ** 2, u[torch.tensor([True, False, True, True])] ** 2)
        )
        return u

    pde.laplacian(model, x)
    expected = oracle.laplacian(lambda z: inner(z) ** 2, x)
    for jet, rows in zip(seen[0], ([1, 2], [2, 0], [0, 2, 3])):
        torch.testing.assert_close(jet.streams[:, -1], expected[rows])


def test_dropout_masks_a_value_and_its_derivatives_alike() -> None:
    inner, x = features(), torch.randn(N, D, dtype=DTYPE)
    found = pde.derivatives(lambda z: F.dropout(inner(z), 0.5, training=True), x, second="laplacian")
    kept = found.value != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(found.gradient, 2 * kept[:, None] * oracle.gradient(inner, x))
    torch.testing.assert_close(found.second[:, 0], 2 * kept * oracle.laplacian(inner, x))


@given(
    st.lists(st.sampled_from(sorted(ELEMENTWISE)), min_size=1, max_size=4),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_any_stack_of_layers(names: list[str], inputs: int, outputs: int, seed: int) -> None:
    skipped = {"tan", "reciprocal"}  # their poles
    torch.manual_seed(seed)
    maps = [nn.Linear(inputs, H)] + [nn.Linear(H, H) for _ in names[1:]] + [nn.Linear(H, outputs)]
    for one in maps:
        one.to(DTYPE)

    def model(x: Any) -> Any:
        z = x
        for name, one in zip(names, maps):
            z = one(z) if name in skipped else ELEMENTWISE[name](one(z))
        return maps[-1](z)

    x = torch.randn(3, inputs, dtype=DTYPE)
    torch.testing.assert_close(pde.laplacian(model, x), oracle.laplacian(model, x), rtol=1e-9, atol=1e-9)
