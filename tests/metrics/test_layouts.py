"""However a linear map is written, it has the curvature that it has as `nn.Linear` or `nn.Conv2d`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad

DTYPE = torch.float64
CLASSES = 3
METRICS = {
    "kfac": natgrad.KFAC(),
    "kfac-reduce": natgrad.KFAC(sharing="reduce"),
    "kfac-scores": natgrad.KFAC(sharing="scores"),
    "ekfac": natgrad.EKFAC(),
    "ekfac-scores": natgrad.EKFAC(sharing="scores"),
    "diagonal": natgrad.Diagonal(),
    "dense": natgrad.Dense(),
    "block": natgrad.Block(),
    "gram": natgrad.Gram(),
}


class Products(nn.Module):
    """Hugging Face's Conv1D, and a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
        self.head = nn.Parameter(torch.randn(4, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.b, x.view(-1, 3), self.w).view(*x.shape[:-1], 4)
        return (torch.tanh(rows) @ self.head).sum(1)


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x))).sum(1)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 1), padding=1, output_padding=(1, 0))
        self.head = nn.Conv2d(3, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x))).mean((2, 3))


class Upsampled(nn.Module):
    """The same as a convolution of an image with zeros between its pixels, read backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, (3, 2)), nn.Conv2d(3, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.new_zeros(*x.shape[:2], 2 * x.shape[2] - 1, x.shape[3])
        wide[:, :, ::2] = x
        return self.head(torch.tanh(self.conv(F.pad(wide, (0, 0, 1, 2))))).mean((2, 3))


class InSpace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv3d(2, 3, (1, 2, 2)), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # [N, 2, 1, H, W]
        return self.head(torch.tanh(self.conv(x)).mean((2, 3, 4)))


class InPlane(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 2), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x[:, :, 0])).mean((2, 3)))


class Attention(nn.Module):
    """Positions come first, and there are as many as examples."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.head(self.attention(x, x, x)[0].mean(0))


class WrittenAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (h.unflatten(2, (2, 2)).transpose(1, 2) for h in self.qkv(x).chunk(3, 2))
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.out(heads).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(3, 2), nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x.transpose(0, 1))[1][0])


class WrittenRecurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.h, self.head = nn.Linear(3, 6), nn.Linear(2, 6), nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 2)
        for step in x.unbind(1):
            (r, z, n), (s, u, m) = self.i(step).chunk(3, 1), self.h(h).chunk(3, 1)
            r, z = torch.sigmoid(r + s), torch.sigmoid(z + u)
            h = (1 - z) * torch.tanh(n + r * m) + z * h
        return self.head(h)


class Heads(nn.Module):
    """Weights with an axis for the heads, as many of them as numbers in a head's vector."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 2, 2)), nn.Parameter(torch.randn(2, 2, 2))
        self.head = nn.Parameter(torch.randn(2, CLASSES))

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 3]
        hidden = torch.tanh(torch.einsum("btd,dhk->bhtk", x, self.up))
        tokens = torch.tanh(torch.einsum("bhtk,hkd->btd", hidden, self.down))
        return torch.einsum("bd,dc->bc", tokens.sum(1), self.head)


class MergedHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.head = nn.Linear(2, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))).sum(1))


class Experts(nn.Module):
    """Each expert's own map of all tokens, and of what it made of them; two as wide as they are deep."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 3, 3)), nn.Parameter(torch.randn(2, CLASSES, 3))

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 3]
        tokens = x.flatten(0, 1).expand(2, -1, -1)
        made = torch.bmm(torch.tanh(torch.bmm(tokens, self.up)), self.down.mT)
        return made.sum(0).view(*x.shape[:2], CLASSES).sum(1)


class GroupedConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv2d(6, 6, 1, groups=2, bias=False)
        self.down = nn.Conv2d(6, 2 * CLASSES, 1, groups=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made = self.down(torch.tanh(self.up(x.mT.repeat(1, 2, 1)[..., None])))
        return made.unflatten(1, (2, CLASSES)).sum((1, 3, 4))


@dataclass(frozen=True)
class Pair:
    """Two ways to write one function.

    Attributes:
        build: the way in question.
        reference: another, of modules that are known to be right.
        shape: of an example.
        stored: parameter → that of the reference, and how the one is made of the other.
    """

    build: Callable[[], nn.Module]
    reference: Callable[[], nn.Module]
    shape: tuple[int, ...]
    stored: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = field(default_factory=dict)


def same(w: Tensor) -> Tensor:
    return w


def affine(own: str, reference: str, change: Callable[[Tensor], Tensor] = same) -> dict[str, Any]:
    """A weight and a bias."""
    return {
        f"{own}weight": (f"{reference}.weight", change),
        f"{own}bias": (f"{reference}.bias", same),
    }


def backwards(w: Tensor) -> Tensor:
    """A transposed convolution's kernel from that of a convolution."""
    return w.flip(2, 3).transpose(0, 1)


HEAD = affine("head.", "head")
PAIRS = {
    "transposed": Pair(Transposed, Upsampled, (2, 3, 3), affine("conv.", "conv", backwards) | HEAD),
    "in-space": Pair(
        InSpace, InPlane, (2, 1, 3, 4), affine("conv.", "conv", lambda w: w.unsqueeze(2)) | HEAD
    ),
    "attention": Pair(
        Attention,
        WrittenAttention,
        (5, 4),
        affine("attention.in_proj_", "qkv") | affine("attention.out_proj.", "out") | HEAD,
    ),
    "recurrent": Pair(
        Recurrent,
        WrittenRecurrent,
        (4, 3),
        {f"cell.{kind}_{side}h_l0": (f"{side}.{kind}", same) for side in "ih" for kind in ("weight", "bias")}
        | HEAD,
    ),
    "heads": Pair(
        Heads,
        MergedHeads,
        (2, 3),
        {
            "up": ("up.weight", lambda w: w.mT.unflatten(1, (2, 2))),
            "down": ("down.weight", lambda w: w.mT.unflatten(0, (2, 2))),
            "head": ("head.weight", lambda w: w.mT),
        },
    ),
    "experts": Pair(
        Experts,
        GroupedConvolutions,
        (2, 3),
        {
            "up": ("up.weight", lambda w: w.view(2, 3, 3).mT),
            "down": ("down.weight", lambda w: w.view(2, CLASSES, 3)),
        },
    ),
    "products": Pair(
        Products,
        Linears,
        (2, 3),
        {
            "w": ("first.weight", lambda w: w.mT),
            "b": ("first.bias", same),
            "head": ("head.weight", lambda w: w.mT),
        },
    ),
}


def vector(pair: Pair, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference's coordinates in those of the other way."""
    return {own: change(named[name]) for own, (name, change) in pair.stored.items()}


@pytest.mark.parametrize("kind", ["exact", "mc"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", PAIRS)
def test_products_and_solves_are_those_of_the_reference(name: str, metric: str, kind: str) -> None:
    torch.manual_seed(0)
    pair = PAIRS[name]
    model, reference = pair.build().to(DTYPE), pair.reference().to(DTYPE)
    with torch.no_grad():
        known = dict(reference.named_parameters())
        for own, value in vector(pair, known).items():
            dict(model.named_parameters())[own].copy_(value)
    x, y = torch.randn(5, *pair.shape, dtype=DTYPE), torch.randint(CLASSES, (5,))
    torch.testing.assert_close(model(x), reference(x))
    loss = nn.CrossEntropyLoss()
    F, expected = (
        natgrad.fisher(m, loss, [(x, y)], metric=METRICS[metric], kind=kind, seed=0)
        for m in (model, reference)
    )
    v = {n: torch.randn_like(p) for n, p in known.items()}
    given = vector(pair, v)
    for found, wanted in (
        (F @ given, expected @ v),
        (F.solve(given, damping=0.1), expected.solve(v, damping=0.1)),
        (F.space.unflatten(F.diagonal()), expected.space.unflatten(expected.diagonal())),
    ):
        torch.testing.assert_close(dict(found), vector(pair, wanted))
    torch.testing.assert_close(F.logdet(damping=0.1), expected.logdet(damping=0.1))


@pytest.mark.parametrize("metric", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("name", PAIRS)
def test_steps_are_those_of_the_reference(name: str, metric: str) -> None:
    torch.manual_seed(0)
    pair = PAIRS[name]
    model, reference = pair.build().to(DTYPE), pair.reference().to(DTYPE)
    known = dict(reference.named_parameters())
    with torch.no_grad():
        for own, value in vector(pair, known).items():
            dict(model.named_parameters())[own].copy_(value)
    x, y = torch.randn(8, *pair.shape, dtype=DTYPE), torch.randint(CLASSES, (8,))
    saved = None
    for m in (model, reference):
        loss = nn.CrossEntropyLoss()
        optimizer = natgrad.NaturalGradient(m, loss, metric=METRICS[metric], seed=0)
        for step in range(3):
            if step == 2 and m is model:  # a state is restored as it was
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            loss(m(x), y).backward()
            optimizer.step()
        assert not [row for row in optimizer.coverage().rows if row.reason]
    torch.testing.assert_close(
        {n: p.detach() for n, p in model.named_parameters()},
        vector(pair, {n: p.detach() for n, p in known.items()}),
    )
