"""`EigenKronecker.power`: any power of the damped operator, against that of the dense matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from natgrad.errors import ConfigError, NotPositiveDefiniteError
from natgrad.operators import EigenKronecker, ParameterSpace
from oracle.operators import DTYPE, eigen, eigen_grouped_convolution, eigen_transposed, generator


@pytest.mark.parametrize(
    "build", [eigen, eigen_grouped_convolution, eigen_transposed], ids=lambda f: f.__name__
)
@settings(max_examples=8)
@given(
    seed=st.integers(0, 1000),
    exponent=st.sampled_from([-1.0, -2 / 3, -0.5, 0.0, 0.5, 1.0, 2.0]),
    damping=st.sampled_from([0.0, 0.3]),
)
def test_it_is_the_power_of_the_matrix(build, seed: int, exponent: float, damping: float) -> None:
    case = build(seed, 3, 2)
    values, vectors = torch.linalg.eigh(case.dense + damping * torch.eye(len(case.dense), dtype=DTYPE))
    expected = (vectors * values.pow(exponent)) @ vectors.T
    assert_close(case.operator.power(exponent, damping).to_dense(), expected)


def test_minus_one_is_the_inverse() -> None:
    operator = eigen(0, 3, 2).operator
    b = torch.randn(operator.space.numel, dtype=DTYPE, generator=generator(1))
    assert_close(operator.power(-1.0, 0.2) @ b, operator.solve(b, 0.2))


def test_a_singular_operator_has_no_negative_power_without_damping() -> None:
    space = ParameterSpace({"fc.weight": (2, 2)})
    singular = EigenKronecker(space, None, None, torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=DTYPE))
    with pytest.raises(NotPositiveDefiniteError):
        singular.power(-0.5)
    assert torch.isfinite(singular.power(-0.5, 1e-3).to_dense()).all()
    assert_close(singular.power(0.5).to_dense(), singular.to_dense())
    with pytest.raises(ConfigError, match="damping"):
        singular.power(0.5, -1.0)
