"""The laws of design.md for every representation: an operator is the dense matrix that its definition gives."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from natgrad.linalg.stochastic import Estimated
from natgrad.operators import LinearOperator, load_operator
from oracle.operators import CASES, DTYPE, Case, generator, submatrix

TIGHT = {"rtol": 1e-9, "atol": 1e-9}

every_kind = pytest.mark.parametrize("kind", CASES)
draws = given(seed=st.integers(0, 10_000), m=st.integers(1, 4), n=st.integers(1, 4))
few = settings(max_examples=8)


def vectors(case: Case, seed: int, k: int = 3) -> torch.Tensor:
    return torch.randn(len(case.dense), k, dtype=DTYPE, generator=generator(seed + 77))


def eye(case: Case) -> torch.Tensor:
    return torch.eye(len(case.dense), dtype=DTYPE)


@every_kind
@few
@draws
def test_agrees_with_the_dense_matrix(kind: str, seed: int, m: int, n: int) -> None:
    case = CASES[kind](seed, m, n)
    assert case.operator.shape == case.dense.shape
    assert_close(case.operator.to_dense(), case.dense, **TIGHT)
    assert_close(case.operator @ eye(case), case.dense, **TIGHT)


@every_kind
@few
@draws
def test_is_symmetric_and_positive(kind: str, seed: int, m: int, n: int) -> None:
    case = CASES[kind](seed, m, n)
    x, y = vectors(case, seed, 2).unbind(1)
    assert_close((case.operator @ x) @ y, x @ (case.operator @ y), **TIGHT)
    assert x @ (case.operator @ x) >= 0


@every_kind
@pytest.mark.parametrize("damping", [0.0, 0.7])
@few
@draws
def test_solve_inverts(kind: str, damping: float, seed: int, m: int, n: int) -> None:
    case = CASES[kind](seed, m, n)
    b = vectors(case, seed)
    x = case.operator.solve(b, damping=damping)
    assert_close(case.operator @ x + damping * x, b, **TIGHT)
    assert_close(x, torch.linalg.solve(case.dense + damping * eye(case), b), **TIGHT)
    assert_close(case.operator.damped(damping).solve(b), x, **TIGHT)


@every_kind
@few
@draws
def test_scalars_agree_with_the_dense_matrix(kind: str, seed: int, m: int, n: int) -> None:
    case = CASES[kind](seed, m, n)
    operator, dense = case.operator, case.dense
    assert_close(operator.trace(), dense.trace(), **TIGHT)
    assert_close(operator.diagonal(), dense.diagonal(), **TIGHT)
    assert_close(operator.logdet(), dense.logdet(), **TIGHT)
    assert_close(operator.logdet(damping=0.4), (dense + 0.4 * eye(case)).logdet(), **TIGHT)
    eigenvalues = torch.linalg.eigvalsh(dense).flip(0)
    assert_close(operator.eigenvalues(), eigenvalues, **TIGHT)
    assert_close(operator.eigenvalues(k=1), eigenvalues[:1], **TIGHT)


@every_kind
def test_every_kind_of_vector_comes_back_as_it_came(kind: str) -> None:
    case = CASES[kind](3, 3, 2)
    operator, space = case.operator, case.operator.space
    block = vectors(case, 3)
    named = [space.unflatten(v) for v in block.unbind(1)]
    for of in (
        lambda v: operator @ v,
        operator.solve,
        lambda v: operator.solve(v, damping=0.2),
        lambda v: operator.natural_gradient(v, damping=0.2),
        operator.pinv_solve,
        operator.sqrt_matmul,
        lambda v: operator.sqrt_matmul(v, damping=0.2),
    ):
        columns = of(block)
        assert columns.shape == block.shape
        for k in range(block.shape[1]):
            assert_close(of(block[:, k]), columns[:, k], **TIGHT)
            result = of(named[k])
            assert list(result) == list(space.names)
            assert {name: tuple(t.shape) for name, t in result.items()} == space.shapes
            assert_close(space.flatten(result), columns[:, k], **TIGHT)
    assert (operator @ block[:, :0]).shape == (len(case.dense), 0)


@every_kind
@few
@draws
def test_the_metric(kind: str, seed: int, m: int, n: int) -> None:
    case = CASES[kind](seed, m, n)
    operator, space = case.operator, case.operator.space
    block = vectors(case, seed, 4)
    u, v = block[:, 0], block[:, 1]
    inner = u @ case.dense @ v
    assert_close(operator.inner(u, v), inner, **TIGHT)
    assert_close(operator.inner(space.unflatten(u), v), inner, **TIGHT)
    assert_close(operator.norm(u), (u @ case.dense @ u).sqrt(), **TIGHT)
    assert_close(operator.norm(space.unflatten(u)), operator.norm(u), **TIGHT)
    assert_close(operator.kl(u), 0.5 * u @ case.dense @ u, **TIGHT)
    assert_close(operator.kl(space.unflatten(u)), operator.kl(u), **TIGHT)
    assert_close(operator.kl(block), 0.5 * (block * (case.dense @ block)).sum(0), **TIGHT)
    cosine = inner / operator.norm(u) / operator.norm(v)
    assert_close(operator.angle(u, v).cos(), cosine, **TIGHT)
    assert_close(operator.angle(space.unflatten(u), space.unflatten(v)), operator.angle(u, v), **TIGHT)
    # Blocks go column by column; one vector goes with every column.
    left, right = block[:, :2], block[:, 2:]
    for of in (operator.inner, operator.angle):
        assert_close(of(left, right), torch.stack([of(left[:, k], right[:, k]) for k in (0, 1)]), **TIGHT)
        assert_close(of(left, v), torch.stack([of(left[:, k], v) for k in (0, 1)]), **TIGHT)
    assert_close(operator.norm(left), torch.stack([operator.norm(left[:, k]) for k in (0, 1)]), **TIGHT)


@every_kind
def test_angles_near_zero_and_pi_keep_their_digits(kind: str) -> None:
    case = CASES[kind](5, 3, 2)
    u, w = vectors(case, 5, 2).unbind(1)
    w = w - u * (case.operator.inner(u, w) / case.operator.inner(u, u))  # at a right angle to u
    assert_close(case.operator.angle(u, w), torch.tensor(math.pi / 2, dtype=DTYPE), **TIGHT)
    slope = 1e-9 * case.operator.norm(w) / case.operator.norm(u)
    assert_close(case.operator.angle(u, u + 1e-9 * w), slope, rtol=1e-5, atol=0)
    assert_close(math.pi - case.operator.angle(u, -u - 1e-9 * w), slope, rtol=1e-5, atol=1e-15)
    assert case.operator.angle(u, 3 * u) < 1e-12


@every_kind
@few
@draws
def test_sums_and_multiples(kind: str, seed: int, m: int, n: int) -> None:
    case, other = CASES[kind](seed, m, n), CASES[kind](seed + 1, m, n)
    b = vectors(case, seed)
    scaled = 2.5 * case.operator
    assert_close(scaled.to_dense(), 2.5 * case.dense, **TIGHT)
    assert_close((case.operator * 2.5) @ b, 2.5 * case.dense @ b, **TIGHT)
    assert_close(scaled.solve(b, 0.1), torch.linalg.solve(2.5 * case.dense + 0.1 * eye(case), b), **TIGHT)
    both = case.operator + other.operator if case.operator.space == other.operator.space else scaled
    matrix = case.dense + other.dense if both is not scaled else 2.5 * case.dense
    assert_close(both.to_dense(), matrix, **TIGHT)
    assert_close(both @ b, matrix @ b, **TIGHT)
    assert_close(both.solve(b), torch.linalg.solve(matrix, b), **TIGHT)
    assert_close(both.diagonal(), matrix.diagonal(), **TIGHT)
    assert_close(both.logdet(0.2), (matrix + 0.2 * eye(case)).logdet(), **TIGHT)
    assert_close((0 * case.operator).to_dense(), torch.zeros_like(case.dense))


def has_covariance(samples: torch.Tensor, covariance: torch.Tensor) -> None:
    """The sample covariance and mean are within four standard errors of what they should be."""
    count, variances = len(samples), covariance.diagonal()
    error = ((variances[:, None] * variances + covariance.square()) / count).sqrt()
    assert ((samples.T @ samples / count - covariance).abs() < 4 * error).all()
    assert (samples.mean(0).abs() < 4 * (variances / count).sqrt()).all()


@every_kind
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_samples_have_the_inverse_as_covariance(kind: str, damping: float) -> None:
    case = CASES[kind](1, 3, 2)
    count = 4000
    samples = case.operator.sample(count, damping=damping, generator=generator(11))
    assert samples.shape == (count, len(case.dense))
    covariance = torch.linalg.inv(case.dense + damping * eye(case))
    has_covariance(samples, covariance)
    again = case.operator.sample(count, damping=damping, generator=generator(11))
    assert torch.equal(samples, again)
    assert case.operator.sample(0).shape == (0, len(case.dense))


@every_kind
@pytest.mark.parametrize("damping", [0.0, 0.7])
@few
@draws
def test_the_root_is_symmetric_and_its_square_is_the_operator(
    kind: str, damping: float, seed: int, m: int, n: int
) -> None:
    case = CASES[kind](seed, m, n)
    root = case.operator.sqrt_matmul(eye(case), damping)
    assert_close(root, root.T, **TIGHT)
    assert (torch.linalg.eigvalsh(root) >= -1e-9).all()
    assert_close(root @ root, case.dense + damping * eye(case), **TIGHT)


@every_kind
@pytest.mark.parametrize("damping", [0.0, 0.7])
@settings(max_examples=3)
@draws
def test_the_inverse_is_an_operator_like_any_other(
    kind: str, damping: float, seed: int, m: int, n: int
) -> None:
    case = CASES[kind](seed, m, n)
    matrix = case.dense + damping * eye(case)
    inverse = case.operator.inv(damping)
    assert inverse.space == case.operator.space
    agrees(inverse, torch.linalg.inv(matrix))
    b = vectors(case, seed)
    assert_close(inverse @ b, case.operator.solve(b, damping), **TIGHT)
    assert_close(inverse.solve(b), matrix @ b, **TIGHT)
    assert_close(inverse.inv() @ b, matrix @ b, **TIGHT)


def agrees(operator: LinearOperator, dense: torch.Tensor) -> None:
    """All that an operator answers, against its matrix."""
    identity = torch.eye(len(dense), dtype=DTYPE)
    damped = dense + 0.3 * identity
    assert_close(operator.to_dense(), dense, **TIGHT)
    assert_close(operator @ identity, dense, **TIGHT)
    assert_close(operator.solve(identity), torch.linalg.inv(dense), rtol=1e-8, atol=1e-8)
    assert_close(operator.solve(identity, 0.3), torch.linalg.inv(damped), **TIGHT)
    assert_close(operator.pinv_solve(identity), torch.linalg.inv(dense), rtol=1e-8, atol=1e-8)
    for damping in (0.0, 0.3):
        root = operator.sqrt_matmul(identity, damping)
        assert_close(root @ root, dense + damping * identity, **TIGHT)
    assert_close(operator.diagonal(), dense.diagonal(), **TIGHT)
    assert_close(operator.trace(), dense.trace(), **TIGHT)
    assert_close(operator.logdet(), dense.logdet(), **TIGHT)
    assert_close(operator.logdet(0.3), damped.logdet(), **TIGHT)
    assert_close(operator.eigenvalues(), torch.linalg.eigvalsh(dense).flip(0), **TIGHT)
    assert_close(operator.eigenvalues(1), torch.linalg.eigvalsh(dense)[-1:], **TIGHT)
    assert_close((1.5 * operator).to_dense(), 1.5 * dense, **TIGHT)
    assert_close(operator.damped(0.3).to_dense(), damped, **TIGHT)
    assert operator.sample(2, generator=generator(0)).shape == (2, len(dense))


@every_kind
@settings(max_examples=2)
@draws
def test_a_restriction_is_the_submatrix(kind: str, seed: int, m: int, n: int) -> None:
    case = CASES[kind](seed, m, n)
    names = case.operator.space.names
    assert case.operator.restrict(names) is case.operator
    for count in range(1, len(names) + 1):
        # In the order of the space, and backwards.
        for chosen in (way for some in itertools.combinations(names, count) for way in {some, some[::-1]}):
            part = case.operator.restrict(chosen)
            assert part.space == case.operator.space.restrict(chosen)
            agrees(part, submatrix(case, chosen))
    assert case.operator.restrict(names[0]).space.names == names[:1]


@every_kind
def test_restrictions_have_the_right_samples(kind: str) -> None:
    case, count = CASES[kind](2, 3, 2), 4000
    for name in case.operator.space.names:
        covariance = torch.linalg.inv(
            submatrix(case, (name,)) + 0.5 * torch.eye(case.operator.restrict(name).shape[0])
        )
        samples = case.operator.restrict(name).sample(count, damping=0.5, generator=generator(11))
        has_covariance(samples, covariance)


@every_kind
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_the_inverse_has_the_right_samples(kind: str, damping: float) -> None:
    case = CASES[kind](2, 3, 2)
    covariance = torch.linalg.inv(torch.linalg.inv(case.dense) + damping * eye(case))
    has_covariance(case.operator.inv().sample(4000, damping=damping, generator=generator(11)), covariance)


@every_kind
@few
@draws
def test_a_regular_operator_has_its_inverse_for_pseudo_inverse(kind: str, seed: int, m: int, n: int) -> None:
    case = CASES[kind](seed, m, n)
    b = vectors(case, seed)
    assert_close(case.operator.pinv_solve(b), torch.linalg.solve(case.dense, b), **TIGHT)
    # With a tolerance, what is below it counts as zero; in blocks it is measured by the block's own largest.
    if kind not in ("blocks", "total_of_blocks") and "grouped" not in kind:
        expected = torch.linalg.pinv(case.dense, rtol=0.4, hermitian=True) @ b
        assert_close(case.operator.pinv_solve(b, rtol=0.4), expected, **TIGHT)
    assert_close(case.operator.pinv_solve(b, rtol=1.0), torch.zeros_like(b))


@every_kind
def test_to_converts_dtype_and_device(kind: str) -> None:
    case = CASES[kind](4, 3, 2)
    single = case.operator.to(dtype=torch.float32)
    assert single.dtype == torch.float32
    assert type(single) is type(case.operator)
    assert_close(single.to_dense(), case.dense.float(), rtol=1e-4, atol=1e-4)
    v = vectors(case, 4).float()
    assert_close(single @ v, case.dense.float() @ v, rtol=1e-4, atol=1e-4)
    assert (single.to(dtype=DTYPE) @ v.double()).dtype == DTYPE
    assert case.operator.to("cpu") is case.operator
    assert case.operator.to(dtype=DTYPE) is case.operator
    there = case.operator.to("meta")
    assert there.device == torch.device("meta")
    assert there.space == case.operator.space


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_saved_operator_comes_back_to_the_last_bit(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = CASES[kind](6, 3, 2)
    operator, file = case.operator.to(dtype=dtype), tmp_path / "F.safetensors"
    operator.save(file)
    back = load_operator(file)
    assert type(back) is type(operator)
    assert (back.space, back.dtype, back.device) == (operator.space, dtype, operator.device)
    v = vectors(case, 6).to(dtype)
    for of in (
        lambda F: F.to_dense(),
        lambda F: F @ v,
        lambda F: F.solve(v, damping=0.1),
        lambda F: F.sqrt_matmul(v),
        lambda F: F.logdet(0.1),
        lambda F: F.diagonal(),
        lambda F: F.eigenvalues(),
        lambda F: F.sample(2, damping=0.1, generator=generator(0)),
    ):
        assert torch.equal(of(back), of(operator))


@every_kind
def test_what_is_known_exactly_is_estimated_without_error(kind: str) -> None:
    case = CASES[kind](8, 3, 2)
    operator = case.operator
    for estimate, exact in (
        (operator.trace_estimate(3), case.dense.trace()),
        (operator.logdet_estimate(0.2), (case.dense + 0.2 * eye(case)).logdet()),
        (operator.diagonal_estimate(generator=generator(0)), case.dense.diagonal()),
        (operator.inv().logdet_estimate(), -case.dense.logdet()),
        (operator.inv().logdet_estimate(0.5), (torch.linalg.inv(case.dense) + 0.5 * eye(case)).logdet()),
    ):
        assert isinstance(estimate, Estimated)
        assert_close(estimate.value, exact, **TIGHT)
        assert torch.equal(estimate.standard_error, torch.zeros_like(exact))
