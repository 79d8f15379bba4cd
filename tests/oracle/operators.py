"""Operators built twice: by natgrad, and entry by entry as the definition says. Small, slow, obvious."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from natgrad.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EigenKronecker,
    FactoredRows,
    Gram,
    Inverse,
    Kronecker,
    LinearOperator,
    LowRank,
    ParameterSpace,
    Rectangular,
    Restricted,
    ScaledIdentity,
    Sketched,
)
from natgrad.operators.layerrows import BatchRows, LayerRows, Use
from natgrad.operators.readings import Positions

DTYPE = torch.float64


@dataclasses.dataclass(frozen=True)
class Case:
    """An operator and the matrix that it should be."""

    operator: LinearOperator
    dense: Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def positive_definite(n: int, source: torch.Generator, batch: tuple[int, ...] = ()) -> Tensor:
    """Random, well conditioned, [*batch, n, n]."""
    root = torch.randn(*batch, n, n + 2, dtype=DTYPE, generator=source)
    return root @ root.mT / n + 0.1 * torch.eye(n, dtype=DTYPE)


def coordinates(
    weight_shape: tuple[int, ...], bias: bool, outs: int, ins: int, groups: int, transposed: bool
) -> list[tuple[int, int, int]]:
    """(group, row of G, row of A) of each coordinate, in the order (weight by rows, then bias)."""
    places = []
    for index in itertools.product(*map(range, weight_shape)):
        first, second, *rest = index
        tap, taps = 0, 1
        for position, size in zip(rest, weight_shape[2:], strict=True):
            tap, taps = tap * size + position, taps * size
        if transposed:
            channels = weight_shape[0] // groups
            places.append((first // channels, second, (first % channels) * taps + tap))
        else:
            places.append((first // outs, first % outs, second * taps + tap))
    if bias:
        places += [(o // outs, o % outs, ins - 1) for o in range(groups * outs)]
    return places


def kronecker_block(
    weight_shape: tuple[int, ...], bias: bool, A: Tensor, G: Tensor, groups: int = 1, transposed: bool = False
) -> Tensor:
    """The dense block in the order of `coordinates`: G[o, o'] A[i, i'] within a group, 0 across groups."""
    A, G = (A, G) if groups > 1 else (A[None], G[None])
    places = coordinates(weight_shape, bias, G.shape[-1], A.shape[-1], groups, transposed)
    dense = torch.zeros(len(places), len(places), dtype=A.dtype)
    for x, (g, o, i) in enumerate(places):
        for y, (h, p, j) in enumerate(places):
            if g == h:
                dense[x, y] = G[g, o, p] * A[g, i, j]
    return dense


def factored_inverse(A: Tensor, G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The two inverses of Martens & Grosse 2015, §6.3, from `torch.linalg.inv`."""
    pi = math.sqrt((float(A.trace()) / len(A)) / (float(G.trace()) / len(G)))
    root = math.sqrt(damping)
    return (
        torch.linalg.inv(A + pi * root * torch.eye(len(A), dtype=A.dtype)),
        torch.linalg.inv(G + root / pi * torch.eye(len(G), dtype=G.dtype)),
    )


def place(parts: list[tuple[ParameterSpace, Tensor]], space: ParameterSpace) -> Tensor:
    """The dense matrix of blocks on subspaces, coordinate by coordinate."""
    coordinates = {}
    for name, shape in space.entries:
        for i in range(math.prod(shape)):
            coordinates[name, i] = len(coordinates)
    dense = torch.zeros(len(coordinates), len(coordinates), dtype=DTYPE)
    for sub, block in parts:
        mine = [coordinates[name, i] for name, shape in sub.entries for i in range(math.prod(shape))]
        for x, row in enumerate(mine):
            for y, column in enumerate(mine):
                dense[row, column] = block[x, y]
    return dense


# ------------------------------------------------------------------------------------- one of each kind


def _mixed(m: int, n: int) -> ParameterSpace:
    return ParameterSpace({"layer.weight": (m, n), "layer.bias": (m,), "temperature": ()})


def identity(seed: int, m: int, n: int) -> Case:
    scale = 0.5 + seed % 7
    space = _mixed(m, n)
    return Case(ScaledIdentity(space, scale, dtype=DTYPE), scale * torch.eye(space.numel, dtype=DTYPE))


def diagonal(seed: int, m: int, n: int) -> Case:
    space = _mixed(m, n)
    values = torch.rand(space.numel, dtype=DTYPE, generator=generator(seed)) + 0.1
    return Case(Diagonal(space, space.unflatten(values)), values.diag())


def dense(seed: int, m: int, n: int) -> Case:
    space = _mixed(m, n)
    matrix = positive_definite(space.numel, generator(seed))
    return Case(Dense(space, matrix), matrix)


def _kronecker(
    seed: int, weight: tuple[int, ...], bias: bool, groups: int = 1, transposed: bool = False
) -> Case:
    taps = math.prod(weight[2:])
    if transposed:
        out, columns = weight[1], weight[0] // groups * taps
    else:
        out, columns = weight[0] // groups, weight[1] * taps
    batch = (groups,) if groups > 1 else ()
    source = generator(seed)
    A, G = (
        positive_definite(columns + bias, source, batch),
        positive_definite(out, source, batch),
    )
    shapes = {"fc.weight": weight, "fc.bias": (out * groups,)} if bias else {"fc.weight": weight}
    operator = Kronecker(ParameterSpace(shapes), A, G, transposed)
    return Case(operator, kronecker_block(weight, bias, A, G, groups, transposed))


def _eigen(seed: int, weight: tuple[int, ...], bias: bool, groups: int = 1, transposed: bool = False) -> Case:
    """Free eigenvalues on the eigenvectors of random factors: Q diag(S) Qᵀ with Q = U_A ⊗ U_G, entry by entry."""
    like = _kronecker(seed, weight, bias, groups, transposed).operator
    assert isinstance(like, Kronecker)
    U_A, U_G = torch.linalg.eigh(like.A)[1], torch.linalg.eigh(like.G)[1]
    batch = (groups,) if groups > 1 else ()
    shape = (*batch, U_G.shape[-1], U_A.shape[-1])
    S = torch.rand(shape, dtype=DTYPE, generator=generator(seed + 5)) + 0.1
    Q = kronecker_block(weight, bias, U_A, U_G, groups, transposed)
    places = coordinates(weight, bias, shape[-2], shape[-1], groups, transposed)
    of_groups = S if groups > 1 else S[None]
    total = Q @ torch.stack([of_groups[place] for place in places]).diag() @ Q.T
    return Case(EigenKronecker(like.space, U_A, U_G, S, transposed), total)


def eigen(seed: int, m: int, n: int) -> Case:
    return _eigen(seed, (m, n), bias=True)


def eigen_transposed(seed: int, m: int, n: int) -> Case:
    return _eigen(seed, (n, m), bias=False, transposed=True)


def eigen_grouped_convolution(seed: int, m: int, n: int) -> Case:
    return _eigen(seed, (2 * m, n, 2), bias=seed % 2 == 0, groups=2)


def linear(seed: int, m: int, n: int) -> Case:
    return _kronecker(seed, (m, n), bias=False)


def linear_with_bias(seed: int, m: int, n: int) -> Case:
    return _kronecker(seed, (m, n), bias=True)


def linear_transposed(seed: int, m: int, n: int) -> Case:
    return _kronecker(seed, (n, m), bias=True, transposed=True)


def convolution(seed: int, m: int, n: int) -> Case:
    return _kronecker(seed, (m, n, 1, 2), bias=True)


def grouped_convolution(seed: int, m: int, n: int) -> Case:
    return _kronecker(seed, (2 * m, n, 2), bias=True, groups=2)


def grouped_transposed_convolution(seed: int, m: int, n: int) -> Case:
    return _kronecker(seed, (2 * n, m, 2), bias=seed % 2 == 0, groups=2, transposed=True)


def blocks(seed: int, m: int, n: int) -> Case:
    """Three kinds of block, in another order than the space, and not contiguous in it."""
    source = generator(seed)
    space = ParameterSpace({"b": (m,), "scale": (), "w": (m, n), "t": (2,)})
    A, G = positive_definite(n + 1, source), positive_definite(m, source)
    first = ParameterSpace({"w": (m, n), "b": (m,)})
    second, third = ParameterSpace({"t": (2,)}), ParameterSpace({"scale": ()})
    matrix = positive_definite(2, source)
    operator = BlockDiagonal(
        space, [Kronecker(first, A, G), Dense(second, matrix), ScaledIdentity(third, 2.0, dtype=DTYPE)]
    )
    parts = [
        (first, kronecker_block((m, n), True, A, G)),
        (second, matrix),
        (third, torch.full((1, 1), 2.0, dtype=DTYPE)),
    ]
    return Case(operator, place(parts, space))


def damped(seed: int, m: int, n: int) -> Case:
    case = linear_with_bias(seed, m, n)
    return Case(case.operator.damped(0.3), case.dense + 0.3 * torch.eye(len(case.dense), dtype=DTYPE))


def total(seed: int, m: int, n: int) -> Case:
    """Kronecker plus diagonal: no closed form."""
    case = linear_with_bias(seed, m, n)
    space = case.operator.space
    values = torch.rand(space.numel, dtype=DTYPE, generator=generator(seed + 1))
    return Case(case.operator + Diagonal(space, space.unflatten(values)), case.dense + values.diag())


def total_of_blocks(seed: int, m: int, n: int) -> Case:
    left, right = blocks(seed, m, n), blocks(seed + 1, m, n)
    return Case(0.5 * left.operator + right.operator, 0.5 * left.dense + right.dense)


def inverse_of_dense(seed: int, m: int, n: int) -> Case:
    case = dense(seed, m, n)
    matrix = case.dense + 0.2 * torch.eye(len(case.dense), dtype=DTYPE)
    return Case(Inverse(case.operator, 0.2), torch.linalg.inv(matrix))


def submatrix(case: Case, names: tuple[str, ...]) -> Tensor:
    """The entries of some parameters, coordinate by coordinate, in the order of the names."""
    places, start = {}, 0
    for name, shape in case.operator.space.entries:
        places[name] = range(start, start + math.prod(shape))
        start += math.prod(shape)
    chosen = [place for name in names for place in places[name]]
    return torch.stack([torch.stack([case.dense[x, y] for y in chosen]) for x in chosen])


def restricted_to_the_larger_part(seed: int, m: int, n: int) -> Case:
    case = eigen(seed, m, n + 1)
    return Case(Restricted(case.operator, ("fc.weight",)), submatrix(case, ("fc.weight",)))


def restricted_to_the_smaller_part(seed: int, m: int, n: int) -> Case:
    case, names = dense(seed, m, n), ("temperature", "layer.bias")
    return Case(Restricted(case.operator, names), submatrix(case, names))


def layer_rows(
    inputs: Tensor, signals: Tensor, explicit: Tensor, biased: bool = True
) -> tuple[FactoredRows, Tensor]:
    """Rows of a linear map with positions and of a scalar beside it, and J entry by entry.

    Args:
        inputs: a[n, s, i].
        signals: g[c, n, s, o].
        explicit: the scalar's rows [c, n].
        biased: whether the bias was added.
    """
    columns, examples, positions, outs = signals.shape
    ins = inputs.shape[2]
    laid_out = signals.permute(1, 2, 0, 3).contiguous().permute(0, 2, 3, 1)  # as the tape does
    use = Use(Positions(inputs), laid_out[:, :, None], biased)
    layer = LayerRows("layer.weight", "layer.bias", (use,))
    space = ParameterSpace({"layer.weight": (outs, ins), "layer.bias": (outs,), "temperature": ()})
    J = []
    for c, n in itertools.product(range(columns), range(examples)):
        row = torch.zeros(outs * ins + outs + 1, dtype=inputs.dtype)
        for s, o in itertools.product(range(positions), range(outs)):
            for i in range(ins):
                row[o * ins + i] += signals[c, n, s, o] * inputs[n, s, i]
            row[outs * ins + o] += signals[c, n, s, o] * biased
        row[-1] = explicit[c, n]
        J.append(row)
    batch = BatchRows(columns, examples, (layer,), {"temperature": explicit})
    return FactoredRows(space, (batch,)), torch.stack(J)


def random_rows(
    seed: int, m: int, n: int, examples: int, columns: int = 2, positions: int = 2
) -> tuple[FactoredRows, Tensor]:
    """`layer_rows` of random numbers, scaled so that JᵀJ is about one."""
    source = generator(seed)
    sizes = ((examples, positions, n), (columns, examples, positions, m), (columns, examples))
    rows, J = layer_rows(*(torch.randn(size, dtype=DTYPE, generator=source) for size in sizes))
    factor = (columns * examples) ** -0.5
    return rows.scaled(factor), factor * J


def gram_of_many_rows(seed: int, m: int, n: int) -> Case:
    """Regular: there are four times as many rows as parameters."""
    rows, J = random_rows(seed, m, n, 2 * (m * n + m + 1))
    return Case(Gram(rows), J.T @ J)


def gram_damped(seed: int, m: int, n: int) -> Case:
    """Fewer rows than parameters, through the Gram matrix."""
    rows, J = random_rows(seed, m, n, 1, columns=1 + (m * n > 1))
    return Case(Gram(rows).damped(0.3), J.T @ J + 0.3 * torch.eye(J.shape[1], dtype=DTYPE))


def rectangular(seed: int, m: int, n: int) -> Case:
    rows, J = random_rows(seed, m, n, 2 * (m * n + m + 1))
    return Case(Rectangular(rows), J.T @ J)


def sketched(seed: int, m: int, n: int) -> Case:
    """From a rank of 1, so that every solution raises it."""
    rows, J = random_rows(seed, m, n, 2 * (m * n + m + 1))
    return Case(Sketched(rows, rank=1), J.T @ J)


def low_rank(seed: int, m: int, n: int) -> Case:
    space, source = _mixed(m, n), generator(seed)
    k = 1 + seed % space.numel
    U = torch.linalg.qr(torch.randn(space.numel, k, dtype=DTYPE, generator=source)).Q
    values, rest = torch.rand(k, dtype=DTYPE, generator=source) + 0.5, 0.3
    total = rest * torch.eye(space.numel, dtype=DTYPE)
    for u, value in zip(U.T, values):
        total += (value - rest) * u[:, None] * u
    return Case(LowRank(space, U.T.contiguous(), values, rest), total)


CASES: dict[str, Callable[[int, int, int], Case]] = {
    f.__name__: f
    for f in (
        identity,
        diagonal,
        dense,
        linear,
        linear_with_bias,
        linear_transposed,
        convolution,
        grouped_convolution,
        grouped_transposed_convolution,
        eigen,
        eigen_transposed,
        eigen_grouped_convolution,
        blocks,
        damped,
        total,
        total_of_blocks,
        inverse_of_dense,
        restricted_to_the_larger_part,
        restricted_to_the_smaller_part,
        gram_of_many_rows,
        gram_damped,
        rectangular,
        sketched,
        low_rank,
    )
}
