"""Which axis holds the examples: rows are an example's wherever positions stand, or an error says what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad.errors import OutputError
from natgrad.tape import Tape
from natgrad.tape.axes import Axis, candidates
from oracle import fisher as oracle

DTYPE = torch.float64
MSE = nn.MSELoss()


class Stack(nn.Module):
    """Linear layers over tokens, which are given to the model as [N, T, 3]."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        self.drop = nn.Dropout(0.5 if how == "dropout" else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        N, T = x.shape[:2]
        if self.how == "batch-first":
            return self.tokens(x)
        if self.how == "flattened":
            return self.tokens(x.flatten(0, 1)).unflatten(0, (N, T))
        if self.how == "flattened-positions-first":
            return self.tokens(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (T, N)).transpose(0, 1)
        if self.how == "stacked":
            return self.tokens(torch.stack(list(x.unbind(1)))).transpose(0, 1)
        if self.how == "concatenated":
            return torch.stack(self.tokens(torch.cat(list(x.unbind(1)))).chunk(T), 1)
        if self.how == "examples-third":
            return self.tokens(x.permute(1, 0, 2)[None]).squeeze(0).transpose(0, 1)
        if self.how == "first-layer":
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x.transpose(0, 1))).transpose(0, 1))))
        found = self.tokens(x.transpose(0, 1))
        return found if self.how == "outputs-too" else found.transpose(0, 1)

    def tokens(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(self.drop(torch.tanh(self.a(x))))))


SIZES = {"equal": (3, 3), "twice": (2, 4), "half": (4, 2), "coprime": (3, 4)}  # (N, T)
RIGHT = (
    "batch-first", "flattened", "flattened-positions-first", "stacked", "concatenated", "examples-third",
    "first-layer", "positions-first",
)  # fmt: skip


def problem(how: str, sizes: tuple[int, int]) -> tuple[Stack, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Stack(how).to(DTYPE)
    return model, torch.randn(*sizes, 3, dtype=DTYPE), torch.randn(*sizes, 2, dtype=DTYPE)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("how", RIGHT)
@pytest.mark.parametrize("metric", ["dense", "exact"])
def test_rows_are_an_examples_wherever_positions_stand(metric: str, how: str, sizes: tuple[int, int]) -> None:
    model, x, y = problem(how, sizes)
    expected = oracle.empirical(model, MSE, x, y)
    found = natgrad.fisher(model, MSE, (x, y), metric, "empirical")
    torch.testing.assert_close(found.to_dense(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", ["ekfac", "kfac", "block", "diagonal"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_positions_first_and_examples_first_are_one_model_to_the_optimiser(
    metric: str, sizes: tuple[int, int]
) -> None:
    ends = []
    for how in ("batch-first", "positions-first"):
        model, x, y = problem(how, sizes)
        optimiser = natgrad.NaturalGradient(model, MSE, lr=0.1, metric=metric, damping=1e-2)
        for _ in range(2):
            optimiser.zero_grad()
            MSE(model(x), y).backward()
            optimiser.step()
        ends.append(oracle.parameters(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_outputs_with_positions_first_are_refused_before_a_parameter_moves(sizes: tuple[int, int]) -> None:
    model, x, y = problem("outputs-too", sizes)
    before = oracle.parameters(model).clone()
    optimiser = natgrad.NaturalGradient(model, MSE, lr=0.1, metric="exact")
    with pytest.raises(OutputError, match="transpose"):
        MSE(model(x), y.transpose(0, 1)).backward()
        optimiser.step()
    assert torch.equal(oracle.parameters(model), before)
    with pytest.raises(OutputError, match="transpose"):
        natgrad.fisher(model, MSE, [(x, y.transpose(0, 1))], "exact", "empirical")


def test_only_shapes_that_leave_it_open_cost_two_passes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape, runs in (((4, 3), 1), ((4, 3, 3), 1), ((2, 4, 3), 3)):
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(DTYPE)
        calls: list[int] = []
        model[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        x = torch.randn(*shape, dtype=DTYPE)
        optimiser = natgrad.NaturalGradient(model, MSE, lr=0.1, metric="kfac")
        for _ in range(3):
            optimiser.zero_grad()
            MSE(model(x), torch.zeros(*shape[:-1], 2, dtype=DTYPE)).backward()
            optimiser.step()
        assert len(calls) == 2 + runs, shape


def test_dropout_hides_nothing_and_modes_are_left_as_they_were() -> None:
    model, x, y = problem("dropout", (3, 3))
    model.drop.eval()
    optimiser = natgrad.NaturalGradient(model, MSE, lr=0.1, metric="exact")
    MSE(model(x), y).backward()
    optimiser.step()
    assert model.training
    assert not model.drop.training
    model.train()
    optimiser = natgrad.NaturalGradient(model, MSE, lr=0.1, metric="exact")
    MSE(model(x), y).backward()
    optimiser.step()
    assert not any(row.reason for row in optimiser.coverage().rows)


def test_a_layer_of_what_all_examples_share_is_not_taken_for_the_batchs() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.table = nn.Linear(3, 2), torch.randn(4, 3, dtype=DTYPE)

        def forward(self, x: Tensor) -> Tensor:  # [2, 4, 2]
            return x * torch.tanh(self.map(self.table))

    torch.manual_seed(0)
    model, x = Queries().to(DTYPE), torch.randn(2, 4, 2, dtype=DTYPE)
    y = torch.randn_like(x)
    expected = oracle.empirical(model, MSE, x, y)
    found = natgrad.fisher(model, MSE, (x, y), "dense", "empirical").to_dense()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Dispatched(nn.Module):
    """Experts that are handed some tokens each, as many as there are examples; or all tokens."""

    def __init__(self, routed: bool) -> None:
        super().__init__()
        self.experts, self.head, self.routed = nn.Parameter(torch.randn(2, 3, 4)), nn.Linear(4, 2), routed

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 3]
        if not self.routed:
            return self.head(torch.tanh(torch.einsum("btd,edf->betf", x, self.experts)).sum((1, 2)))
        tokens = x.flatten(0, 1)
        chosen = tokens.sum(1).argsort()[: 2 * len(x)].view(2, -1)
        made = torch.bmm(tokens[chosen], self.experts)
        spread = made.new_zeros(len(tokens), 4).index_add(0, chosen.flatten(), made.flatten(0, 1))
        return self.head(torch.tanh(spread.view(len(x), -1, 4)).sum(1))


@pytest.mark.parametrize("routed", [True, False])
def test_tokens_that_were_handed_out_are_not_taken_for_examples(routed: bool) -> None:
    torch.manual_seed(0)
    model, x, y = (
        Dispatched(routed).to(DTYPE),
        torch.randn(4, 3, 3, dtype=DTYPE),
        torch.randn(4, 2, dtype=DTYPE),
    )
    F = natgrad.fisher(model, MSE, [(x, y)], metric="dense")
    torch.testing.assert_close(F.to_dense(), oracle.fisher(model, MSE, x, y))
    optimizer = natgrad.NaturalGradient(model, MSE, lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MSE(model(x), y).backward()
        optimizer.step()
    assert [row.name for row in optimizer.coverage().rows if row.reason] == ["experts"] * routed
    assert any("experts" in str(w.message) for w in caught) == routed


class Words(nn.Module):
    """A time-first transformer's layer, of which nothing but lookups, norms and attention says where examples are."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(7, 4), nn.Parameter(torch.randn(8, 1, 4))
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0) if whole else nn.LayerNorm(4)

    def forward(self, words: Tensor) -> Tensor:  # [N, T]
        x = self.table(words.t())
        return self.layer(x + self.place[: len(x)]).mean(0)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("whole", [True, False])
def test_what_acts_entry_by_entry_on_positions_first_is_not_taken_for_examples(
    whole: bool, sizes: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    model, words = Words(whole).to(DTYPE), torch.randint(7, sizes)
    y = torch.randn(len(words), 4, dtype=DTYPE)
    expected = oracle.empirical(model, MSE, words, y)
    found = natgrad.fisher(model, MSE, (words, y), "dense", "empirical").to_dense()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_candidates_are_axes_that_examples_divide() -> None:
    assert candidates((4, 3), 4) == [Axis(0)]
    assert candidates((8, 3), 4) == [Axis(0), Axis(0, True)]
    assert candidates((4, 4), 4) == [Axis(0), Axis(1)]
    assert candidates((3, 5), 4) == []


def test_a_twin_of_a_tape_hears_the_same_parameters() -> None:
    model = nn.Linear(3, 2)
    tape = Tape(dict(model.named_parameters()))
    build: Callable[[], Tape] = tape.twin
    with build().recording() as twin:
        model(torch.ones(1, 3))
    assert [call.block.weight for call in twin.calls] == ["weight"]
