"""The Gram product is xᵀx, for every size on either side of the threshold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from natgrad.linalg import accumulate_gram, symmetric_gram
from natgrad.linalg.gram import LEAF

SIZES = st.one_of(st.integers(1, 12), st.integers(LEAF - 2, 3 * LEAF))


@settings(max_examples=25)
@given(n=st.integers(0, 20), d=SIZES, seed=st.integers(0, 100))
def test_gram_equals_the_product(n: int, d: int, seed: int) -> None:
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gram = symmetric_gram(x)
    assert_close(gram, x.T @ x)
    assert_close(gram, gram.T, rtol=0, atol=1e-13)


@settings(max_examples=15)
@given(d=SIZES, decay=st.sampled_from([0.0, 0.95, 1.0]), weight=st.sampled_from([0.05, 1.0, 3.0]))
def test_accumulation(d: int, decay: float, weight: float) -> None:
    x = torch.randn(9, d, dtype=torch.float64)
    start = symmetric_gram(torch.randn(9, d, dtype=torch.float64))
    total = start.clone()
    assert accumulate_gram(total, x, decay, weight) is total
    assert_close(total, decay * start + weight * (x.T @ x))


@pytest.mark.parametrize("d", [3, 2 * LEAF])
def test_old_entries_are_not_read_without_decay(d: int) -> None:
    x = torch.randn(5, d, dtype=torch.float64)
    out = torch.full((d, d), float("nan"), dtype=torch.float64)
    assert symmetric_gram(x, out=out) is out
    assert_close(out, x.T @ x)


@pytest.mark.parametrize("d", [3, 2 * LEAF])
def test_transposed_input_and_other_dtypes(d: int) -> None:
    x = torch.randn(d, 5, dtype=torch.float64).T
    assert_close(symmetric_gram(x), x.T @ x)
    total = torch.zeros(d, d, dtype=torch.float64)
    accumulate_gram(total, x.to(torch.bfloat16))
    assert_close(total, x.to(torch.bfloat16).double().T @ x.to(torch.bfloat16).double())


def test_groups() -> None:
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    assert_close(symmetric_gram(x), x.mT @ x)
    total = torch.ones(3, 5, 5, dtype=torch.float64)
    accumulate_gram(total, x, decay=0.5, weight=2.0)
    assert_close(total, 0.5 + 2 * x.mT @ x)
