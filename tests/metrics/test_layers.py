"""Second moments of inputs and signals, and squares of scores, by every way that the cost model may choose."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad.metrics import layers, patches, scores, squares
from natgrad.metrics.layers import Layer
from natgrad.operators.layerrows import Use
from natgrad.operators.readings import Patches, Positions
from natgrad.tape.records import Block

DTYPE = torch.float64

GEOMETRIES = [
    ((2, 4, 5, 6), (2, 3), (1, 1), (1, 1), 1),
    ((3, 4, 7, 6), (3, 2), (2, 1), (1, 2), 2),
    ((2, 2, 6, 7), (2, 2), (2, 3), (2, 1), 1),
    ((2, 3, 1, 9), (1, 3), (1, 2), (1, 2), 3),
]


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE)


def unfolded(x: Tensor, geometry: Any) -> Tensor:
    """[n, groups, f, s], by torch's own im2col."""
    _, kernel, stride, dilation, groups = geometry
    found = F.unfold(x, kernel, dilation=dilation, stride=stride)
    return found.view(len(x), groups, -1, found.shape[-1])


def patches_of(geometry: Any) -> Patches:
    shape, kernel, stride, dilation, groups = geometry
    return Patches(real(*shape), kernel, stride, dilation, groups)


@pytest.mark.parametrize("cheaper", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_moments_of_patches(geometry: Any, cheaper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "_pixels_are_cheaper", lambda _: cheaper)
    monkeypatch.setattr(patches, "CACHED", 50)
    reading = patches_of(geometry)
    vectors = unfolded(reading.images, geometry)
    moments = torch.einsum("ngfs,nghs->gfh", vectors, vectors)
    total = real(*moments.shape)
    before = total.clone()
    patches.add_patch_moments(total, reading, 0.5)
    torch.testing.assert_close(total, 0.5 * before + moments)
    weights = torch.rand(len(reading), dtype=DTYPE)
    expected = torch.einsum("n,ngfs->gf", weights, vectors)
    torch.testing.assert_close(patches.sum_of_patches(reading, weights), expected)


def test_pixels_are_chosen_where_they_cost_less() -> None:
    small = Patches(torch.zeros(512, 6, 12, 12), (5, 5), (1, 1), (1, 1))
    large = Patches(torch.zeros(512, 6, 48, 48), (3, 3), (1, 1), (1, 1))
    few = Patches(torch.zeros(2, 6, 12, 12), (5, 5), (1, 1), (1, 1))
    assert [patches._pixels_are_cheaper(reading) for reading in (small, large, few)] == [True, False, False]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rows_are_the_vectors_with_features_last(geometry: Any) -> None:
    for reading in (patches_of(geometry), Positions(real(5, 3, 8), 2)):
        rows = reading.rows(slice(0, 2))
        torch.testing.assert_close(rows, reading.vectors(slice(0, 2)).permute(1, 0, 3, 2))


def layer(kind: str, passes: int = 2, outputs: int = 3) -> Layer:
    """A layer with random inputs and signals."""
    groups, n = 1, 3
    if kind == "convolution":
        readings = [patches_of(GEOMETRIES[0])]
        n = 2
    elif kind == "grouped convolution":
        readings, groups, outputs = [patches_of(GEOMETRIES[1])], 2, 2
    elif kind == "two uses":
        readings = [Positions(real(n, 2, 4)), Positions(real(n, 3, 4))]
    else:
        readings = [Positions(real(n, 1 if kind == "linear" else 4, 4))]
    uses = []
    for k, reading in enumerate(readings):
        columns = [real(n, groups, outputs, reading.positions) for _ in range(passes)]
        if kind in ("tokens", "two uses"):  # strides as those of a linear map's signals
            columns = [c.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for c in columns]
        uses.append(Use(reading, tuple(columns), biased=k == 0))
    return Layer(Block("w", "b", kind, groups, readings[0].features, outputs), tuple(uses))


KINDS = ["linear", "tokens", "convolution", "grouped convolution", "two uses"]


def homogeneous(use: Use) -> Tensor:
    """[n, groups, f + 1, s]"""
    x = use.reading.vectors(slice(None))
    return torch.cat([x, torch.full_like(x[:, :, :1], float(use.biased))], dim=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_moments_of_inputs(kind: str, reduce: bool, weighted: bool) -> None:
    one = layer(kind)
    a = torch.cat([homogeneous(use) for use in one.uses], dim=3)
    weights = torch.rand(one.examples, dtype=DTYPE) if weighted else None
    w = torch.ones(one.examples, dtype=DTYPE) if weights is None else weights
    if reduce:
        a = a.mean(3, keepdim=True)
    expected = torch.einsum("n,ngis,ngjs->gij", w, a, a)
    total = real(*expected.shape)
    total = total + total.mT
    before = total.clone()
    given = total if one.block.groups > 1 else total[0]
    count = one.add_inputs(given, 0.5, weights, reduce)
    torch.testing.assert_close(total, 0.5 * before + expected)
    assert count == pytest.approx(float(w.sum()) * a.shape[3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize(("weighted", "diagonal"), [(False, False), (True, False), (True, True)])
def test_sums_of_examples_stand_for_them_on_average(
    kind: str, reduce: bool, weighted: bool, diagonal: bool
) -> None:
    """Over all patterns of signs, to the last digits: second moments of inputs and of signals."""
    one = layer(kind)
    if diagonal and one.block.groups > 1:
        pytest.skip("factors of groups are whole")
    n, size, groups = one.examples, one.block.columns, one.block.groups
    weights = torch.rand(n, dtype=DTYPE) if weighted else None
    patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=DTYPE)
    expected = torch.zeros(*(groups,) * (groups > 1), *(size,) * (1 if diagonal else 2), dtype=DTYPE)
    rows = one.add_inputs(expected, 0.0, weights, reduce, diagonal)
    for count, sums in ((1, 1), (2, 2), (n, n)):
        inputs, signals = torch.zeros_like(expected), torch.zeros(1)
        for pattern in patterns:
            sets = layers.SignedSets.of(pattern, count)
            assert len(sets.sums(pattern)) == sums
            assert one.add_inputs(inputs, 1.0, weights, reduce, diagonal, sets) == pytest.approx(rows)
            signals = signals + one.gram_of_signals(reduce, diagonal, sets)
        torch.testing.assert_close(inputs / len(patterns), expected)
        torch.testing.assert_close(signals / len(patterns), one.gram_of_signals(reduce, diagonal))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("reduce", "small"), [(False, 32), (False, 0), (True, 32)])
def test_moments_of_signals(kind: str, reduce: bool, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "SMALL", small)
    one = layer(kind)
    g = torch.cat([torch.stack(layers.columns_of(use), 1) for use in one.uses], dim=4)  # [n, c, g, o, s]
    if reduce:
        g = g.sum(4, keepdim=True)
    expected = torch.einsum("ncgos,ncgps->gop", g, g)
    torch.testing.assert_close(one.gram_of_signals(reduce).view_as(expected), expected)


@pytest.mark.parametrize(("kind", "passes", "chunk"), list(itertools.product(KINDS, (1, 9), (1, 2**19))))
def test_squares_of_scores(kind: str, passes: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squares, "CHUNK", chunk)
    one = layer(kind, passes)
    groups, outputs, columns = one.block.groups, one.block.outputs, one.block.columns
    U_A = torch.linalg.qr(real(groups, columns, columns)).Q
    U_G = torch.linalg.qr(real(groups, outputs, outputs)).Q
    scores = sum(
        torch.einsum("ncgos,ngis->ncgoi", torch.stack(layers.columns_of(use), 1), homogeneous(use))
        for use in one.uses
    )
    expected = (U_G.mT @ scores @ U_A).square().sum((0, 1))
    total = real(*expected.shape)
    before = total.clone()
    squares.add_squares(total, one, U_A, U_G, 0.5)
    torch.testing.assert_close(total, before + 0.5 * expected)


def scores_of(one: Layer) -> Tensor:
    """[n, c, g, o, i]"""
    return sum(
        torch.einsum("ncgos,ngis->ncgoi", torch.stack(layers.columns_of(use), 1), homogeneous(use))
        for use in one.uses
    )


@pytest.mark.parametrize(("kind", "passes", "chunk"), list(itertools.product(KINDS, (1, 3), (1, 2**19))))
def test_partial_traces(kind: str, passes: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "CHUNK", chunk)
    one = layer(kind, passes)
    X = scores_of(one)
    inner, outer = torch.einsum("ncgoi,ncgoj->gij", X, X), torch.einsum("ncgoi,ncgpi->gop", X, X)
    found = scores.partial_traces(one, None)
    torch.testing.assert_close(found, (inner, outer))
    diagonals = [one.diagonal(dim1=-2, dim2=-1) for one in (inner, outer)]
    torch.testing.assert_close(scores.partial_traces(one, None, (True, False)), (diagonals[0], outer))
    torch.testing.assert_close(scores.partial_traces(one, None, (False, True)), (inner, diagonals[1]))


@pytest.mark.parametrize(("kind", "count"), list(itertools.product(KINDS, (1, 2))))
def test_signed_sums_stand_for_scores_on_average(
    kind: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all patterns of signs, to the last digits: partial traces, and squares in a basis."""
    monkeypatch.setattr(scores, "CHUNK", 1)
    one = layer(kind, 2)
    groups, outputs, columns = one.block.groups, one.block.outputs, one.block.columns
    patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2 * one.examples)), dtype=DTYPE)
    sums = torch.cat(list(scores.signed_sums(one, patterns.view(len(patterns), 2, -1), count)), 2)
    assert sums.shape == (len(patterns), groups, count, outputs, columns)
    together = sums.movedim(0, 1).flatten(1, 2)
    inner, outer = (total / len(patterns) for total in scores.partial_traces(one, together))
    torch.testing.assert_close((inner, outer), scores.partial_traces(one, None))
    U_A, U_G = (torch.linalg.qr(real(groups, side, side)).Q for side in (columns, outputs))
    for basis in ((U_A, U_G), (None, U_G), (U_A, None), (None, None)):
        found, expected = (torch.zeros(groups, outputs, columns, dtype=DTYPE) for _ in range(2))
        squares.add_squares(found, together, *basis, 0.5)
        squares.add_squares(expected, one, *basis, 0.5)
        torch.testing.assert_close(found / len(patterns), expected)


def test_signed_sums_pay_where_there_are_fewer_of_them_than_scores() -> None:
    x, g = real(40, 6, 5), real(40, 1, 3, 6)
    block = Block("w", None, "linear", 1, 5, 3)
    many = Layer(block, (Use(Positions(x), (g,), False),))
    single = Layer(block, (Use(Positions(x[:, :1]), (g[..., :1],), False),))
    for count, one, pays in ((8, many, True), (40, many, False), (8, single, False)):
        assert scores.SignedSums(count, torch.Generator()).pay(one) is pays
    sums = scores.SignedSums(8, torch.Generator().manual_seed(0)).of(many, 2)
    assert sums.shape == (2, 1, 8, 3, 5)
    assert not torch.allclose(sums[0], sums[1])


@pytest.mark.parametrize("kind", KINDS)
def test_passes_of_one_batch_are_joined(kind: str) -> None:
    one = layer(kind, 3)
    parts = [
        Layer(one.block, tuple(Use(u.reading, u.signals[cut], u.biased) for u in one.uses))
        for cut in (slice(0, 1), slice(1, 3))
    ]
    whole = parts[0].with_passes_of(parts[1])
    torch.testing.assert_close(whole.gram_of_signals(), one.gram_of_signals())
