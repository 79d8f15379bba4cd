"""Activations that are computed a second time: what is heard is the first time, and signals go through the second."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import natgrad
from natgrad.tape import Tape
from natgrad.tape.passes import SignalPass
from oracle import fisher as oracle

DTYPE = torch.float64
CE = nn.CrossEntropyLoss()


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, reentrant: bool = False, on: bool = True) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(4, 3)
        self.reentrant, self.on = reentrant, on

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.body, x, use_reentrant=self.reentrant) if self.on else self.body(x)
        return self.head((h[0] if isinstance(h, tuple) else h).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, dropout=0.2)


def lstm() -> nn.Module:
    return nn.LSTM(4, 4, batch_first=True)


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 4, dtype=DTYPE), torch.arange(n) % 3


@pytest.mark.parametrize("body", [mlp, attention, lstm])
def test_scores_are_those_without_a_checkpoint(body: Callable[[], nn.Module]) -> None:
    model, (x, _) = Checkpointed(body()).to(DTYPE).eval(), batch()
    parameters = dict(model.named_parameters())
    tape = Tape(parameters)
    with tape.recording():
        z = model(x)
    signals = torch.randn_like(z)
    model.on = False
    expected = oracle.scores(model, x, signals)
    found = next(s for _, s in SignalPass(tape, (z,), (signals,), len(x)).scores(parameters))
    torch.testing.assert_close(torch.cat([found[n].flatten(1) for n in parameters], 1), expected)
    records = tape.records([z], [signals], len(x))
    maps = {name for name in parameters if name.endswith("weight") and "norm" not in name}
    assert {r.block.weight for r in records} == ({"head.weight"} if body is lstm else maps)
    for record in records:
        rows = torch.einsum("nso,nsi->noi", record.signals, record.inputs).flatten(1)
        torch.testing.assert_close(rows, expected[:, oracle.positions(model, [record.block.weight])])


@pytest.mark.parametrize("metric", ["kfac", "gram"])
@pytest.mark.parametrize("body", [mlp, attention, lstm])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore::natgrad.errors.CoverageWarning")
def test_the_step_is_that_without_a_checkpoint(
    body: Callable[[], nn.Module], metric: str, reentrant: bool
) -> None:
    """Dropout too: what is computed a second time draws what it drew the first."""
    after = []
    for on in (True, False):
        torch.manual_seed(0)
        model, (x, y) = Checkpointed(body(), reentrant, on).to(DTYPE), batch(12)
        x.requires_grad_()
        optimizer = natgrad.NaturalGradient(model, CE, metric=metric, seed=1)
        for _ in range(3):
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
        listed = {row.name for row in optimizer.coverage().rows if row.reason == "lstm"}
        assert bool(listed) == (body is lstm and on)  # its parts would not be what is computed again
        after.append({name: p.detach() for name, p in model.named_parameters()})
    if body is not lstm or metric == "gram":
        # A network in parts and one kernel round otherwise.
        torch.testing.assert_close(after[0], after[1], rtol=1e-5, atol=1e-5 if body is lstm else 1e-9)


def test_what_is_called_without_a_graph_on_purpose_is_no_checkpoint() -> None:
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = self.linear(x)
            return self.linear(x) - target.mean()

    model, (x, _) = Teacher().to(DTYPE), batch()
    tape = Tape(dict(model.named_parameters()))
    with tape.recording():
        z = model(x[:, 0])
    (record,) = tape.records([z], [torch.ones_like(z)], len(x))
    torch.testing.assert_close(record.inputs[:, 0], x[:, 0])
