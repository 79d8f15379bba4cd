"""The operator of many rows and parameters: its laws are in test_laws.py; here, that it solves as Gram does."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from natgrad import ConfigError, NonFiniteError, NotPositiveDefiniteError
from natgrad.errors import ConvergenceWarning
from natgrad.linalg import Nystrom
from natgrad.operators import FactoredRows, Gram, ParameterSpace, Rectangular, Sketched
from natgrad.operators.layerrows import BatchRows
from oracle.operators import DTYPE, generator, random_rows

DECAYS = {
    "fast": lambda i: 10.0 ** (-i / 4),  # below rounding after 64
    "slow": lambda i: 1 / (1 + i),
    "steps": lambda i: torch.where(i < 5, 1e4, torch.where(i < 40, 1.0, 1e-4)),
    "flat": torch.ones_like,
    "low rank": lambda i: torch.where(i < 7, 1.0 + i, 0.0),
}


def rows_of(matrix: Tensor) -> FactoredRows:
    """Explicit rows of one parameter."""
    space = ParameterSpace({"w": (matrix.shape[1],)})
    return FactoredRows(space, (BatchRows(1, len(matrix), (), {"w": matrix[None]}),))


def decaying(decay: str, M: int = 120, P: int = 150, seed: int = 0) -> tuple[FactoredRows, Tensor]:
    """J whose JJᵀ has eigenvalues of a known decay."""
    k, source = min(M, P), generator(seed)
    U, V = (torch.linalg.qr(torch.randn(n, k, dtype=DTYPE, generator=source)).Q for n in (M, P))
    J = (U * DECAYS[decay](torch.arange(k, dtype=DTYPE)).sqrt()) @ V.T
    return rows_of(J), J


def expected(J: Tensor, r: Tensor, damping: float) -> Tensor:
    U, S, Vh = torch.linalg.svd(J, full_matrices=False)
    return Vh.T @ (S / (S.square() + damping) * (U.T @ r))


def draws(n: int, seed: int = 5) -> Tensor:
    return torch.randn(n, dtype=DTYPE, generator=generator(seed))


@pytest.mark.parametrize("shape", [(120, 150), (150, 120)])
@pytest.mark.parametrize("rank", [1, 8, 200])
@pytest.mark.parametrize("decay", DECAYS)
def test_damped_solutions_are_those_of_the_dense_matrix(
    decay: str, rank: int, shape: tuple[int, int]
) -> None:
    rows, J = decaying(decay, *shape)
    largest = float(torch.linalg.matrix_norm(J, 2)) ** 2
    r = draws(len(J))
    for relative in (1e-8, 1e-4, 1.0, 1e4):
        operator, damping = Sketched(rows, rank=rank, largest=max(rank, 1024)), relative * largest
        found = operator.dual_solve(r, damping)["w"]
        exact = expected(J, r, damping)
        assert (found - exact).norm() <= 1e-11 * relative**-0.5 * exact.norm() + 1e-13
        assert_close(
            found, Gram(rows).dual_solve(r, damping)["w"], rtol=1e-6, atol=1e-6 * float(exact.norm())
        )
        b = draws(J.shape[1], 6)
        x = operator.solve(b, damping)
        F = J.T @ J + damping * torch.eye(len(b), dtype=DTYPE)
        assert (F @ x - b).norm() <= 1e-7 * b.norm()


def test_factored_rows() -> None:
    rows, J = random_rows(0, 4, 5, 30)
    r = draws(len(J))
    found = Sketched(rows, rank=4).dual_solve(r, 1e-3)
    assert_close(rows.space.flatten(found), expected(J, r, 1e-3), rtol=1e-9, atol=1e-9)


def test_several_systems_at_once_are_each_alone() -> None:
    rows, _ = decaying("slow")
    operator = Sketched(rows, rank=8)
    block = torch.stack([draws(150, s) for s in range(3)], 1)
    block[:, 1] = 0
    found = operator.solve(block, 1e-2)
    for k in range(3):
        assert_close(found[:, k], operator.solve(block[:, k], 1e-2), rtol=1e-9, atol=1e-9)
    assert not found[:, 1].any()


def test_the_rank_follows_the_damping_and_is_kept() -> None:
    rows, _ = decaying("fast")
    operator = Sketched(rows, rank=4)
    r = draws(120)
    ranks = []
    for damping in (10.0, 1e-1, 1e-4, 1e-9, 1.0):
        operator.dual_solve(r, damping)
        ranks.append(len(operator.sketch))
    assert ranks == sorted(ranks)
    assert ranks[0] == 4
    assert ranks[3] > 16
    assert ranks[3] == ranks[4]


def test_a_rank_that_pays_takes_few_iterations() -> None:
    """Where eigenvalues above λ are in the sketch, what is left is well conditioned."""
    rows, _ = decaying("fast")
    r = draws(120)
    guided, alone = Sketched(rows, rank=64), Sketched(rows, rank=1, largest=1)
    for operator in (guided, alone):
        operator.dual_solve(r, 1e-8)
    assert guided.convergence.iterations < 12
    assert alone.convergence.iterations > 3 * guided.convergence.iterations
    assert alone.convergence.reason in ("residual", "rounding")


def test_a_flat_spectrum_is_not_sketched_in_vain() -> None:
    """Where the condition number is small anyway, a larger sketch would cost more than it saves."""
    rows, _ = decaying("flat", 400, 500)
    operator = Sketched(rows, rank=4)
    operator.dual_solve(draws(400), 0.1)
    assert len(operator.sketch) < 200


def test_sketch_and_solve() -> None:
    rows, J = decaying("fast")
    r, b = draws(120), draws(150)
    operator = Sketched(rows, rank=4, iterations=0)
    for damping in (1e-1, 1e-4):
        exact = expected(J, r, damping)
        found = operator.dual_solve(r, damping)["w"]
        assert 1e-12 < (found - exact).norm() / exact.norm() < 0.2
        assert b @ operator.solve(b, damping) > 0
        inverse = operator.solve(torch.eye(150, dtype=DTYPE), damping)
        assert torch.linalg.eigvalsh((inverse + inverse.T) / 2)[0] > 0
    assert operator.convergence is None
    assert operator.sample(3, 0.1, generator(0)).shape == (3, 150)
    complete = Sketched(rows, rank=120, iterations=0)
    assert_close(complete.dual_solve(r, 1e-3)["w"], expected(J, r, 1e-3), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("order", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("shape", [(120, 150), (150, 120)])
def test_undamped_and_of_another_order_by_all_eigenvalues(order: float, shape: tuple[int, int]) -> None:
    rows, J = decaying("low rank", *shape)
    r = draws(len(J))
    operator = Sketched(rows, rank=2)
    assert_close(operator.dual_solve(r, 0.0, order)["w"], torch.linalg.pinv(J, rtol=1e-7) @ r)
    assert len(operator.sketch) == 8  # the first of 2, 4, 8 that is more than the rank of 7
    assert_close(operator.dual_solve(r, 3.5, order)["w"], Rectangular(rows).dual_solve(r, 3.5, order)["w"])


def test_undamped_and_of_full_rank_is_refused_unless_it_may_be_sketched_whole() -> None:
    rows, J = decaying("slow")
    r = draws(120)
    small = Sketched(rows, rank=8, largest=32)
    for call in (lambda: small.dual_solve(r, 0.0), lambda: small.dual_solve(r, 0.1, 2.0)):
        with pytest.raises(ConfigError, match=r"damping > 0.*largest|largest=32"):
            call()
    assert_close(Sketched(rows, rank=8).dual_solve(r, 0.0)["w"], torch.linalg.pinv(J) @ r)
    with pytest.raises(NotPositiveDefiniteError, match="pinv_solve"):
        small.solve(draws(150))
    assert_close(small.pinv_solve(draws(150)), torch.linalg.pinv(J.T @ J, rtol=1e-9) @ draws(150))


def test_float32() -> None:
    rows, J = decaying("slow")
    single = Sketched(rows, rank=8).to(dtype=torch.float32)
    assert single.rank == 8
    r = draws(120)
    for damping in (1e-3, 1.0):
        found = single.dual_solve(r.float(), damping)["w"]
        assert found.dtype == torch.float32
        exact = expected(J, r, damping)
        assert (found - exact).norm() < 1e-4 * exact.norm()
    low, J = decaying("low rank")
    found = Sketched(low).to(dtype=torch.float32).dual_solve(r.float(), 0.0)["w"]
    assert_close(found.double(), torch.linalg.pinv(J, rtol=1e-7) @ r, rtol=1e-3, atol=1e-4)


def test_rows_of_zeros() -> None:
    operator = Sketched(rows_of(torch.zeros(5, 3, dtype=DTYPE)))
    assert not operator.dual_solve(draws(5), 0.5)["w"].any()
    assert not operator.dual_solve(draws(5), 0.0)["w"].any()
    assert_close(operator.solve(draws(3), 0.5), 2 * draws(3))
    assert operator.condition == float("inf")


def test_centred_rows() -> None:
    rows, J = decaying("slow")
    removed = torch.full((120, 1), 120**-0.5, dtype=DTYPE)
    centred = J - removed @ (removed.T @ J)
    found = Sketched(rows.without(removed), rank=4).dual_solve(draws(120), 1e-3)["w"]
    assert_close(found, expected(centred, draws(120), 1e-3), rtol=1e-8, atol=1e-8)


def test_options_stay_with_what_is_made_of_it() -> None:
    operator = Sketched(random_rows(0, 3, 3, 9)[0], rank=3, largest=40, tolerance=1e-5, seed=2)
    for other in (
        operator.restrict(("layer.bias",)),
        operator.to(dtype=torch.float32),
        2.0 * operator,
        operator + operator,
    ):
        assert isinstance(other, Sketched)
        assert (other.rank, other.largest, other.tolerance, other.seed) == (3, 40, 1e-5, 2)
    again = dataclasses.replace(operator)
    r = draws(18)
    assert torch.equal(again.dual_solve(r, 0.1)["temperature"], operator.dual_solve(r, 0.1)["temperature"])


def test_condition() -> None:
    rows, _ = decaying("steps")
    operator = Sketched(rows, rank=120)
    assert_close(operator.condition, 1e4, rtol=1e-6, atol=0.0)
    assert Sketched(rows, rank=20).condition < operator.condition


def test_it_says_how_far_it_came() -> None:
    rows, _ = decaying("slow")
    operator = Sketched(rows, rank=1, largest=1, iterations=3)
    with pytest.warns(ConvergenceWarning, match="3 iterations"):
        operator.dual_solve(draws(120), 1e-6)
    assert operator.convergence.reason == "limit"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataclasses.replace(operator, tolerance=0.9).dual_solve(draws(120), 1.0)


def test_errors() -> None:
    rows, J = decaying("slow")
    for wrong in ({"rank": 0}, {"rank": 5, "largest": 4}, {"iterations": -1}, {"tolerance": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Sketched(rows, **wrong)
    with pytest.raises(NonFiniteError, match="finite"):
        Sketched(rows_of(J * float("nan"))).dual_solve(draws(120), 0.1)


# ------------------------------------------------------------------------------------------ the sketch itself


def nystrom(K: Tensor, rank: int, largest: int = 1000, **options: int) -> Nystrom:
    return Nystrom(
        lambda v: v @ K,
        len(K),
        rank=rank,
        largest=largest,
        dtype=K.dtype,
        device=K.device,
        generator=generator(3),
        **options,
    )


@pytest.mark.parametrize("decay", DECAYS)
def test_the_approximation_lies_below_the_matrix(decay: str) -> None:
    _, J = decaying(decay)
    K = J @ J.T
    sketch = nystrom(K, 16)
    near = sketch.approximation(torch.eye(120, dtype=DTYPE))
    rounding = 1e-12 * float(torch.linalg.matrix_norm(K, 2))
    assert torch.linalg.eigvalsh(K - near)[0] > -100 * rounding
    assert_close(sketch.vectors @ sketch.vectors.T, torch.eye(16, dtype=DTYPE), rtol=0, atol=1e-12)
    assert (sketch.values[:-1] >= sketch.values[1:]).all()
    # The best approximation of rank r errs by λ₍ᵣ₊₁₎; this one, by not much more than the tail's sum.
    tail = torch.linalg.eigvalsh(K)[: 120 - 8].sum()
    assert torch.linalg.matrix_norm(K - near, 2) <= 3 * tail + 100 * rounding
    v = torch.randn(2, 120, dtype=DTYPE, generator=generator(1))
    identity = torch.eye(120, dtype=DTYPE)
    system = near + sketch.remainder * (identity - sketch.vectors.T @ sketch.vectors) + 0.1 * identity
    assert_close(sketch.solve(v, 0.1) @ system, v, rtol=1e-9, atol=1e-9)


def test_what_is_raised_is_what_it_would_have_been() -> None:
    _, J = decaying("slow")
    K = J @ J.T
    sketch = nystrom(K, 5).extend(0.0)
    assert len(sketch) == 120
    assert sketch.complete
    assert sketch.remainder == 0
    assert_close(sketch.approximation(torch.eye(120, dtype=DTYPE)), K, rtol=1e-9, atol=1e-10)
    capped = nystrom(K, 5, 30).extend(0.0)
    assert len(capped) == 30
    assert capped.exhausted
    assert not capped.complete


def test_sketch_errors() -> None:
    with pytest.raises(NotPositiveDefiniteError, match="semi-definite"):
        nystrom(-torch.eye(10, dtype=DTYPE), 3)
    with pytest.raises(ConfigError, match="rank=0"):
        nystrom(torch.eye(10, dtype=DTYPE), 0)
