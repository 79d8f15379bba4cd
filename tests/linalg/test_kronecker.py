"""The only vec convention: V = [W b] by rows, and A ⊗ G acts as V ↦ G V A."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from natgrad.linalg import join, kronecker_dense, kronecker_matmul, split

SIZE = st.integers(1, 4)


@settings(max_examples=25)
@given(o=SIZE, i=SIZE, k=SIZE, seed=st.integers(0, 1000))
def test_product_and_dense_matrix_agree(o: int, i: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    A, G = torch.randn(i, i, dtype=torch.float64), torch.randn(o, o, dtype=torch.float64)
    A, V = A + A.T, torch.randn(k, o, i, dtype=torch.float64)
    product = kronecker_matmul(A, G, V)
    assert_close(product, torch.stack([G @ v @ A for v in V]))
    dense = kronecker_dense(A, G)
    assert_close(dense, torch.kron(G, A))
    assert_close(V.flatten(1) @ dense.T, product.flatten(1))


@settings(max_examples=25)
@given(sizes=st.tuples(SIZE, SIZE, SIZE, SIZE), seed=st.integers(0, 1000))
def test_rectangular_factors_in_either_order(sizes: tuple[int, int, int, int], seed: int) -> None:
    p, o, i, j = sizes
    torch.manual_seed(seed)
    A, G, V = (torch.randn(*s, dtype=torch.float64) for s in ((i, j), (p, o), (o, i)))
    assert_close(kronecker_matmul(A, G, V), G @ V @ A)


def test_groups_broadcast() -> None:
    A, G, V = (torch.randn(*s, dtype=torch.float64) for s in ((2, 4, 4), (2, 3, 3), (5, 2, 3, 4)))
    product = kronecker_matmul(A, G, V)
    dense = kronecker_dense(A, G.mT)
    assert dense.shape == (2, 12, 12)
    for k in range(5):
        for g in range(2):
            assert_close(product[k, g], G[g] @ V[k, g] @ A[g])
    assert_close(dense[1], torch.kron(G[1].T.contiguous(), A[1].T.contiguous()))


def test_a_linear_map_with_bias_is_one_matrix() -> None:
    layer = torch.nn.Linear(3, 2).double()
    V = join(layer.weight, layer.bias)
    x = torch.randn(5, 3, dtype=torch.float64)
    assert_close(torch.cat((x, torch.ones(5, 1, dtype=torch.float64)), 1) @ V.T, layer(x))


@pytest.mark.parametrize(("groups", "bias"), [(1, True), (1, False), (2, True), (2, False)])
def test_a_convolution_is_a_linear_map_on_patches(groups: int, bias: bool) -> None:
    layer = torch.nn.Conv2d(4, 6, (2, 3), groups=groups, bias=bias).double()
    x = torch.randn(5, 4, 2, 3, dtype=torch.float64)  # one patch an image
    V = join(layer.weight, layer.bias, groups=groups)
    patches = x.reshape(5, groups, -1)
    if bias:
        patches = torch.cat((patches, torch.ones(5, groups, 1, dtype=torch.float64)), -1)
    assert V.shape == ((groups,) if groups > 1 else ()) + (6 // groups, 24 // groups + bias)
    outputs = torch.einsum("ngi,goi->ngo", patches, V.reshape(groups, *V.shape[-2:]))
    assert_close(outputs.flatten(1), layer(x).flatten(1))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_has_its_inputs_first(groups: int) -> None:
    layer = torch.nn.ConvTranspose1d(4, 6, 3, groups=groups, bias=False).double()
    x = torch.randn(5, 4, 1, dtype=torch.float64)
    V = join(layer.weight, groups=groups, transposed=True).reshape(groups, 6 // groups, 4 // groups, 3)
    outputs = torch.einsum("ngi,goit->ngot", x.reshape(5, groups, -1), V)
    assert_close(outputs.reshape(5, 6, 3), layer(x))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [(), (5,), (2, 5)])
@pytest.mark.parametrize("taps", [(), (3,), (2, 2)])
def test_split_undoes_join(
    transposed: bool, groups: int, bias: bool, batch: tuple[int, ...], taps: tuple[int, ...]
) -> None:
    shape = (6, 2, *taps)
    out = 2 * groups if transposed else 6
    weight = torch.randn(*batch, *shape)
    offset = torch.randn(*batch, out) if bias else None
    V = join(weight, offset, groups=groups, transposed=transposed, batch_dims=len(batch))
    assert V.shape[: len(batch)] == batch
    assert V.ndim == len(batch) + 2 + (groups > 1)
    again, bias_again = split(V, shape, bias=bias, groups=groups, transposed=transposed)
    assert torch.equal(again, weight)
    assert (bias_again is None) if offset is None else torch.equal(bias_again, offset)
