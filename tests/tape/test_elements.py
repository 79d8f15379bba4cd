"""Scores of parameters that act entry by entry, or are looked up, are their per-example gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natgrad.tape import Tape
from natgrad.tape.passes import SignalPass

DTYPE = torch.float64
N, T, D, WORDS = 5, 4, 3, 7


class Acting(nn.Module):
    """One parameter `p`, and a function that it enters."""

    def __init__(self, shape: tuple[int, ...], act: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.rand(shape) + 0.5)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.act(x.sin(), self.p)).flatten(1)


class Tokens(nn.Module):
    """A language model's input: words and positions, and what is done with them."""

    def __init__(self, position: str, padding: int | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, D, padding_idx=padding)
        self.places = nn.Embedding(2 * T, D)
        self.position, self.norm = position, nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if self.position == "row":
            places = self.places(torch.arange(length)[None])
        elif self.position == "vector":
            places = self.places(torch.arange(length))
        elif self.position == "slice":
            places = self.places.weight[:length]
        else:
            places = self.places(torch.arange(length).expand(len(x), -1))
        return self.norm(F.dropout(self.words(x) + places, 0.0)).flatten(1)


class ClassToken(nn.Module):
    """A vision transformer's: expanded, and put before the others."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.places = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, T + 1, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.places).flatten(1)


class Relative(nn.Module):
    """Distances between positions, looked up for every pair; the table meets the batch in the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * T, 2)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(T)
        bias = self.table(places[:, None] - places[None] + T).permute(2, 0, 1).unsqueeze(0)
        scores = (x @ x.mT)[:, None] + bias
        return scores.softmax(-1).flatten(1)


class Norms(nn.Module):
    """All of torch's, one after the other."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.batch, self.group = nn.BatchNorm1d(T), nn.GroupNorm(2, T)
        self.layer, self.rms = nn.LayerNorm((T, D)), nn.RMSNorm(D)
        self.instance = nn.InstanceNorm1d(T, affine=True)
        self.batch.train(training)

    def forward(self, x: Tensor) -> Tensor:
        for norm in (self.group, self.layer, self.rms, self.instance, self.batch):
            x = torch.sin(norm(x)) + x
        return x.flatten(1)


class Trained(nn.Module):
    """A batch normalisation that learns: what it shifts and scales is an example's own, if of all examples' making."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm.train()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.norm(x)).flatten(1)


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE)


def words(*shape: int) -> Tensor:
    return torch.randint(WORDS, shape)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "scale": lambda: (Acting((D,), lambda x, p: x * p), real(N, T, D)),
    "scale first": lambda: (Acting((D,), lambda x, p: p * x), real(N, T, D)),
    "shift": lambda: (Acting((T, 1), lambda x, p: x + p), real(N, T, D)),
    "subtracted": lambda: (Acting((D,), lambda x, p: torch.sub(x, p, alpha=2)), real(N, T, D)),
    "from": lambda: (Acting((1,), lambda x, p: p - x), real(N, T, D)),
    "scalar": lambda: (Acting((), lambda x, p: x * p), real(N, T, D)),
    "divided": lambda: (Acting((D,), lambda x, p: x / p), real(N, T, D)),
    "divides": lambda: (Acting((D,), lambda x, p: p / (x + 3)), real(N, T, D)),
    "added in place": lambda: (Acting((D,), lambda x, p: (x * 1).add_(p)), real(N, T, D)),
    "addcmul": lambda: (Acting((D,), lambda x, p: torch.addcmul(x, x, p, value=0.5)), real(N, T, D)),
    "exponential": lambda: (Acting((1, D), lambda x, p: x * p.exp()), real(N, D)),
    "one more": lambda: (Acting((D,), lambda x, p: x * (1.0 + p.float().to(x.dtype))), real(N, T, D)),
    "twice": lambda: (Acting((D,), lambda x, p: x * p + p), real(N, T, D)),
    "square": lambda: (Acting((D,), lambda x, p: x * (p * p)), real(N, T, D)),
    "slices": lambda: (Acting((2 * D,), lambda x, p: x * p[:D] + p[D:].tanh()), real(N, T, D)),
    "chunks": lambda: (Acting((2 * D,), lambda x, p: x * p.chunk(2)[0] + p.chunk(2)[1]), real(N, T, D)),
    "expanded": lambda: (Acting((D,), lambda x, p: x * p.expand(T, D)), real(T, T, D)),
    "repeated": lambda: (Acting((1, D), lambda x, p: torch.cat((x, p.repeat(len(x), 1)), 1)), real(N, D)),
    "flattened": lambda: (Acting((D,), lambda x, p: (x.flatten(0, 1) * p).view(x.shape)), real(N, T, D)),
    "state space": lambda: (
        Acting((D, 2), lambda x, p: torch.exp(-torch.exp(p)[None, None] * x[..., None])),
        real(N, T, D),
    ),
    "embedding": lambda: (Acting((WORDS, D), lambda x, p: F.embedding(words(N, T), p)), real(N, T)),
    "one word": lambda: (Acting((WORDS, D), lambda x, p: F.embedding(words(N), p)), real(N, T)),
    "tokens, row": lambda: (Tokens("row"), words(N, T)),
    "tokens, vector": lambda: (Tokens("vector"), words(N, T)),
    "tokens, as many": lambda: (Tokens("vector"), words(T, T)),
    "tokens, slice": lambda: (Tokens("slice"), words(N, T)),
    "tokens, expanded": lambda: (Tokens("expanded"), words(N, T)),
    "tokens, padding": lambda: (Tokens("row", padding=-2), words(N, T)),
    "class token": lambda: (ClassToken(), real(N, T, D)),
    "relative": lambda: (Relative(), real(N, T, D)),
    "norms": lambda: (Norms(False), real(N, T, D)),
    "batch norm in training": lambda: (Trained(nn.BatchNorm1d(D)), real(N, D)),
    "batch norm of images": lambda: (Trained(nn.BatchNorm2d(T)), real(N, T, D, 2)),
}


def recorded(case: str) -> tuple[dict[str, nn.Parameter], SignalPass]:
    torch.manual_seed(0)
    model, x = MODELS[case]()
    model.to(DTYPE)
    parameters = dict(model.named_parameters())
    tape = Tape(parameters)
    with tape.recording():
        z = model(x)
    signals = torch.randn(z.shape, dtype=DTYPE)
    return parameters, SignalPass(tape, (z,), (signals,), len(x))


@pytest.mark.parametrize("case", MODELS)
def test_scores_are_per_example_gradients(case: str) -> None:
    parameters, one = recorded(case)
    expected = {name: torch.cat([s[name] for _, s in one.scores(parameters)]) for name in parameters}
    twice = tuple(2.0 * s for s in one.signals)
    layers, elements = one.tape.columns(one.outputs, [one.signals, twice], one.examples)
    assert not layers
    assert not one.tape.uncovered
    assert {e.name for e in elements} == set(parameters)
    for element in elements:
        torch.testing.assert_close(
            element.scores(),
            torch.stack([expected[element.name]] * 2).mul_(
                torch.tensor([1.0, 2.0], dtype=DTYPE).view(2, *[1] * expected[element.name].dim())
            ),
        )
        torch.testing.assert_close(element.squares(), 5.0 * expected[element.name].square().sum(0))
        assert one.tape.covers(element.name)
