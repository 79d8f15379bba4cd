"""The factored inverse equals the dense inverse of the damped Kronecker product, in place and without surprises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from natgrad.errors import ConfigError, NonFiniteError, NotPositiveDefiniteError, VectorError
from natgrad.linalg import Stage
from natgrad.operators import FactoredInverse, Kronecker, ParameterSpace
from oracle.operators import (
    DTYPE,
    Case,
    convolution,
    factored_inverse,
    generator,
    grouped_convolution,
    grouped_transposed_convolution,
    kronecker_block,
    linear,
    linear_transposed,
    linear_with_bias,
    positive_definite,
)

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
SPACE = ParameterSpace({"fc.weight": (3, 4), "fc.bias": (3,)})
MAPS = [
    linear,
    linear_with_bias,
    linear_transposed,
    convolution,
    grouped_convolution,
    grouped_transposed_convolution,
]


def gradient(space: ParameterSpace, seed: int = 0) -> dict[str, torch.Tensor]:
    return space.unflatten(torch.randn(space.numel, dtype=DTYPE, generator=generator(seed)))


def oracle(case: Case, damping: float) -> torch.Tensor:
    """The dense block made of inverses, group by group."""
    operator = case.operator
    assert isinstance(operator, Kronecker)
    groups = operator.A.shape[0] if operator.A.ndim == 3 else 1
    A, G = (t.view(groups, *t.shape[-2:]) for t in (operator.A, operator.G))
    inverses = [factored_inverse(a, g, damping) for a, g in zip(A, G, strict=True)]
    A, G = (torch.stack(side) if groups > 1 else side[0] for side in zip(*inverses, strict=True))
    weight = operator.space.shapes["fc.weight"]
    return kronecker_block(weight, "fc.bias" in operator.space.names, A, G, groups, operator.transposed)


@pytest.mark.parametrize("build", MAPS, ids=lambda f: f.__name__)
@settings(max_examples=8)
@given(
    seed=st.integers(0, 10_000),
    m=st.integers(1, 4),
    n=st.integers(1, 4),
    damping=st.sampled_from([0.0, 0.3, 5.0]),
)
def test_solve_equals_the_dense_inverse(build, seed: int, m: int, n: int, damping: float) -> None:
    case = build(seed, m, n)
    space = case.operator.space
    b = gradient(space, seed)
    inverse = case.operator.factored(damping)
    x = inverse.solve(b)
    assert list(x) == list(space.names)
    assert all(t.is_contiguous() for t in x.values())
    assert_close(space.flatten(x), oracle(case, damping) @ space.flatten(b), **TIGHT)
    if damping == 0:  # then nothing is approximated
        assert_close(space.flatten(x), case.operator.solve(space.flatten(b)), **TIGHT)


@pytest.mark.parametrize("build", MAPS, ids=lambda f: f.__name__)
def test_refresh_is_in_place_and_equals_a_new_inverse(build) -> None:
    first, second = build(0, 3, 2).operator, build(1, 3, 2).operator
    space = second.space if second.space == first.space else first.space
    second = second if second.space == first.space else first
    b = gradient(space)
    inverse = first.factored(0.1)
    inverse.solve(b)
    pointers = inverse.A_inverse.data_ptr(), inverse.G_inverse.data_ptr()
    assert inverse.refresh(second.A, second.G, 0.7) == {"A": Stage.CHOLESKY, "G": Stage.CHOLESKY}
    assert (inverse.A_inverse.data_ptr(), inverse.G_inverse.data_ptr()) == pointers
    fresh = second.factored(0.7)
    assert torch.equal(space.flatten(inverse.solve(b)), space.flatten(fresh.solve(b)))
    assert_close(inverse.pi, fresh.pi)


@pytest.mark.parametrize("build", MAPS, ids=lambda f: f.__name__)
def test_out_is_written_and_results_do_not_alias(build) -> None:
    operator = build(0, 3, 2).operator
    inverse = operator.factored(0.1)
    b = gradient(operator.space)
    first = inverse.solve(b)
    kept = {name: t.clone() for name, t in first.items()}
    inverse.solve({name: 2 * t for name, t in b.items()})
    out = {name: torch.full_like(t, float("nan")) for name, t in b.items()}
    written = inverse.solve(b, out=out)
    for name in b:
        assert torch.equal(first[name], kept[name])
        assert written[name] is out[name]
        assert torch.equal(out[name], kept[name])


def test_strides_and_dtypes_of_the_gradient_do_not_matter() -> None:
    operator = convolution(0, 3, 2).operator
    b = gradient(operator.space)
    inverse = operator.factored(0.1)
    expected = operator.space.flatten(inverse.solve(b))
    channels_last = b | {"fc.weight": b["fc.weight"].to(memory_format=torch.channels_last)}
    assert_close(operator.space.flatten(inverse.solve(channels_last)), expected, **TIGHT)
    halves = inverse.solve({name: t.float() for name, t in b.items()})
    assert {t.dtype for t in halves.values()} == {torch.float32}
    assert_close(operator.space.flatten(halves).double(), expected, rtol=1e-5, atol=1e-6)


def test_one_group_is_no_group() -> None:
    source = generator(0)
    A, G = positive_definite(5, source), positive_definite(3, source)
    b = gradient(SPACE)
    plain, grouped = Kronecker(SPACE, A, G), Kronecker(SPACE, A[None], G[None])
    assert torch.equal(plain.to_dense(), grouped.to_dense())
    assert torch.equal(plain.sample(2, generator=generator(1)), grouped.sample(2, generator=generator(1)))
    inverse = FactoredInverse(SPACE, A[None], G[None], 0.3)
    assert_close(SPACE.flatten(inverse.solve(b)), SPACE.flatten(plain.factored(0.3).solve(b)), **TIGHT)


def test_pi_shares_the_damping_by_mean_eigenvalue() -> None:
    source = generator(0)
    A, G = positive_definite(5, source), positive_definite(3, source)
    expected = math.sqrt(float(A.trace() / 5) / float(G.trace() / 3))
    inverse = FactoredInverse(SPACE, A, G, 0.3)
    assert float(inverse.pi) == pytest.approx(expected)
    # A ⊗ G does not change when a constant moves from one factor to the other; nor does its inverse.
    b = gradient(SPACE)
    moved = FactoredInverse(SPACE, 100 * A, G / 100, 0.3)
    assert_close(SPACE.flatten(moved.solve(b)), SPACE.flatten(inverse.solve(b)), **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, DTYPE])
@pytest.mark.parametrize("tiny", [0.0, 1e-44])
def test_a_dead_layer_gets_the_damping_alone(tiny: float, dtype: torch.dtype) -> None:
    """G = 0, or so small that π is out of range: (λI)⁻¹ and no NaN."""
    A = positive_definite(5, generator(0)).to(dtype)
    G = tiny * torch.eye(3, dtype=dtype)
    b = {name: t.to(dtype) for name, t in gradient(SPACE).items()}
    for one, other in ((A, G), (torch.zeros_like(A), torch.eye(3, dtype=dtype))):
        inverse = FactoredInverse(SPACE, one, other, 0.25)
        x = SPACE.flatten(inverse.solve(b))
        assert torch.isfinite(x).all()
    assert torch.isfinite(SPACE.flatten(FactoredInverse(SPACE, A, G, 0.25).solve(b))).all()
    nothing = FactoredInverse(SPACE, 0 * A, 0 * G, 0.25)
    assert float(nothing.pi) == 1.0
    assert_close(SPACE.flatten(nothing.solve(b)), SPACE.flatten(b) / 0.25)


def test_a_failed_refresh_leaves_the_old_inverses() -> None:
    source = generator(0)
    A, G = positive_definite(5, source), positive_definite(3, source)
    inverse = FactoredInverse(SPACE, A, G, 0.3)
    b = gradient(SPACE)
    before = SPACE.flatten(inverse.solve(b))
    nan = G.clone()
    nan[2, 1] = nan[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="factor G of fc"):
        inverse.refresh(2 * A, nan, 0.3)
    with pytest.raises(NotPositiveDefiniteError, match="factor G of fc"):
        inverse.refresh(2 * A, G - 10 * torch.eye(3, dtype=DTYPE), 0.3)
    with pytest.raises(ConfigError, match="damping is -1"):
        inverse.refresh(2 * A, G, -1.0)
    with pytest.raises(ConfigError, match="don't fit fc"):
        inverse.refresh(A[1:, 1:], G, 0.3)
    assert torch.equal(SPACE.flatten(inverse.solve(b)), before)


def test_the_stage_is_reported() -> None:
    ones = torch.ones(5, 5)
    inverse = FactoredInverse(SPACE, ones, torch.eye(3), 0.0)
    assert inverse.stages == {"A": Stage.MORE_DAMPING, "G": Stage.CHOLESKY}


def test_a_vector_of_another_space() -> None:
    inverse = FactoredInverse(SPACE, torch.eye(5), torch.eye(3), 0.1)
    with pytest.raises(VectorError, match=r"lacks 'fc\.bias'"):
        inverse.solve({"fc.weight": torch.zeros(3, 4)})


def test_a_solve_takes_no_part_in_autograd() -> None:
    inverse = FactoredInverse(SPACE, torch.eye(5), torch.eye(3), 0.1)
    b = {name: torch.ones(shape, requires_grad=True) for name, shape in SPACE.entries}
    assert not any(t.requires_grad for t in inverse.solve(b).values())
