"""Fused functions and what they are made of give the same numbers, from the same random draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import natgrad
from natgrad.tape import Tape
from natgrad.tape.decompose import Unfused

DTYPE = torch.float64


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE)


def same(model: nn.Module, *args: Any) -> None:
    """In value and derivative, by either way that takes functions apart."""
    model.to(DTYPE)
    tape = Tape(dict(model.named_parameters()))
    found = []
    for mode in (None, Unfused(), tape.recording()):
        torch.manual_seed(3)
        if mode is None:
            out = model(*args)
        else:
            with mode:
                out = model(*args)
        leaves = [z for z in tree_leaves(out) if isinstance(z, Tensor) and z.is_floating_point()]
        total = sum(z.sin().sum() for z in leaves)
        found.append((leaves, torch.autograd.grad(total, list(model.parameters())), torch.get_rng_state()))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


OPTIONS = {
    "plain": {},
    "deep": {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
    "bias-free": {"bias": False, "batch_first": True},
}
KINDS = [(kind, options) for kind in (nn.LSTM, nn.GRU, nn.RNN) for options in OPTIONS.values()] + [
    (nn.LSTM, {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
    (nn.RNN, {"nonlinearity": "relu"}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_networks(kind: type[nn.RNNBase], options: dict[str, Any], packed: bool) -> None:
    model, x, first = kind(5, 6, **options), real(3, 3, 5), options.get("batch_first", False)
    states = real(model.num_layers * (1 + model.bidirectional), 3, 6)
    if packed:
        same(model, pack_padded_sequence(x, torch.tensor([2, 3, 1]), first, enforce_sorted=False))
    else:
        same(model, x)
        if kind is nn.GRU:
            same(model, x, states)
            same(model, x[0], states[:, 0])  # no batch dimension


@pytest.mark.parametrize(
    "model",
    [
        nn.LSTMCell(5, 6),
        nn.GRUCell(5, 6, bias=False),
        nn.RNNCell(5, 6),
        nn.RNNCell(5, 6, nonlinearity="relu"),
    ],
)
def test_cells(model: nn.Module) -> None:
    same(model, real(3, 5))
    same(model, real(5))


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True, "dropout": 0.3}, {"kdim": 4, "vdim": 4, "add_bias_kv": True}, {"bias": False}],
)
def test_attention(options: dict[str, Any]) -> None:
    same(nn.MultiheadAttention(4, 2, **options), *(real(3, 2, 4) for _ in range(3)))


class Reader(nn.Module):
    """A recurrent network, packed or not, and attention to what it read."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed, self.cell = packed, nn.GRU(3, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        given = x
        if self.packed:
            lengths = torch.arange(len(x)) % 3 + 1
            given = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        h = self.cell(given)[1].transpose(0, 1)
        return self.head(self.attention(h, x @ x.new_ones(3, 4), x @ x.new_ones(3, 4))[0].squeeze(1))


@pytest.mark.parametrize("metric", ["kfac", "ekfac", "gram"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.filterwarnings("ignore:.*no rule:UserWarning", "ignore:.*covers:UserWarning")
def test_the_adaptive_step_is_taken(packed: bool, metric: str) -> None:
    """Which needs a forward mode of every function."""
    torch.manual_seed(0)
    model, loss = Reader(packed).to(DTYPE), nn.CrossEntropyLoss()
    optimizer = natgrad.NaturalGradient(model, loss, metric=metric)
    x, y = real(12, 3, 3), torch.arange(12) % 3
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0]
    listed = {row.name for row in optimizer.coverage().rows if row.reason}
    assert listed == ({n for n, _ in model.named_parameters() if n.startswith("cell.")} if packed else set())
