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
    Kronecker,
    LinearOperator,
    ParameterSpace,
    ScaledIdentity,
)

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


def kronecker_block(
    weight_shape: tuple[int, ...], bias: bool, A: Tensor, G: Tensor, groups: int = 1, transposed: bool = False
) -> Tensor:
    """The dense block in the order (weight by rows, then bias): G[o, o'] A[i, i'] within a group, 0 across groups."""
    A, G = (A, G) if groups > 1 else (A[None], G[None])
    outs = G.shape[-1]
    places = []  # (group, row of G, row of A) of each coordinate
    for index in itertools.product(*map(range, weight_shape)):
        first, second, *rest = index
        tap, taps = 0, 1
        for position, size in zip(rest, weight_shape[2:], strict=True):
            tap, taps = tap * size + position, taps * size
        if transposed:
            ins = weight_shape[0] // groups
            places.append((first // ins, second, (first % ins) * taps + tap))
        else:
            places.append((first // outs, first % outs, second * taps + tap))
    if bias:
        places += [(o // outs, o % outs, A.shape[-1] - 1) for o in range(groups * outs)]
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
        blocks,
        damped,
        total,
        total_of_blocks,
    )
}
