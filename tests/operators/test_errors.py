"""Bad input raises before anything is computed, and the message says what to do."""

from __future__ import annotations

import pytest
import torch

from natgrad.errors import (
    ConfigError,
    EmptyError,
    NonFiniteError,
    NotPositiveDefiniteError,
    VectorError,
)
from natgrad.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenKronecker,
    Kronecker,
    LinearOperator,
    ParameterSpace,
    Restricted,
    ScaledIdentity,
)
from oracle.operators import CASES, DTYPE, positive_definite

every_kind = pytest.mark.parametrize("kind", CASES)
SPACE = ParameterSpace({"fc.weight": (2, 3), "fc.bias": (2,)})


def singular() -> dict[str, LinearOperator]:
    column = torch.ones(8, 1, dtype=DTYPE)
    zero = torch.zeros(2, 2, dtype=DTYPE)
    A = positive_definite(4, torch.Generator().manual_seed(0))
    G = positive_definite(2, torch.Generator().manual_seed(0))
    rank_one = torch.ones(4, 4, dtype=DTYPE)
    values = SPACE.unflatten(torch.arange(8, dtype=DTYPE))
    operators = {
        "identity": ScaledIdentity(SPACE, 0.0, dtype=DTYPE),
        "diagonal": Diagonal(SPACE, values),
        "dense": Dense(SPACE, column @ column.T),
        "dense zero": Dense(SPACE, torch.zeros(8, 8, dtype=DTYPE)),
        "kronecker G": Kronecker(SPACE, A, zero),
        "kronecker A": Kronecker(SPACE, rank_one, G),
        "sum": Kronecker(SPACE, rank_one, G) + Dense(SPACE, torch.zeros(8, 8, dtype=DTYPE)),
    }
    basis_A, basis_G = torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1]
    S = torch.arange(8, dtype=DTYPE).view(2, 4)
    operators["eigen"] = EigenKronecker(SPACE, basis_A, basis_G, S)
    operators["inverse"] = operators["sum"].inv()
    both = ParameterSpace({"fc.weight": (2, 3), "fc.bias": (2,), "scale": ()})
    matrix = torch.zeros(9, 9, dtype=DTYPE)
    matrix[:8, :8], matrix[8, 8] = column @ column.T, 1.0
    operators["restricted"] = Restricted(Dense(both, matrix), SPACE.names)
    operators["damped by nothing"] = 1.0 * operators["dense"].damped(0.0)
    operators["blocks"] = BlockDiagonal(SPACE, [operators["kronecker A"]])
    return operators


# The inverse of a singular operator is none itself: see the test that asks it.
@pytest.mark.parametrize("kind", [kind for kind in singular() if kind != "inverse"])
def test_a_singular_operator_is_solved_with_damping_only(kind: str) -> None:
    operator = singular()[kind]
    b = torch.randn(8, dtype=DTYPE)
    for ask in (operator.logdet, lambda: operator.solve(b), lambda: operator.sample(1)):
        with pytest.raises(NotPositiveDefiniteError, match=r"fc.*singular.*damping.*pinv_solve"):
            ask()
    with pytest.raises(NotPositiveDefiniteError, match=r"fc.*singular"):
        operator.inv().logdet()
    x = operator.solve(b, damping=0.5)
    torch.testing.assert_close(operator @ x + 0.5 * x, b, rtol=1e-8, atol=1e-8)
    assert torch.isfinite(operator.logdet(damping=0.5))
    assert torch.isfinite(operator.sample(2, damping=0.5)).all()
    assert operator.norm(torch.zeros(8, dtype=DTYPE)) == 0


def test_the_inverse_of_a_singular_operator_raises_with_the_first_question() -> None:
    inverse, b = singular()["inverse"], torch.randn(8, dtype=DTYPE)
    for ask in (
        lambda: inverse @ b,
        inverse.to_dense,
        inverse.logdet,
        inverse.eigenvalues,
        lambda: inverse.sqrt_matmul(b),
    ):
        with pytest.raises(NotPositiveDefiniteError, match=r"fc.*singular.*damping"):
            ask()


@pytest.mark.parametrize("kind", [kind for kind in singular() if kind != "inverse"])
def test_the_pseudo_inverse_gives_the_solution_of_least_norm(kind: str) -> None:
    operator = singular()[kind]
    b = torch.randn(8, 2, dtype=DTYPE)
    expected = torch.linalg.pinv(operator.to_dense(), hermitian=True) @ b
    torch.testing.assert_close(operator.pinv_solve(b), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(operator.pinv_solve(b, rtol=1e-10), expected, rtol=1e-8, atol=1e-8)
    for bad in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="rtol"):
            operator.pinv_solve(b, rtol=bad)


def test_a_restriction_may_be_regular_where_the_whole_is_not() -> None:
    space = ParameterSpace({"w": (3,), "b": (1,)})
    matrix = torch.eye(4, dtype=DTYPE)
    matrix[3, 3] = 0.0
    part = Restricted(Dense(space, matrix), ("w",))
    b = torch.randn(3, dtype=DTYPE)
    torch.testing.assert_close(part.solve(b), b)
    assert part.logdet() == 0


def test_a_singular_factor_is_named() -> None:
    with pytest.raises(NotPositiveDefiniteError, match="factor G of fc") as error:
        singular()["kronecker G"].logdet()
    assert (error.value.layer, error.value.factor, error.value.least_eigenvalue) == ("fc", "G", 0.0)


def test_a_nearly_singular_dense_matrix_is_seen_and_a_regular_one_is_not_refused() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(60, 60, dtype=DTYPE)).Q
    space = ParameterSpace({"w": (60,)})
    for least, regular in ((1e-11, True), (1e-17, False)):
        values = torch.logspace(0, -3, 60, dtype=DTYPE)
        values[-1] = least
        matrix = (basis * values) @ basis.T
        operator = Dense(space, (matrix + matrix.T) / 2)
        if regular:
            assert torch.isfinite(operator.logdet())
        else:
            with pytest.raises(NotPositiveDefiniteError):
                operator.logdet()


@every_kind
def test_vectors_that_do_not_lie_in_the_space(kind: str) -> None:
    operator = CASES[kind](0, 2, 2).operator
    size = operator.space.numel
    good = operator.space.unflatten(torch.zeros(size, dtype=DTYPE))
    name = operator.space.names[0]
    for wrong, message in [
        (torch.zeros(size + 1, dtype=DTYPE), f"has {size} entries, but this one has {size + 1}"),
        (torch.zeros(size + 1, 2, dtype=DTYPE), f"has {size} entries"),
        (torch.zeros(size + 1, size, dtype=DTYPE), "pass its transpose"),
        (torch.zeros(1, size, 1, dtype=DTYPE), "has 3 axes"),
        (torch.zeros(size), "float32.*float64.*convert"),
        ({k: v for k, v in good.items() if k != name}, f"lacks '{name}'"),
        (good | {name + "_": good[name]}, f"no parameter '{name}_'; did you mean '{name}'"),
        (good | {name: torch.zeros(7, 7, dtype=DTYPE)}, f"'{name}' has shape"),
        (good | {name: good[name].float()}, f"'{name}' is torch.float32"),
    ]:
        with pytest.raises(VectorError, match=message):
            operator @ wrong
        with pytest.raises(VectorError, match=message):
            operator.solve(wrong, damping=1.0)


@every_kind
def test_arguments_out_of_range(kind: str) -> None:
    operator = CASES[kind](0, 2, 2).operator
    v = torch.ones(operator.space.numel, dtype=DTYPE)
    for bad in (-1.0, float("nan"), float("inf")):
        for ask in (
            lambda bad=bad: operator.solve(v, damping=bad),
            lambda bad=bad: operator.damped(bad),
            lambda bad=bad: operator.logdet(bad),
            lambda bad=bad: operator.sample(1, damping=bad),
            lambda bad=bad: bad * operator,
            lambda bad=bad: operator.inv(bad),
            lambda bad=bad: operator.sqrt_matmul(v, bad),
            lambda bad=bad: operator.natural_gradient(v, bad),
            lambda bad=bad: operator.logdet_estimate(bad),
        ):
            with pytest.raises(ConfigError, match="must be finite and not negative"):
                ask()
    for k in (0, -1, operator.space.numel + 1):
        with pytest.raises(ConfigError, match=f"from 1 to {operator.space.numel}"):
            operator.eigenvalues(k)
    with pytest.raises(ConfigError, match="can't be negative"):
        operator.sample(-1)
    for estimate in (operator.trace_estimate, operator.diagonal_estimate):
        with pytest.raises(ConfigError, match="probes=0"):
            estimate(0)
    with pytest.raises(ConfigError, match="probes=0"):
        operator.logdet_estimate(1.0, probes=0)
    with pytest.raises(ConfigError, match="floating point"):
        operator.to(dtype=torch.int64)
    with pytest.raises(ConfigError, match="at least one name"):
        operator.restrict([])
    first = operator.space.names[0]
    with pytest.raises(VectorError, match=f"'{first}' stands twice"):
        operator.restrict([first, first])
    with pytest.raises(VectorError, match=f"no parameter '{first}_'; did you mean '{first}'"):
        operator.restrict([first + "_"])
    with pytest.raises(VectorError, match="length zero"):
        operator.angle(v, 0 * v)
    with pytest.raises(VectorError, match=r"columns: \[2, 3\]"):
        operator.inner(torch.ones(len(v), 2, dtype=DTYPE), torch.ones(len(v), 3, dtype=DTYPE))


def test_sums_need_one_space_dtype_and_order() -> None:
    left = ScaledIdentity(SPACE, dtype=DTYPE)
    with pytest.raises(ConfigError, match="different parameter spaces"):
        left + ScaledIdentity(ParameterSpace({"fc.bias": (2,), "fc.weight": (2, 3)}), dtype=DTYPE)
    with pytest.raises(ConfigError, match=r"float64.*float32"):
        left + ScaledIdentity(SPACE, dtype=torch.float32)


def test_blocks_must_make_the_space() -> None:
    weight, bias = SPACE.restrict(["fc.weight"]), SPACE.restrict(["fc.bias"])
    one, two = ScaledIdentity(weight, dtype=DTYPE), ScaledIdentity(bias, dtype=DTYPE)
    for blocks, name in [
        ([one], "fc.bias"),
        ([one, two, two], "fc.bias"),
        ([one, two, ScaledIdentity(ParameterSpace({"x": (1,)}), dtype=DTYPE)], "x"),
        ([one, ScaledIdentity(ParameterSpace({"fc.bias": (3,)}), dtype=DTYPE)], "fc.bias"),
    ]:
        with pytest.raises(ConfigError, match=f"exactly one block.*{name}"):
            BlockDiagonal(SPACE, blocks)
    with pytest.raises(ConfigError, match="differ in dtype"):
        BlockDiagonal(SPACE, [one, ScaledIdentity(bias, dtype=torch.float32)])


def test_matrices_must_fit_the_space() -> None:
    def eye(n: int) -> torch.Tensor:
        return torch.eye(n, dtype=DTYPE)

    with pytest.raises(ConfigError, match=r"\(7, 7\).*\(8, 8\)"):
        Dense(SPACE, eye(7))
    with pytest.raises(ConfigError, match="don't fit fc"):
        Kronecker(SPACE, eye(3), eye(2))  # the bias's coordinate is missing
    with pytest.raises(ConfigError, match="don't fit fc"):
        Kronecker(SPACE, eye(4), eye(3))
    with pytest.raises(ConfigError, match="one weight and at most one bias"):
        Kronecker(ParameterSpace({"b": (2,)}), eye(1), eye(2))
    with pytest.raises(ConfigError, match="the bias 'b' has shape"):
        Kronecker(ParameterSpace({"w": (2, 3), "b": (3,)}), eye(4), eye(2))
    with pytest.raises(ConfigError, match="groups don't divide"):
        Kronecker(ParameterSpace({"w": (3, 3)}), eye(3).repeat(2, 1, 1), eye(1).repeat(2, 1, 1))
    with pytest.raises(ConfigError, match="convert one"):
        Kronecker(SPACE, eye(4), eye(2).float())
    with pytest.raises(ConfigError, match=r"U_A is \(3, 3\); fc needs \(4, 4\)"):
        EigenKronecker(SPACE, eye(3), eye(2), torch.ones(2, 3, dtype=DTYPE))
    with pytest.raises(ConfigError, match=r"values is \(4, 2\); fc needs \(2, 4\)"):
        EigenKronecker(SPACE, eye(4), eye(2), torch.ones(4, 2, dtype=DTYPE))
    with pytest.raises(ConfigError, match="eigenvalues torch.float32.*convert one"):
        EigenKronecker(SPACE, eye(4), eye(2), torch.ones(2, 4))
    with pytest.raises(ConfigError, match="nothing is left out"):
        Restricted(Dense(SPACE, eye(8)), SPACE.names)
    with pytest.raises(VectorError, match=r"lacks 'fc\.bias'"):
        Diagonal(SPACE, {"fc.weight": torch.ones(2, 3)})


def test_a_factor_that_is_not_finite_or_indefinite_is_named() -> None:
    A, G = torch.eye(4, dtype=DTYPE), torch.eye(2, dtype=DTYPE)
    b = torch.ones(8, dtype=DTYPE)
    broken = A.clone()
    broken[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="factor A of fc has 1 entries"):
        Kronecker(SPACE, broken, G).solve(b, damping=1.0)
    with pytest.raises(NotPositiveDefiniteError, match=r"factor G of fc.*-1"):
        Kronecker(SPACE, A, -G).solve(b, damping=1.0)
    with pytest.raises(NotPositiveDefiniteError, match=r"factor F of fc.*-1"):
        Dense(SPACE, -torch.eye(8, dtype=DTYPE)).solve(b, damping=0.5)
    with pytest.raises(NonFiniteError, match="factor F of fc"):
        Dense(SPACE, torch.full((8, 8), float("inf"), dtype=DTYPE)).solve(b, damping=0.5)


def test_an_empty_space() -> None:
    with pytest.raises(EmptyError, match="requires_grad"):
        ParameterSpace({})


def test_a_dense_matrix_that_would_not_fit_is_refused_before_it_is_made() -> None:
    space = ParameterSpace({"fc.weight": (3000, 4000)})
    A, G, S = torch.ones(()).expand(4000, 4000), torch.ones(()).expand(3000, 3000), torch.ones(())
    identity = ScaledIdentity(space, 2.0)
    for operator in (
        identity,
        Diagonal(space, {"fc.weight": S.expand(3000, 4000)}),
        Kronecker(space, A, G),
        EigenKronecker(space, A, G, S.expand(3000, 4000)),
        BlockDiagonal(space, [identity]),
        identity.damped(1.0),
        Kronecker(space, A, G) + Diagonal(space, {"fc.weight": S.expand(3000, 4000)}),
    ):
        with pytest.raises(ConfigError, match=r"12,000,000 parameters.* GiB \(576,000,000,000,000 bytes\)"):
            operator.to_dense()
