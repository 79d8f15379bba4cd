"""What no rule covers is listed with the function that used it; per-example gradients find it all the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natgrad.tape import Tape
from natgrad.tape.passes import SignalPass
from oracle import fisher as oracle

DTYPE = torch.float64


class Einsum(nn.Module):
    """A parameter that acts by a function for which there is no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("no,o->no", self.linear(x), self.scale)


class Contractions(nn.Module):
    """Contractions that are no linear map of what one position has, or no stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        shapes = ((3, 2), (3, 2), (3, 2), (3, 3), (3, 2, 3), (2, 3, 2), (2, 1, 2))
        self.a, self.b, self.c, self.d, self.e, self.f, self.g = (
            nn.Parameter(torch.randn(s)) for s in shapes
        )
        self.h, self.i = nn.Parameter(torch.randn(2, 1, 3)), nn.Parameter(torch.randn(2, 3, 2))

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 3]
        z = torch.einsum("bti,io->bo", x, self.a)  # summed over positions
        z = z + torch.einsum("bti,io,bt->bo", x, self.b, x[..., 0])
        z = z + torch.einsum("bti,io->bti", x, self.c)[:, 0, :2]  # an axis that nothing else has
        z = z + torch.einsum("bti,ii->bt", x, self.d)[:, :2]
        z = z + torch.einsum("bti,ioi->bto", x, self.e)[:, 0]
        z = z + torch.einsum("bti,bio->bo", x[:2], self.f).sum(0)  # of a batch of two
        z = z + torch.bmm(self.h, self.i).sum((0, 1))
        stacks = x[:, :2].transpose(0, 1)
        return z + torch.baddbmm(self.g, stacks, torch.ones(2, 3, 2, dtype=x.dtype)).sum(0)


class Both(nn.Module):
    """A weight that is a linear map, and a scale too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.linear.weight[0]


class Transposed(nn.Module):
    """A weight used by a rule, and once more in the other direction."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) @ self.linear.weight


class Strided(nn.Module):
    """Every second row of a weight, and a slice of a bias that belongs to other rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x @ self.linear.weight[::2].T
        return F.linear(hidden, self.last.weight[:2], self.last.bias[2:])


class SlimInput(nn.Module):
    """A convolution of some of the channels that its kernel is for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x[:, :1], self.conv.weight[:, :1], self.conv.bias)


class Scaled(nn.Module):
    """A product with a factor, one with no vector to add, and one with a parameter for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.b = (nn.Parameter(torch.randn(3, 3)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, torch.addmm(x, x, self.w, alpha=2.0), self.v)


class LowRankFirst(nn.Module):
    """Two parameters of which the product is the map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 1)), nn.Parameter(torch.randn(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.a @ self.b)


class Queries(nn.Module):
    """A parameter that is a layer's input."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.project = nn.Parameter(torch.randn(4, 3)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.project(self.query).mT


class SecondBias(nn.Module):
    """Two layers with one weight, each with its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class SharedBias(nn.Module):
    """Two layers with one bias, each with its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class OnlyBias(nn.Module):
    """A bias that is trained under a weight that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.linear.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Attention(nn.Module):
    """Three weights, and one bias for all."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[..., :3], x[..., 1:])[0]


class PackedSequences(nn.Module):
    """A recurrent network of packed sequences, which are in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([2, 3, 1, 3, 3])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.cell(packed)[1][0]


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


class Parametrized(nn.Module):
    """Weights that are functions of the parameters that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(3, 3) for _ in range(4))
        parametrize = nn.utils.parametrize
        parametrize.register_parametrization(self.first, "weight", Symmetric())
        nn.utils.parametrizations.spectral_norm(self.second)
        nn.utils.parametrizations.weight_norm(self.third)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.third(self.second(self.first(x))))


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE)


CASES = {
    "einsum": (Einsum, real(5, 3), {"scale": "einsum"}),
    "contractions": (
        Contractions,
        real(5, 2, 3),
        dict.fromkeys("abcdef", "einsum") | {"g": "baddbmm", "i": "add beside a linear map"},
    ),
    "both": (Both, real(5, 3), {"linear.weight": "mul beside a linear map"}),
    "transposed": (Transposed, real(5, 3), {"linear.weight": "matmul"}),
    "slim-input": (SlimInput, real(5, 2, 4), {"conv.weight": "conv1d", "conv.bias": "conv1d"}),
    "strided": (
        Strided,
        real(5, 3),
        {"linear.weight": "matmul", "last.bias": "linear with the weight of another block"},
    ),
    "scaled": (Scaled, real(3, 3), {"w": "addmm", "v": "addmm", "b": "addmm"}),
    "low-rank-first": (LowRankFirst, real(5, 3), {"a": "matmul", "b": "matmul"}),
    "queries": (Queries, real(5, 3), {"query": "matmul", "project.weight": "matmul"}),
    "second-bias": (SecondBias, real(5, 3), {"second.bias": "linear with the weight of another block"}),
    "shared-bias": (SharedBias, real(5, 3), {"first.bias": "linear with the weight of another block"}),
    "only-bias": (OnlyBias, real(5, 3), {"linear.bias": "linear"}),
    "attention": (
        Attention,
        real(5, 3, 4),
        {"attention.in_proj_bias": "linear with the weight of another block"},
    ),
    "parametrized": (
        lambda: Parametrized().eval(),
        real(5, 3),
        {
            "first.parametrizations.weight.original": "linear",
            "second.parametrizations.weight.original": "div",
            "third.parametrizations.weight.original0": "linear",
            "third.parametrizations.weight.original1": "linear",
            **{f"{name}.bias": "linear" for name in ("first", "second", "third")},
        },
    ),
    "packed-sequences": (
        PackedSequences,
        real(5, 3, 4),
        {f"cell.{kind}_{part}_l0": "gru" for kind in ("weight", "bias") for part in ("ih", "hh")},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_no_rule_covers_is_listed(name: str) -> None:
    build, x, expected = CASES[name]
    model = build().to(DTYPE)
    tape = Tape({n: p for n, p in model.named_parameters() if p.requires_grad})
    with tape.recording():
        model(x)
    tape.resolve(len(x))
    assert tape.uncovered == expected
    for parameter in tape.uncovered:
        assert not tape.covers(parameter)


# The oracle batches by a loop where torch can do no better, and torch says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [2, 64])
def test_per_example_gradients_need_no_rule(name: str, chunk: int) -> None:
    build, x, _ = CASES[name]
    model = build().to(DTYPE)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tape = Tape(trained)
    with tape.recording():
        z = model(x)
    signals = torch.randn_like(z)
    rows = {n: [] for n in trained}
    for _, scores in SignalPass(tape, (z,), (signals,), len(x)).scores(trained, chunk):
        for n, score in scores.items():
            rows[n].append(score.flatten(1))
    found = torch.cat([torch.cat(rows[n]) for n in trained], dim=1)
    torch.testing.assert_close(found, oracle.scores(model, x, signals))
    assert all(p.grad is None for p in model.parameters())


def test_asking_for_a_shape_or_a_detached_copy_is_no_use() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            w = self.linear.weight
            assert w.shape[0] == w.size(0) == len(w)
            assert w.dtype == x.dtype
            return self.linear(x) + w.detach().sum() + w.data.norm()

    model = Asks()
    tape = Tape(dict(model.named_parameters()))
    with tape.recording():
        model(torch.randn(5, 3))
    assert not tape.uncovered


def test_a_parameter_that_needs_no_gradient_any_more_has_a_score_of_zero() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    trained = dict(model.named_parameters())
    model[0].requires_grad_(False)
    tape = Tape(trained)
    with tape.recording():
        z = model(x)
    ((_, scores),) = SignalPass(tape, (z,), (torch.ones_like(z),), 5).scores(trained)
    assert scores["0.weight"].shape == (5, 4, 3)
    assert not scores["0.weight"].any()
    assert scores["1.weight"].any()
