"""Σ_s signals ⊗ [inputs, 1] is the per-example gradient, for every way in which a covered parameter may act."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natgrad.tape import Tape
from natgrad.tape.passes import SignalPass, merged
from oracle import fisher as oracle

DTYPE = torch.float64


class Functional(nn.Module):
    """Calls functions, not modules."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
        self.kernel = nn.Parameter(torch.randn(2, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(x, weight=self.w, bias=self.b))
        return F.conv1d(hidden.unsqueeze(-1), self.kernel, stride=(1,)).squeeze(-1)


class Twice(nn.Module):
    """One module on two things, of different numbers of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        once = torch.tanh(self.shared(x))
        both = torch.stack([once, x], dim=1)
        return self.last(torch.tanh(self.shared(both)).sum(1) + once)


class Tied(nn.Module):
    """Two layers with one weight, of which the second has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sin(self.first(x)))


class Turned(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.T


class Parametrized(nn.Module):
    """A weight that is a view of the parameter that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        nn.utils.parametrize.register_parametrization(self.linear, "weight", Turned(), unsafe=True)

    def forward(self, x: Tensor) -> Tensor:
        with nn.utils.parametrize.cached():
            return self.linear(torch.tanh(self.linear(x)))


class InPlace(nn.Module):
    """What follows a layer overwrites its output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x).mul_(2), inplace=True)).add_(1)


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.first.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class OnFlattened(nn.Module):
    """Examples and positions in one dimension, for a linear map and for a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(4, 6), nn.Conv1d(2, 3, 2)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 4]
        rows = torch.tanh(self.linear(x.flatten(0, 1)))
        return self.conv(rows.view(-1, 2, 3)).view(len(x), -1)


class Detour(nn.Module):
    """A branch that no output depends on, and a layer that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.aside, self.never = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return self.used(x)


class Packed(nn.Module):
    """Slices of one weight and one bias, on different things."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.w, self.b, self.how = nn.Parameter(torch.randn(9, 3)), nn.Parameter(torch.randn(9)), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "chunk":
            parts = [F.linear(x + k, w, b) for k, (w, b) in enumerate(zip(self.w.chunk(3), self.b.chunk(3)))]
        elif self.how == "split":
            (w, *ws), (b, *bs) = self.w.split([2, 3, 4]), self.b.split([2, 3, 4])
            parts = [F.linear(x, w, b)[:, :1], F.linear(x, ws[0]), F.linear(x.sin(), ws[1], bs[1])]
        elif self.how == "slice":  # some rows belong to no call, and some to two
            parts = [F.linear(x, self.w[:5], self.b[:5]), x.sin() @ self.w[2:7].T + x[:, :1]]
        elif self.how == "one-row":
            parts = [F.linear(x, self.w[4:5], self.b[4:5]), x @ self.w[3:4].mT, x.cos() @ self.w.t()]
        else:
            parts = [x @ self.w.view(27).reshape(9, 3).transpose(0, 1)]
        return torch.tanh(torch.cat(parts, 1))


class InputSlices(nn.Module):
    """Columns of one weight, on different things: what is concatenated need not be."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.w, self.b, self.how = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(4)), how

    def forward(self, x: Tensor) -> Tensor:  # [N, 5]
        w, b = self.w, self.b
        if self.how == "linear":
            part = F.linear(x[:, :2], w[:, :2], b) + F.linear(x[:, 2:].sin(), w[:, 2:])
        elif self.how == "split":
            part = sum(F.linear(x.narrow(1, k, c.shape[1]), c) for k, c in zip((0, 2), w.split([2, 3], 1)))
        elif self.how == "block":  # of rows and of columns; some belong to no call
            part = F.linear(x[:, :3], w[1:3, 1:4], b[1:3]) + (x @ w.T)[:, :2]
        elif self.how == "one-column":
            part = F.linear(x[:, :1], w[:, 3:4]) + F.linear(x, w[2:3, :]) + x[:, 1:2] @ w[1:2, 4:].T
        elif self.how == "input-first":  # rows of a weight that has its input first
            part = x[:, :3] @ w[:3, 1:] + torch.mm(x[:, 3:4].cos(), w[3:])[:, :4]
        else:
            part = (w[:, 1:3] @ x[:, :2].mT).mT
        return torch.tanh(part)


class Contraction(nn.Module):
    """A parameter of some shape, and how it is contracted with the input."""

    def __init__(self, shape: tuple[int, ...], act: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.act = nn.Parameter(torch.randn(shape)), act

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.act(torch.sin(x), self.w))


class Experts(nn.Module):
    """Dense experts, each with its own two maps, of which all see all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 3]
        hidden = torch.tanh(torch.bmm(x.flatten(0, 1).expand(2, -1, -1), self.up))
        return torch.bmm(hidden, self.down.mT).sum(0).view(x.shape)


class Heads(nn.Module):
    """Attention with weights by head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(4, 2, 3)) for _ in range(3))
        self.out = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 4]
        q, k, v = (torch.einsum("btd,dhk->bhtk", x, w) for w in (self.q, self.k, self.v))
        return torch.einsum("bhtk,hkd->btd", F.scaled_dot_product_attention(q, k, v), self.out)


def einsum(equation: str, shape: tuple[int, ...], first: bool = False) -> Callable[[], nn.Module]:
    def act(x: Tensor, w: Tensor) -> Tensor:
        return torch.einsum(equation, *((w, x) if first else (x, w)))

    return lambda: Contraction(shape, act)


CONTRACTIONS = {
    "linear": (einsum("...i,oi->...o", (2, 3)), (4, 5, 3)),
    "matrix": (einsum("bsd, df -> bsf", (3, 2)), (4, 5, 3)),
    "implicit": (einsum("bi,ij", (3, 2)), (4, 3)),
    "weight-first": (einsum("oi,b...i->b...o", (2, 3), True), (4, 5, 3)),
    "features-in-the-middle": (einsum("bct,oc->bot", (2, 3)), (4, 3, 5)),
    "split-heads": (einsum("bsd,dhk->bshk", (3, 2, 4)), (4, 5, 3)),
    "heads-before-positions": (einsum("bsd,dhk->bhsk", (3, 2, 4)), (4, 5, 3)),
    "heads-swapped": (einsum("bsd,dhk->bskh", (3, 2, 4)), (4, 5, 3)),
    "outputs-first": (einsum("bsd,hkd->bshk", (2, 4, 3)), (4, 5, 3)),
    "merged-heads": (einsum("bshk,hkd->bsd", (2, 4, 3)), (4, 5, 2, 4)),
    "merged-square": (einsum("bshk,hkd->bsd", (2, 3, 3)), (4, 5, 2, 3)),
    "merged-outputs-first": (einsum("bshk,dhk->bsd", (3, 2, 4)), (4, 5, 2, 4)),
    "heads-first": (einsum("bsd,hdk->bshk", (2, 3, 4)), (4, 5, 3)),
    "summed-over-heads": (einsum("bshk,hdk->bsd", (2, 3, 4)), (4, 5, 2, 4)),
    "experts": (einsum("bei,eio->beo", (2, 3, 4)), (5, 2, 3)),
    "experts-second": (einsum("b...ei,eoi->b...eo", (2, 4, 3)), (4, 5, 2, 3)),
    "experts-and-heads": (einsum("bsed,edhk->bshek", (2, 3, 2, 2)), (4, 5, 2, 3)),
    "all-inputs": (einsum("btc,ctf->bf", (3, 5, 2)), (4, 5, 3)),
    "numbered": (
        lambda: Contraction((3, 5, 2), lambda x, w: torch.einsum(x, [0, 1, 2], w, [2, 1, 3], [0, 3])),
        (4, 5, 3),
    ),
    "view": (
        lambda: Contraction((3, 8), lambda x, w: torch.einsum("bsd,dhk->bshk", x, w.view(3, 2, 4))),
        (4, 5, 3),
    ),
    "view-and-whole": (
        lambda: Contraction(
            (3, 8), lambda x, w: torch.einsum("bsd,dhk->bskh", x, w.view(3, 2, 4)).flatten(2) + x.cos() @ w
        ),
        (4, 5, 3),
    ),
    "slice": (
        lambda: Contraction((5, 4), lambda x, w: torch.einsum("bi,oi->bo", x[:, :2], w[1:3, 1:3])),
        (4, 3),
    ),
    "bmm": (
        lambda: Contraction((2, 3, 4), lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1)),
        (5, 2, 3),
    ),
    "bmm-turned": (
        lambda: Contraction((2, 4, 3), lambda x, w: x.transpose(0, 1).bmm(w.mT).transpose(0, 1)),
        (5, 2, 3),
    ),
    "bmm-left": (
        lambda: Contraction((2, 4, 3), lambda x, w: torch.bmm(w, x.permute(1, 2, 0)).permute(2, 0, 1)),
        (5, 2, 3),
    ),
    "baddbmm": (
        lambda: Contraction(
            (2, 3, 3),
            lambda x, w: torch.baddbmm(x.cos().transpose(0, 1), x.transpose(0, 1), w).transpose(0, 1),
        ),
        (5, 2, 3),
    ),
    "matmul": (lambda: Contraction((2, 3, 4), lambda x, w: (x @ w).transpose(0, 1)), (5, 3)),
    "matmul-of-stacks": (lambda: Contraction((2, 3, 4), lambda x, w: x @ w), (4, 2, 5, 3)),
    "in-place": (
        lambda: Contraction((3, 2, 4), lambda x, w: F.relu(torch.einsum("bsd,dhk->bshk", x, w), True)),
        (4, 5, 3),
    ),
    "dense-experts": (Experts, (4, 5, 3)),
    "attention": (Heads, (4, 5, 4)),
}


class Products(nn.Module):
    """Matrix products; a weight that is stored with its input axis first is a linear map too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, 4))
        self.down, self.up = nn.Parameter(torch.randn(1, 3)), nn.Parameter(torch.randn(3, 1))
        self.c, self.how = nn.Parameter(torch.randn(4)), how

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.a, self.b, self.c
        if self.how == "operator":
            return torch.tanh(x @ a) @ b.T
        if self.how == "functions":
            return torch.mm(torch.tanh(torch.matmul(x, a)), b.t()) + torch.tanh(x.matmul(a)).mm(b.mT)
        if self.how == "addmm":  # Hugging Face's Conv1D
            rows = torch.addmm(c, x.view(-1, 3), a).view(*x.shape[:-1], 4)
            return torch.tanh(rows) @ b.T
        if self.how == "low-rank":
            return torch.tanh(x @ self.down.T @ self.up.T) @ a
        if self.how == "columns":
            return (b @ torch.tanh(a.T @ x.mT)).mT
        if self.how == "vector":
            return torch.mv(b, torch.tanh(x @ a))
        if self.how == "slices":  # columns of a weight that has its input first
            return torch.tanh(x @ a[:, 1:3]) + torch.sin(F.linear(x, a.T[2:]))
        raise AssertionError


@dataclasses.dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    covered: bool = True


CONV1D = {
    "plain": {},
    "stride": {"stride": 2},
    "padding": {"padding": 2},
    "same": {"padding": "same"},
    "same-even": {"padding": "same", "dilation": 3, "kernel_size": 2},
    "valid": {"padding": "valid"},
    "dilation": {"dilation": 2, "padding": 1},
    "groups": {"groups": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": 2, "padding_mode": "reflect", "dilation": 2},
    "replicate": {"padding": 1, "padding_mode": "replicate", "stride": 2},
    "bias-free": {"bias": False},
}
CONV2D = {
    "plain": {},
    "stride": {"stride": (2, 1)},
    "padding": {"padding": (1, 2)},
    "same": {"padding": "same", "kernel_size": (2, 3)},
    "valid": {"padding": "valid"},
    "dilation": {"dilation": (2, 1), "padding": 1, "stride": 2},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4},
    "reflect": {"padding": (1, 2), "padding_mode": "reflect"},
    "replicate-same": {"padding": "same", "padding_mode": "replicate"},
    "bias-free": {"bias": False},
    "one-by-one": {"kernel_size": 1},
    "lists": {"stride": [2, 1], "padding": [1, 0], "dilation": [1, 2]},
}


CONV3D = {
    "plain": {},
    "all": {"stride": (2, 1, 1), "padding": (1, 0, 2), "dilation": (1, 2, 1), "groups": 2},
    "same": {"padding": "same", "kernel_size": (2, 3, 1)},
    "circular": {"padding": 1, "padding_mode": "circular", "bias": False},
    "valid": {"padding": "valid"},
    "depthwise": {"groups": 4},
    "reflect": {"padding": (1, 2, 0), "padding_mode": "reflect"},
    "replicate-same": {"padding": "same", "padding_mode": "replicate"},
}
TRANSPOSED1D = {
    "plain": {},
    "stride": {"stride": 3},
    "output-padding": {"stride": 3, "output_padding": 2, "padding": 1},
    "cropped": {"padding": 4, "dilation": 2, "kernel_size": 2, "stride": 2},
    "all": {"stride": 2, "padding": 1, "output_padding": 1, "dilation": 3, "groups": 2},
    "bias-free": {"bias": False, "kernel_size": 1},
}
TRANSPOSED2D = {
    "plain": {},
    "all": {"stride": (2, 1), "padding": (0, 2), "output_padding": (1, 0), "dilation": (1, 2), "groups": 2},
    "depthwise": {"groups": 4, "stride": 2},
    "bias-free": {"bias": False, "padding": 1},
}
TRANSPOSED3D = {
    "plain": {},
    "all": {
        "stride": (2, 1, 3),
        "padding": (1, 0, 0),
        "output_padding": (1, 0, 2),
        "groups": 2,
        "bias": False,
    },
    "dilation": {"dilation": (1, 3, 2), "padding": 1},
}


def conv(kind: type[nn.Module], options: dict) -> Callable[[], nn.Module]:
    size = {"1d": 3, "2d": (3, 2), "3d": (2, 1, 3)}[kind.__name__[-2:]]
    return lambda: kind(4, 8, **({"kernel_size": size} | options))


class Sized(nn.Module):
    """A transposed convolution that is told how large its result is to be."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, output_size=(8, 5))


class SlimConvolution(nn.Module):
    """The first channels of a convolution, and all of them; its kernel as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv1d(2, 4, 2), nn.Conv1d(2, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        slim = F.conv1d(x, self.conv.weight[1:3], self.conv.bias[1:3])
        mixed = F.linear(x.mT, self.point.weight.squeeze(-1)) + self.point(x).mT
        return torch.cat([torch.tanh(part).flatten(1) for part in (slim, self.conv(x), mixed)], 1)


class Attention(nn.Module):
    """torch's multi-head attention: of tokens among each other, or to others."""

    def __init__(self, how: str, **options: Any) -> None:
        super().__init__()
        self.how, self.first = how, options.get("batch_first", False)
        self.attention = nn.MultiheadAttention(4, 2, **options)
        self.other = torch.randn(5, 1, options.get("kdim", 4), dtype=DTYPE)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 4]
        k = self.other.expand(-1, len(x), -1).clone()
        k = k + x.mean((1, 2))[:, None]
        k = k.transpose(0, 1) if self.first else k
        q = x if self.first else x.transpose(0, 1)
        k = q if self.how == "self" else k
        v = k.sin() if self.how == "cross" else k
        found, weights = self.attention(q, k, v, need_weights=self.how == "cross")
        found = found if self.first else found.transpose(0, 1)
        return found if weights is None else found * (1 + weights.sum())


class GroupedQueries(nn.Module):
    """Fused projections, of which heads of queries share keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 8 + 4 + 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 4]
        q, k, v = self.qkv(x).split([8, 4, 4], -1)
        q, k, v = (part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in (q, k, v))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(heads.transpose(1, 2).flatten(2))


class Recurrent(nn.Module):
    """A recurrent network of sequences, of which the end is read too."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.first = options.get("batch_first", False)
        self.cell = kind(2, 3, **options)
        self.head = nn.LazyLinear(2, dtype=DTYPE)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 2]
        out, state = self.cell(x if self.first else x.transpose(0, 1))
        h = state[0] if isinstance(state, tuple) else state
        out = out if self.first else out.transpose(0, 1)
        return self.head(torch.cat([out.flatten(1), h.transpose(0, 1).flatten(1)], 1))


class Cells(nn.Module):
    """Cells, in a loop of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.LSTMCell(2, 3), nn.GRUCell(3, 3), nn.RNNCell(3, 2, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 2]
        a, b, c = None, None, None
        for part in x.unbind(1):
            a = self.a(part, a)
            b = self.b(a[0], b)
            c = self.c(b, c)
        return torch.cat([b, c], 1)


RECURRENT = {
    "lstm": (nn.LSTM, {}),
    "lstm-all": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True, "proj_size": 2}),
    "lstm-bias-free": (nn.LSTM, {"bias": False, "num_layers": 2}),
    "gru": (nn.GRU, {"batch_first": True, "bidirectional": True}),
    "gru-deep": (nn.GRU, {"num_layers": 2}),
    "rnn": (nn.RNN, {}),
    "rnn-relu": (nn.RNN, {"nonlinearity": "relu", "batch_first": True}),
}
ATTENTION = {
    "self": ("self", {"batch_first": True}),
    "self-positions-first": ("self", {}),
    "self-bias-free": ("self", {"bias": False}),
    "keys": ("keys", {"batch_first": True}),
    "cross": ("cross", {}),
    "cross-batch-first": ("cross", {"batch_first": True}),
    "separate": ("keys", {"kdim": 3, "vdim": 3, "bias": False}),
    "zero": ("self", {"add_zero_attn": True}),
}
PACKED = ("chunk", "split", "slice", "one-row", "view")
INPUT_SLICES = ("linear", "split", "block", "one-column", "input-first", "columns")
PRODUCTS = {
    "operator": (5, 3),
    "functions": (5, 3),
    "addmm": (5, 2, 3),
    "low-rank": (5, 2, 3),
    "columns": (5, 3),
    "columns-of-tokens": (5, 2, 3),
    "slices": (5, 3),
    "vector": (3,),
}

CASES = {
    **{f"packed-{how}": Case(lambda how=how: Packed(how), (5, 3)) for how in PACKED},
    **{f"input-slices-{how}": Case(lambda how=how: InputSlices(how), (6, 5)) for how in INPUT_SLICES},
    **{
        f"products-{how}": Case(lambda how=how: Products(how.removesuffix("-of-tokens")), shape)
        for how, shape in PRODUCTS.items()
    },
    **{
        f"attention-{name}": Case(lambda how=how, options=options: Attention(how, **options), (3, 3, 4))
        for name, (how, options) in ATTENTION.items()
    },
    "attention-other-length": Case(lambda: Attention("self"), (3, 6, 4)),
    "grouped-queries": Case(GroupedQueries, (3, 3, 4)),
    **{
        name: Case(lambda kind=kind, options=options: Recurrent(kind, **options), (3, 3, 2))
        for name, (kind, options) in RECURRENT.items()
    },
    "cells": Case(Cells, (3, 4, 2)),
    "slim-convolution": Case(SlimConvolution, (3, 2, 4)),
    "linear-1d": Case(lambda: nn.Linear(3, 2), (3,)),
    "linear-2d": Case(lambda: nn.Linear(3, 2), (5, 3)),
    "linear-3d": Case(lambda: nn.Linear(3, 2), (5, 4, 3)),
    "linear-4d": Case(lambda: nn.Linear(3, 2), (5, 2, 3, 3)),
    "linear-bias-free": Case(lambda: nn.Linear(3, 2, bias=False), (5, 3)),
    "deep": Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (5, 3)),
    "functional": Case(Functional, (5, 3)),
    "twice": Case(Twice, (5, 3)),
    "tied": Case(Tied, (5, 3)),
    "parametrized": Case(Parametrized, (5, 3)),
    "in-place": Case(InPlace, (5, 3)),
    "in-place-module": Case(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2)),
        (4, 2, 3, 3),
    ),
    "in-place-tokens": Case(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2), nn.Sigmoid()),
        (5, 2, 3),
    ),
    "in-place-unbatched": Case(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(inplace=True), nn.Conv1d(3, 2, 1)), (2, 4)
    ),
    "frozen": Case(Frozen, (5, 3)),
    "flattened": Case(OnFlattened, (5, 3, 4)),
    "detour": Case(Detour, (5, 3)),
    "unbatched-conv1d": Case(lambda: nn.Conv1d(2, 3, 2), (2, 5)),
    "unbatched-conv2d": Case(lambda: nn.Conv2d(2, 3, 2), (2, 4, 4)),
    "batch-of-one": Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (1, 3)),
    **{f"conv1d-{name}": Case(conv(nn.Conv1d, options), (3, 4, 7)) for name, options in CONV1D.items()},
    **{f"conv2d-{name}": Case(conv(nn.Conv2d, options), (3, 4, 5, 6)) for name, options in CONV2D.items()},
}
CASES |= {
    f"{kind.__name__.lower()}-{name}": Case(conv(kind, options), shape)
    for kind, table, shape in (
        (nn.Conv3d, CONV3D, (2, 4, 3, 4, 3)),
        (nn.ConvTranspose1d, TRANSPOSED1D, (3, 4, 5)),
        (nn.ConvTranspose2d, TRANSPOSED2D, (3, 4, 3, 4)),
        (nn.ConvTranspose3d, TRANSPOSED3D, (2, 4, 2, 3, 2)),
    )
    for name, options in table.items()
}
CASES |= {f"contraction-{name}": Case(*own) for name, own in CONTRACTIONS.items()}
CASES["unbatched-conv3d"] = Case(lambda: nn.Conv3d(2, 3, 2), (2, 3, 3, 3))
CASES["transposed-to-a-size"] = Case(Sized, (3, 2, 4, 3))
CASES["unbatched-transposed"] = Case(lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 3, 3))
UNBATCHED = {
    "in-place-unbatched",
    "unbatched-conv3d",
    "unbatched-transposed",
    "linear-1d",
    "products-vector",
    "unbatched-conv1d",
    "unbatched-conv2d",
}


def recorded(model: nn.Module, x: Tensor) -> tuple[Tape, Tensor]:
    if any(map(nn.parameter.is_lazy, model.parameters())):
        model(x)
    tape = Tape({name: p for name, p in model.named_parameters() if p.requires_grad})
    with tape.recording():
        z = model(x)
    return tape, z


def by_rule(tape: Tape, z: Tensor, signals: Tensor, examples: int) -> dict[str, Tensor]:
    """Per-example gradients from the records, name by name."""
    found = {}
    shapes = {name: tuple(p.shape) for name, p in tape._parameters.items()}
    for block, records in SignalPass(tape, (z,), (signals,), examples).records().items():
        a, g = merged(records)
        assert a.shape[:3] == g.shape[:3] == (examples, a.shape[1], block.groups)
        assert a.shape[3] == block.columns
        assert g.shape[3] == block.outputs
        rows = torch.einsum("nsgo,nsgi->ngoi", g, a)
        weight = rows[..., : block.inputs]
        if block.transposed:
            taps = 1 if block.flat else math.prod(shapes[block.weight][2:])
            weight = weight.unflatten(-1, (-1, taps)).transpose(-3, -2)
        found[block.weight] = weight.flatten(1)
        if block.bias is not None:
            found[block.bias] = rows[..., -1].flatten(1)
    return found


# torch copies its input where "same" padding is odd, and says so.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_records_give_the_per_example_gradients(name: str) -> None:
    case = CASES[name]
    model, x = case.build().to(DTYPE), torch.randn(case.shape, dtype=DTYPE)
    tape, z = recorded(model, x)
    signals = torch.randn_like(z)
    if name in UNBATCHED:
        J = oracle.jacobian(model, x)
        expected, examples = (signals.reshape(-1) @ J)[None], 1
    else:
        expected, examples = oracle.scores(model, x, signals), len(x)
    rows = by_rule(tape, z, signals, examples)
    for parameter in oracle.trainable(model):
        own = expected[:, oracle.positions(model, [parameter])]
        if parameter in rows:
            torch.testing.assert_close(rows[parameter], own)
        else:
            assert not own.any()  # no output depends on it
            assert name.startswith(("detour", "packed-", "products-", "input-slices-"))
    assert not tape.uncovered


def test_coverage_is_of_those_that_acted_and_by_rules_only() -> None:
    tape, _ = recorded(Detour(), torch.randn(5, 3))
    assert all(tape.covers(f"{layer}.{kind}") for layer in ("used", "aside") for kind in ("weight", "bias"))
    assert not tape.covers("never.weight")


def test_a_pass_of_signals_touches_no_gradient_and_leaves_the_graph_whole() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    tape, z = recorded(model, x)
    by_rule(tape, z, torch.randn_like(z), 5)
    by_rule(tape, z, torch.randn_like(z), 5)
    assert all(p.grad is None for p in model.parameters())
    z.sum().backward()
    mine = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for p, g in zip(model.parameters(), mine):
        assert torch.equal(p.grad, g)


def test_recording_changes_neither_outputs_nor_the_random_stream() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)), torch.randn(5, 3)
    torch.manual_seed(3)
    plain, after = model(x), torch.get_rng_state()
    torch.manual_seed(3)
    tape, z = recorded(model, x)
    by_rule(tape, z, torch.randn(5, 2, generator=torch.Generator()), 5)
    assert torch.equal(plain, z)
    assert torch.equal(torch.get_rng_state(), after)


def test_recording_ends_with_its_block_even_if_the_model_raises() -> None:
    model = nn.Linear(3, 2)
    tape = Tape(dict(model.named_parameters()))
    with pytest.raises(RuntimeError), tape.recording():
        model(torch.randn(5, 4))
    model(torch.randn(5, 3))
    assert tape.take().calls == []


def test_a_pass_that_was_taken_can_be_read_after_the_next_one_was_recorded() -> None:
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    tape, z = recorded(model, x)
    calls = tape.take()
    with tape.recording():
        model(torch.randn(7, 3))
    tape.put(calls)
    (record,) = tape.records([z], [torch.ones_like(z)], 5)
    assert torch.equal(record.inputs[:, 0], x)


def test_only_the_blocks_asked_for_are_sent_signals() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    tape, z = recorded(model, torch.randn(5, 3))
    (record,) = tape.records([z], [torch.ones_like(z)], 5, names=["2.weight"])
    assert record.block.weight == "2.weight"
    assert record.block.rule == "linear"


def test_several_outputs_send_their_signals_together() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.tanh(self.body(x))
            return self.head(hidden), hidden

    model, x = Two().to(DTYPE), torch.randn(5, 3, dtype=DTYPE)
    tape = Tape(dict(model.named_parameters()))
    with tape.recording():
        z = model(x)
    signals = tuple(torch.randn_like(part) for part in z)
    J = oracle.jacobian(model, x)
    expected = torch.cat([s.reshape(-1) for s in signals]) @ J
    blocks = SignalPass(tape, z, signals, 5).records()
    total = {}
    for block, records in blocks.items():
        a, g = merged(records)
        rows = torch.einsum("nsgo,nsgi->oi", g, a)
        total[block.weight], total[block.bias] = rows[:, :-1].flatten(), rows[:, -1]
    torch.testing.assert_close(torch.cat([total[name] for name in oracle.trainable(model)]), expected)


@pytest.mark.parametrize("width", [2, 3], ids=["nan-input", "inf-signal"])
def test_what_is_not_finite_is_named(width: int) -> None:
    from natgrad.errors import NonFiniteError

    model, x = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), torch.randn(5, 3)
    if width == 2:
        x[1, 1] = torch.nan
    tape, z = recorded(model, x)
    signals = torch.ones_like(z)
    if width == 3:
        signals[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"[01]\.weight"):
        tape.records([z], [signals], 5)
