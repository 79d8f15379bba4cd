"""What derivatives can't be carried through is refused with its name, and nothing goes wrong silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natgrad import pde
from natgrad.errors import NatgradError, TaylorRuleError

N = 4
UNKNOWN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "cumsum": ("cumsum", lambda x: x.cumsum(1)),
    "sort": ("sort", lambda x: x.sort(1).values),
    "lgamma": ("lgamma", torch.lgamma),
    "function": ("scaled_dot_product_attention", lambda x: F.scaled_dot_product_attention(x, x, x)),
    "transpose-property": ("T", lambda x: x.T),
    "setitem": ("setting items", lambda x: x.__setitem__((slice(None), 0), 1.0)),
    "into-a-plain-tensor": (
        "setting items",
        lambda x: torch.zeros(N, 2).__setitem__((slice(None), 0), x[:, 0]),
    ),
    "in-place-on-a-plain-tensor": ("in-place", lambda x: torch.zeros(N, 2).add_(x)),
    "out": ("sin", lambda x: torch.sin(x, out=torch.empty(N, 2))),
    "autograd": ("grad", lambda x: torch.autograd.grad(x.sum(1), x)),
    "numpy": ("numpy", lambda x: x.numpy()),
    "rounded": ("div", lambda x: torch.div(x, 2, rounding_mode="floor")),
    "norm-1": ("norm", lambda x: x.norm(1, dim=1)),
    "clamp-by-tensors": ("clamp", lambda x: torch.clamp(x, torch.zeros(2), torch.ones(2))),
    "weight-of-inputs": ("linear", lambda x: F.linear(torch.ones(3, 2), x)),
    "index-of-inputs": ("indexing", lambda x: torch.arange(3)[x]),
    "batch-norm": ("batch_norm", nn.BatchNorm1d(2)),
    "einsum-dots": ("einsum", lambda x: torch.einsum("...d->...", x)),
}
MIXED: dict[str, Callable[[Any], Any]] = {
    "sum": lambda x: x.sum(),
    "sum-first": lambda x: x.sum(0, keepdim=True) + x,
    "mean": lambda x: x - x.mean(),
    "prod": lambda x: x.prod(),
    "softmax": lambda x: x.softmax(0),
    "gram": lambda x: x @ x.transpose(0, 1),
    "gram-without-transpose": lambda x: torch.einsum("nd,md->nm", x, x),
    "left": lambda x: torch.ones(N, N) @ x,
    "vector": lambda x: x[:, 0] @ torch.ones(N),
    "linear": lambda x: F.linear(x[:, 0], torch.ones(2, N)),
    "ranks": lambda x: x[:, 0] * torch.ones(N, N),
    "jets-of-other-rank": lambda x: x[:, 0] + x.repeat(1, 2),
    "product-of-other-rank": lambda x: x[:, 0] * x.repeat(1, 2),
    "reshape": lambda x: x.reshape(2, -1),
    "flatten": lambda x: x.flatten(),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "permute": lambda x: x.permute(1, 0),
    "stack": lambda x: torch.stack([x, x]),
    "cat": lambda x: torch.cat([x, x]),
    "expand": lambda x: x.expand(3, N, 2),
    "row": lambda x: x[0],
    "new-axis": lambda x: x[None],
    "entries": lambda x: x[torch.arange(N), torch.zeros(N, dtype=torch.long)],
    "chunk": lambda x: x.chunk(2)[0],
    "broadcast-where": lambda x: torch.where(torch.ones(3, N, 2) > 0, x, x),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_function_without_a_rule_is_named(name: str) -> None:
    function, model = UNKNOWN[name]
    with pytest.raises(TaylorRuleError, match=f"{function} .*torch.autograd.grad") as caught:
        pde.laplacian(model, torch.rand(N, 2))
    assert isinstance(caught.value, NotImplementedError)
    assert isinstance(caught.value, NatgradError)


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_examples_is_refused(name: str) -> None:
    with pytest.raises(TaylorRuleError):
        pde.laplacian(MIXED[name], torch.rand(N, 2))


def test_derivatives_of_derivatives_are_out_of_scope() -> None:
    from natgrad.errors import ConfigError

    with pytest.raises(ConfigError, match="derivatives of derivatives"):
        pde.laplacian(lambda x: pde.laplacian(nn.Linear(2, 1), x), torch.rand(N, 2))


def test_results_of_two_evaluations_do_not_meet() -> None:
    kept: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        kept.append(x)
        return x + kept[0]

    pde.laplacian(model, torch.rand(N, 2))
    with pytest.raises(TaylorRuleError, match="different evaluations"):
        pde.laplacian(model, torch.rand(N, 2))
