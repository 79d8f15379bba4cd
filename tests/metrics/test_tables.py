"""Tables that are looked up, tied weights, and sides that are too long for a matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import natgrad
from natgrad import EKFAC, KFAC, ConfigError, Diagonal
from natgrad.metrics import Metric
from natgrad.metrics.factors import check_sides
from oracle import fisher as oracle

DTYPE = torch.float64
N, WORDS, D, C = 6, 7, 3, 4
CE = nn.CrossEntropyLoss()
LAYERWISE = [KFAC(kind="exact"), EKFAC(kind="exact"), Diagonal(kind="exact")]


class Lookup(nn.Module):
    """Words are looked up, or multiplied as one-hot vectors: the same map, and the same parameters."""

    def __init__(self, one_hot: bool, positions: int = 1) -> None:
        super().__init__()
        self.one_hot = one_hot
        self.table, self.head = nn.Parameter(torch.randn(WORDS, D)), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        if self.one_hot:
            hidden = F.linear(F.one_hot(x, WORDS).to(self.table.dtype), self.table)
        else:
            hidden = F.embedding(x, self.table)
        return self.head(torch.tanh(hidden).sum(1))


class OneHot(Lookup):
    """The same with the table stored as a linear map's weight."""

    def __init__(self, like: Lookup) -> None:
        super().__init__(True)
        self.load_state_dict(like.state_dict())
        self.table = nn.Parameter(like.table.detach().mT.clone())


class Tied(nn.Module):
    """A table that is the last linear map too."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, D)
        self.bias = nn.Parameter(torch.randn(WORDS)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.table(x).sum(1)), self.table.weight, self.bias)


def words(positions: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    x = torch.randint(WORDS, (N, positions), generator=source)
    return x, torch.randint(C, (N,), generator=source)


def twins(positions: int) -> tuple[Lookup, OneHot, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Lookup(False).to(DTYPE)
    return model, OneHot(model).to(DTYPE), *words(positions)


def as_map(operator: natgrad.LinearOperator) -> Tensor:
    """A matrix on a table [words, features], in the order of its transpose."""
    order = torch.arange(operator.space.numel)
    order[: WORDS * D] = order[: WORDS * D].view(WORDS, D).mT.flatten()
    return operator.to_dense()[order[:, None], order]


@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("metric", LAYERWISE)
def test_a_lookup_is_the_linear_map_of_one_hot_vectors(
    metric: Metric, positions: int, show: Callable
) -> None:
    model, twin, x, y = twins(positions)
    shown, other = show(metric, model, CE), show(metric, twin, CE)
    for step in range(2):
        shown.observe(x.roll(step), y, step)
        other.observe(x.roll(step), y, step)
    torch.testing.assert_close(as_map(shown.estimate.operator()), other.dense())
    g = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    solved = shown.estimate.solve(g, 0.1, 2)
    same = other.estimate.solve(g | {"table": g["table"].mT}, 0.1, 2)
    torch.testing.assert_close(solved["table"], same["table"].mT)
    torch.testing.assert_close(solved["head.weight"], same["head.weight"])


@pytest.mark.parametrize("model", [lambda: Lookup(False), Tied, lambda: Tied(False)])
@pytest.mark.parametrize("metric", ["dense", "gram", "diagonal", "block"])
def test_exact_metrics_have_the_exact_table(metric: str, model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net, (x, y) = model().to(DTYPE), words(3)
    expected = oracle.fisher(net, CE, x, y)
    found = natgrad.fisher(net, CE, (x, y), metric)
    torch.testing.assert_close(found.diagonal(), expected.diagonal())
    if metric in ("dense", "gram"):
        torch.testing.assert_close(found.to_dense(), expected)


def test_several_lookups_of_one_word_in_an_example_are_one_score(show: Callable) -> None:
    model, _, _, y = twins(1)
    x = torch.tensor([[1, 1, 2], [3, 3, 3], [0, 1, 2], [4, 5, 6], [1, 2, 1], [0, 0, 0]])
    shown = show(EKFAC(kind="exact"), model, CE)
    shown.observe(x, y)
    expected = oracle.fisher(model, CE, x, y).trace()
    torch.testing.assert_close(shown.estimate.operator().trace(), expected)


def test_padding_has_no_score(show: Callable) -> None:
    torch.manual_seed(0)
    model, (x, y) = Lookup(False).to(DTYPE), words(3)
    model.forward = lambda x: model.head(torch.tanh(F.embedding(x, model.table, padding_idx=2)).sum(1))
    for metric in LAYERWISE:
        shown = show(metric, model, CE)
        shown.observe(x, y)
        assert not shown.estimate.operator().diagonal()[: WORDS * D].view(WORDS, D)[2].any()


@pytest.mark.parametrize("largest", [8192, WORDS - 1])
def test_a_tied_weight_has_the_factors_of_both_uses(largest: int, show: Callable) -> None:
    torch.manual_seed(0)
    model, (x, y) = Tied(bias=False).to(DTYPE), words(3)
    shown = show(KFAC(kind="exact", largest=largest), model, CE)
    shown.observe(x, y)
    (factors,) = shown.estimate._blocks.values()
    (A, G), (B, H) = (part.averages() for part in factors.parts)
    if largest < WORDS:
        assert (G.ndim, H.ndim) == (1, 1)
        G = G.diag()
    H = H.diag()
    total = A.trace() * G.trace() + B.trace() * H.trace()
    expected = torch.kron(G * A.trace() + H * B.trace(), (A * G.trace() + B * H.trace()) / total)
    torch.testing.assert_close(shown.dense(), expected)
    # The partial traces of the product are those of the sum.
    both = (torch.kron(G, A) + torch.kron(H, B)).view(WORDS, D, WORDS, D)
    found = shown.dense().view(WORDS, D, WORDS, D)
    for partial in ("vdwd->vw", "vdve->de"):
        torch.testing.assert_close(torch.einsum(partial, found), torch.einsum(partial, both))
    assert shown.tape.covers("table.weight")


@pytest.mark.parametrize("largest", [8192, WORDS - 1])
def test_ekfac_of_a_tied_weight_has_the_trace_of_both_uses(largest: int, show: Callable) -> None:
    torch.manual_seed(0)
    model, (x, y) = Tied().to(DTYPE), words(3)
    shown = show(EKFAC(kind="exact", largest=largest), model, CE)
    shown.observe(x, y)
    apart = nn.Module()
    apart.table, apart.weight, apart.bias = (
        nn.Parameter(p.detach().clone()) for p in (model.table.weight, model.table.weight, model.bias)
    )
    apart.forward = lambda x: F.linear(
        torch.tanh(F.embedding(x, apart.table).sum(1)), apart.weight, apart.bias
    )
    torch.testing.assert_close(shown.estimate.operator().trace(), oracle.fisher(apart, CE, x, y).trace())


def network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, C)).to(DTYPE)
    return model, torch.randn(N, 2, dtype=DTYPE), torch.randint(C, (N,))


def convolution() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 5, 2), nn.Tanh(), nn.Flatten(), nn.Linear(10, C)).to(DTYPE)
    return model, torch.randn(N, 2, 3, dtype=DTYPE), torch.randint(C, (N,))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("build", [network, convolution])
@pytest.mark.parametrize(
    ("largest", "sides"),
    [(1, "both"), (4, "both"), (5, "both"), (None, "inputs"), (None, "outputs"), (4, "inputs")],
)
def test_a_side_that_is_too_long_or_left_out_has_its_diagonal(
    largest: int | None, sides: str, build: Callable, sharing: str, show: Callable
) -> None:
    model, x, y = build()
    capped = show(KFAC(kind="exact", sharing=sharing, largest=largest, sides=sides), model, CE)
    whole = show(KFAC(kind="exact", sharing=sharing, largest=None), model, CE)
    for shown in (capped, whole):
        shown.observe(x, y)
        shown.observe(x + 1, y, 1)
    g = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    expected, solved = [], {}
    for block in whole.estimate.operator().blocks:
        A, G = (
            factor if sides in ("both", own) and len(factor) <= (largest or 99) else factor.diagonal().diag()
            for factor, own in ((block.A, "inputs"), (block.G, "outputs"))
        )
        own = natgrad.operators.Kronecker(block.space, A, G)
        expected.append(own.to_dense())
        solved |= own.factored(0.3).solve({name: g[name] for name in block.space.names})
    torch.testing.assert_close(capped.dense(), torch.block_diag(*expected))
    torch.testing.assert_close(capped.estimate.solve(g, 0.3, 1), solved)


@pytest.mark.parametrize("build", [network, convolution])
@pytest.mark.parametrize(
    ("largest", "sides"),
    [(1, "both"), (4, "both"), (5, "both"), (99, "inputs"), (99, "outputs"), (4, "inputs")],
)
def test_ekfac_has_the_exact_diagonal_in_a_basis_that_is_in_part_the_coordinates(
    largest: int, sides: str, build: Callable, show: Callable
) -> None:
    model, x, y = build()
    metric = EKFAC(kind="exact", largest=largest, sides=sides)
    shown = show(metric, model, CE)
    shown.observe(x, y)
    F_exact = oracle.fisher(model, CE, x, y)
    start = 0
    for block in shown.estimate.operator().blocks:
        size = block.space.numel
        own = F_exact[start : start + size, start : start + size]
        start += size
        torch.testing.assert_close(block.trace(), own.trace())
        flipped = natgrad.operators.EigenKronecker(
            block.space, block.U_A, block.U_G, torch.ones_like(block.values)
        )
        torch.testing.assert_close(flipped.to_dense(), torch.eye(size, dtype=DTYPE))
        assert (block.U_A is None) == (sides == "outputs" or block.values.shape[1] > largest)
        assert (block.U_G is None) == (sides == "inputs" or block.values.shape[0] > largest)
        if block.U_A is block.U_G is None:
            torch.testing.assert_close(block.diagonal(), own.diagonal())
    again = show(metric, model, CE).estimate
    again.load_state_dict(shown.estimate.state_dict())
    torch.testing.assert_close(again.operator().to_dense(), shown.dense(), rtol=0, atol=0)


def test_a_bound_below_one_is_refused() -> None:
    for metric in (KFAC, EKFAC):
        with pytest.raises(ConfigError, match="largest=0"):
            metric(largest=0)


@pytest.mark.parametrize("metric", [KFAC, EKFAC])
def test_grouped_maps_keep_both_sides(metric: type, show: Callable) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, C)).to(DTYPE)
    x, y = torch.randn(N, 4, 3, dtype=DTYPE), torch.randint(C, (N,))
    one_sided, both = (show(metric(kind="exact", sides=sides), model, CE) for sides in ("inputs", "both"))
    for shown in (one_sided, both):
        shown.observe(x, y)
    numbers = sum(p.numel() for p in model[0].parameters())
    found, expected = (shown.dense() for shown in (one_sided, both))
    torch.testing.assert_close(found[:numbers, :numbers], expected[:numbers, :numbers])
    assert not torch.allclose(found, expected)


def test_an_unknown_side_is_refused() -> None:
    with pytest.raises(ConfigError, match="'inputs' or 'outputs'"):
        check_sides("input")  # under pytest a metric's types are checked before it looks itself
