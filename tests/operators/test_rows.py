"""Factored rows are the rows that they stand for, in every layout, and their products never form them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import natgrad.operators.layerrows as layerrows
import natgrad.operators.rowgram as rowgram
from natgrad import EmptyError
from natgrad.operators import FactoredRows, ParameterSpace
from natgrad.operators.layerrows import BatchRows, LayerRows, Use
from natgrad.operators.readings import Patches, Positions, Reading, reading_from
from oracle.operators import DTYPE, generator

CPU = torch.device("cpu")
ALL = slice(None)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, generator=generator(seed))


# ---------------------------------------------------------------------------------------------- readings


def readings() -> dict[str, Reading]:
    return {
        "vectors": Positions(randn(5, 1, 4)),
        "positions": Positions(randn(5, 3, 4)),
        "positions in groups": Positions(randn(5, 3, 4), 2),
        "patches": Patches(randn(5, 2, 6, 5), (3, 2), (1, 1), (1, 1)),
        "strided, dilated patches": Patches(randn(5, 2, 8, 7), (2, 3), (2, 3), (3, 1)),
        "patches in groups": Patches(randn(5, 4, 5, 5), (2, 2), (2, 1), (1, 2), 2),
        "patches in time": Patches(randn(5, 2, 1, 6), (1, 3), (1, 2), (1, 1)),
        "patches in space": Patches(randn(5, 4, 4, 5, 3), (2, 1, 2), (1, 2, 1), (2, 1, 1), 2),
        "patches of a view": Patches(randn(5, 3, 12, 5)[:, ::2, 1::2], (2, 2), (1, 1), (1, 1)),
    }


every_reading = pytest.mark.parametrize("name", readings())


@every_reading
def test_vectors_are_what_was_read(name: str) -> None:
    reading = readings()[name]
    if isinstance(reading, Patches):
        convolve = F.conv2d if len(reading.kernel) == 2 else F.conv3d  # by kernels that pick a tap each
        picks = torch.eye(reading.features, dtype=DTYPE).view(reading.features, -1, *reading.kernel)
        picks = picks.repeat(reading.groups, *[1] * (picks.dim() - 1))
        picked = convolve(
            reading.images, picks, dilation=reading.dilation, stride=reading.stride, groups=reading.groups
        )
        expected = picked.view(5, reading.groups, reading.features, -1)
    else:
        expected = reading.values.unflatten(2, (reading.groups, -1)).permute(0, 2, 3, 1)
    found = reading.vectors(ALL)
    assert_close(found, expected)
    assert found.shape == (len(reading), reading.groups, reading.features, reading.positions)
    assert_close(reading.vectors(slice(1, 3)), expected[1:3])


@every_reading
@pytest.mark.parametrize("part", [ALL, slice(1, 4)])
def test_apply_and_gather_are_the_products_with_the_vectors(name: str, part: slice) -> None:
    reading = readings()[name]
    vectors = reading.vectors(part)
    maps = randn(3, reading.groups, 2, reading.features)
    images = reading.apply(maps, part)
    assert_close(images, torch.einsum("ngfs,kgof->nkgos", vectors, maps))
    expected = torch.einsum("nkgos,ngfs->kgof", images, vectors)
    assert_close(reading.gather(images, part), expected)
    by_position = images.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    assert_close(reading.gather(by_position, part), expected)
    assert_close(reading.gather(images.contiguous(), part), expected)


@every_reading
def test_readings_are_copied_converted_and_restored(name: str) -> None:
    reading = readings()[name]
    copy = reading.copied()
    assert torch.equal(copy.vectors(ALL), reading.vectors(ALL))
    assert copy.state()[0].data_ptr() != reading.state()[0].data_ptr()
    single = reading.to(torch.float32, CPU)
    assert_close(single.vectors(ALL), reading.vectors(ALL).float())
    assert torch.equal(reading_from(*reading.state()).vectors(ALL), reading.vectors(ALL))


# -------------------------------------------------------------------------------------------------- rows


def signals_for(
    reading: Reading, columns: int, outputs: int, seed: int, apart: bool
) -> Tensor | tuple[Tensor, ...]:
    """[n, c, g, o, s] laid out as the tape does: a convolution's positions vary fastest, a linear map's slowest."""
    n, g, s = len(reading), reading.groups, reading.positions
    if isinstance(reading, Patches):
        stacked = randn(columns, n, g, outputs, s, seed=seed)
    else:
        stacked = randn(columns, n, s, g, outputs, seed=seed).permute(0, 1, 3, 4, 2)
    if apart:
        return tuple(stacked)
    return Use(reading, tuple(stacked)).stored().signals


def naive(layers: list[LayerRows], rest: dict[str, Tensor], space: ParameterSpace, columns: int) -> Tensor:
    """J, one row after the other from the definition."""
    examples = len(layers[0].uses[0].reading)
    rows = []
    for c, n in itertools.product(range(columns), range(examples)):
        row = {name: torch.zeros(shape, dtype=DTYPE) for name, shape in space.entries}
        for layer in layers:
            for use in layer.uses:
                signal = use.part(ALL)[n, c]
                vectors = use.reading.vectors(ALL)[n]
                if layer.weight is not None:
                    row[layer.weight] += torch.einsum("gos,gfs->gof", signal, vectors).reshape(
                        space.shapes[layer.weight]
                    )
                if layer.bias is not None:
                    row[layer.bias] += use.biased * signal.sum(2).reshape(-1)
        for name, own in rest.items():
            row[name] += own[c, n]
        rows.append(space.flatten(row))
    return torch.stack(rows)


def example(kinds: list[str], columns: int, seed: int, apart: bool = False) -> tuple[FactoredRows, Tensor]:
    """One layer of each kind, one tied over two uses (of which one has no bias), and two explicit parameters."""
    shapes: dict[str, tuple[int, ...]] = {"scale": (), "table": (2, 3)}
    layers = []
    for index, kind in enumerate(kinds):
        reading, outputs = readings()[kind], 2 + index % 2
        names = f"{index}.weight", None if index % 3 == 2 else f"{index}.bias"
        shapes[names[0]] = (reading.groups * outputs, reading.features)
        if names[1] is not None:
            shapes[names[1]] = (reading.groups * outputs,)
        uses = [Use(reading, signals_for(reading, columns, outputs, seed + index, apart))]
        if index == 1:
            other = Positions(randn(5, 2, reading.groups * reading.features, seed=9), reading.groups)
            uses.append(Use(other, signals_for(other, columns, outputs, seed + 50, apart), False))
        layers.append(LayerRows(*names, tuple(uses)))
    space = ParameterSpace(shapes)
    rest = {"scale": randn(columns, 5, seed=seed + 7), "table": randn(columns, 5, 2, 3, seed=seed + 8)}
    batch = BatchRows(columns, 5, tuple(layers), rest, scale=1.5)
    return FactoredRows(space, (batch,)), 1.5 * naive(layers, rest, space, columns)


def check(rows: FactoredRows, J: Tensor) -> None:
    space = rows.space
    assert (len(rows), space.numel) == J.shape
    V, W = randn(3, J.shape[1], seed=1), randn(3, J.shape[0], seed=2)
    assert_close(rows.dense(), J)
    assert_close(rows.matmul(space.unflatten_rows(V)), V @ J.T)
    assert_close(space.flatten_rows(rows.rmatmul(W)), W @ J)
    assert_close(space.flatten_rows(rows.product(space.unflatten_rows(V))), V @ J.T @ J)
    assert_close(rows.gram(), J @ J.T)
    assert_close(rows.covariance(), J.T @ J)
    assert_close(space.flatten(rows.squares()), J.square().sum(0))
    assert {name: tuple(t.shape) for name, t in rows.squares().items()} == space.shapes
    assert rows.matmul(space.unflatten_rows(V[:0])).shape == (0, len(J))
    assert space.flatten_rows(rows.rmatmul(W[:0])).shape == (0, J.shape[1])


@settings(max_examples=25)
@given(
    kinds=st.lists(st.sampled_from(list(readings())), min_size=1, max_size=4),
    columns=st.integers(1, 3),
    seed=st.integers(0, 100),
    apart=st.booleans(),
)
def test_all_answers_are_those_of_the_rows(kinds: list[str], columns: int, seed: int, apart: bool) -> None:
    check(*example(kinds, columns, seed, apart))


KINDS = ["vectors", "positions", "patches in groups", "strided, dilated patches"]


@pytest.mark.parametrize("hadamard", [8, 1e9, -1e9], ids=["counted", "own rows", "pairs"])
@pytest.mark.parametrize("tile", [1, 3, 768])
@pytest.mark.parametrize("own", [1, 2**24])
def test_the_gram_matrix_is_the_same_either_way(
    hadamard: float, tile: int, own: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rowgram, "HADAMARD", hadamard)
    monkeypatch.setattr(rowgram, "TILE", tile)
    monkeypatch.setattr(rowgram, "OWN_ROWS", own)
    rows, J = example(KINDS, 3, 1)
    other, J_other = example(KINDS, 2, 2)
    assert_close(rows.gram(), J @ J.T)
    both = torch.cat([J, J_other])
    assert_close((rows + other).gram(), both @ both.T)


def test_portions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerrows, "PORTION", 1)
    monkeypatch.setattr("natgrad.operators.rows.PORTION", 1)
    check(*example(KINDS, 2, 3))


def test_batches_join_with_their_own_columns_layers_and_scales() -> None:
    first, J_first = example(KINDS[:2], 3, 1)
    second, _ = example(KINDS[:2], 1, 2)
    lean = second.batches[0].restrict(["0.weight", "scale"])  # a batch in which other parameters took no part
    J_second = torch.zeros(5, J_first.shape[1], dtype=DTYPE)
    for name in ("0.weight", "scale"):
        place = first.space.slices[name]
        J_second[:, place] = second.dense()[:, place]
    joined = first.scaled(2.0) + FactoredRows(first.space, (lean,))
    check(joined, torch.cat([2 * J_first, J_second]))
    assert joined.nbytes > first.nbytes


@pytest.mark.parametrize(
    "names", [("1.bias",), ("scale", "0.weight"), ("2.weight", "1.weight", "0.bias"), ("table",)]
)
def test_columns_of_some_parameters(names: tuple[str, ...]) -> None:
    rows, J = example(KINDS, 2, 4)
    chosen = torch.cat([torch.arange(J.shape[1])[rows.space.slices[name]] for name in names])
    check(rows.restrict(names), J[:, chosen])


def test_they_are_saved_and_converted() -> None:
    rows, J = example(KINDS, 2, 5)
    tensors, meta = rows.state()
    assert all(t.is_contiguous() for t in tensors.values())
    check(FactoredRows.from_state(rows.space, tensors, meta), J)
    assert torch.equal(FactoredRows.from_state(rows.space, tensors, meta).gram(), rows.gram())
    single = rows.to(torch.float32, CPU)
    assert single.dtype == torch.float32
    assert_close(single.gram(), (J @ J.T).float(), rtol=1e-4, atol=1e-3)


def test_there_must_be_a_batch() -> None:
    with pytest.raises(EmptyError, match="no rows"):
        FactoredRows(ParameterSpace({"w": (1,)}), ())


def test_a_product_never_forms_the_rows() -> None:
    """Two layers of 2,000 × 2,000 with 100 examples and 10 columns: J would take 16 GiB in float32."""
    size, examples, columns = 2000, 100, 10
    layers = [
        LayerRows(
            f"{k}.weight",
            None,
            (
                Use(
                    Positions(torch.randn(examples, 1, size)),
                    tuple(torch.randn(columns, examples, 1, size, 1)),
                ),
            ),
        ).stored()
        for k in range(2)
    ]
    space = ParameterSpace({f"{k}.weight": (size, size) for k in range(2)})
    rows = FactoredRows(space, (BatchRows(columns, examples, tuple(layers), {}),))
    v = {name: torch.randn(1, *shape) for name, shape in space.entries}
    image = rows.product(v)
    assert_close(sum((v[n] * image[n]).sum() for n in v), rows.matmul(v).square().sum(), rtol=1e-4, atol=1e-4)
    assert_close(rows.gram().trace(), sum(t.sum() for t in rows.squares().values()), rtol=1e-4, atol=1e-4)
