"""Several sets of signals sent back together are what each is alone, batched or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad.tape.columns as module
from natgrad.tape import Tape
from natgrad.tape.passes import SignalPass
from natgrad.tape.rows import batch_rows, explain, portions
from oracle.problems import DTYPE, MODELS, problem


class Doubled(torch.autograd.Function):
    """Has no batched form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        if float(g.abs().max()) < 0:  # looks at a value
            raise AssertionError
        return g * 2


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(Doubled.apply(self.first(x)))


def recorded(model: nn.Module, x: Tensor, columns: int = 3) -> tuple[Tape, Tensor, list[tuple[Tensor, ...]]]:
    tape = Tape(dict(model.named_parameters()))
    with tape.recording():
        z = model(x)
    source = torch.Generator().manual_seed(2)
    return tape, z, [(torch.randn(z.shape, dtype=DTYPE, generator=source),) for _ in range(columns)]


@pytest.mark.parametrize("batched", [0, 2**40])
@pytest.mark.parametrize("model", [*MODELS, "odd"])
def test_columns_are_records(model: str, batched: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCHED_BYTES", batched)
    torch.manual_seed(0)
    if model == "odd":
        net, x = Odd().to(DTYPE), torch.randn(5, 3, dtype=DTYPE)
    else:
        one = problem(model, "mse")
        net, x = one.model, one.x
    tape, z, signals = recorded(net, x)
    calls, _ = tape.columns((z,), signals, len(x))
    assert tape.column_bytes == sum(call.raw_signals[0].numel() * 8 for call in calls)
    for k, signal in enumerate(signals):
        records = tape.records((z,), signal, len(x))
        assert [r.block for r in records] == [c.block for c in calls]
        for record, call in zip(records, calls):
            assert record.has_bias == call.has_bias
            torch.testing.assert_close(call.raw_signals[k], record.raw_signals)
            assert not call.raw_signals[k].requires_grad
            # In the form of rows, too: [n, g, f, s] and [n, g, o, s].
            use = call.use(DTYPE)
            every = slice(None)
            inputs = record.inputs.unflatten(2, (use.reading.groups, -1)).permute(0, 2, 3, 1)
            torch.testing.assert_close(use.reading.vectors(every), inputs)
            grouped = record.grouped_signals().permute(0, 2, 3, 1)
            torch.testing.assert_close(use.part(every)[:, k], grouped)
    some, _ = tape.columns((z,), signals, len(x), [calls[0].block.weight])
    assert {call.block.weight for call in some} == {calls[0].block.weight}


def test_what_acted_on_no_batch_has_no_rows_of_its_own() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.head = nn.Linear(2, 3), nn.Linear(3, 3)
            self.register_buffer("table", torch.randn(4, 2, dtype=DTYPE))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + self.map(self.table).sum(0)

    model = Table().to(DTYPE)
    tape, z, signals = recorded(model, torch.randn(5, 3, dtype=DTYPE))
    passes = [SignalPass(tape, (z,), s, 5) for s in signals]
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        explained = explain(passes, parameters)
        rows = batch_rows(passes, parameters)
    assert [layer.weight for layer in explained.layers] == ["head.weight"]
    assert explained.rest == ["map.weight", "map.bias"]
    # Scores by differentiation are right there: every example has the whole table's.
    expected = torch.stack([4 * s[0] for s in signals])
    torch.testing.assert_close(rows.rest["map.bias"], expected)


def test_portions_go_by_bytes_and_are_never_empty() -> None:
    one = problem("linear", "mse")
    tape, z, signals = recorded(one.model, one.x, 5)
    passes = [SignalPass(tape, (z,), s, 5) for s in signals]
    each = tape.column_bytes
    assert [len(held) for held in portions(iter(passes), 2 * each)] == [2, 2, 1]
    assert [len(held) for held in portions(iter(passes), 1)] == [1] * 5
    assert [len(held) for held in portions(iter(passes), 100 * each)] == [5]
    assert list(portions(iter(()), 1)) == []
