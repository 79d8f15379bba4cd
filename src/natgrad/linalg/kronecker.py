"""The one convention by which a layer's parameters become a matrix, and a Kronecker product acts on it.

The parameters of a linear map with bias are one matrix V = [W b] of shape [out, in + 1], flattened by rows: entry
(o, i) is coordinate o·(in + 1) + i. The block A ⊗ G acts as V ↦ G V A, with A of shape [in + 1, in + 1] and G of shape
[out, out]; as a dense matrix on flattened V it is `torch.kron(G, A)`. (In the columns-first convention of Martens &
Grosse 2015, vec(G V A) = (A ⊗ G) vec(V): hence the name.)

A convolution's weight [out, in, kh, kw] is the linear map [out, in·kh·kw] on patches. One with g groups is g maps, and
V gets an axis for them: [g, out/g, in/g·kh·kw (+ 1)]. A *transposed* weight is stored with its input axis first, as
those of `ConvTranspose2d`, [in, out/g, kh, kw], and of Hugging Face's `Conv1D`, [in, out]. Of a *flat* weight any
number of axes are the map's groups, outputs or inputs, in this order or the last two the other way round: an attention
head's [in, heads, dim], a mixture's [experts, in, out]. Then `outputs` says how many outputs a group has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def kronecker_matmul(
    A: Float[Tensor, "*#batch i j"], G: Float[Tensor, "*#batch p o"], V: Float[Tensor, "*#batch o i"]
) -> Float[Tensor, "*#batch p j"]:
    """The product (A ⊗ G) V = G V A.

    Square factors cost the same in either order; where a factor is rectangular (a projection on some eigenvectors), the
    order with fewer multiplications is taken.

    Args:
        A: the factor of the inputs; leading axes broadcast.
        G: the factor of the outputs.
        V: the matrix of parameters.
    """
    (i, j), (p, o) = A.shape[-2:], G.shape[-2:]
    if p * o * i + p * i * j <= o * i * j + p * o * j:
        return (G @ V) @ A
    return G @ (V @ A)


def kronecker_dense(
    A: Float[Tensor, "*#batch i i"], G: Float[Tensor, "*#batch o o"]
) -> Float[Tensor, "*#batch oi oi"]:
    """The matrix of V ↦ G V A on V flattened by rows, [out·in, out·in]: kron(G, A) for symmetric A.

    Args:
        A: the factor of the inputs.
        G: the factor of the outputs.
    """
    size = G.shape[-1] * A.shape[-1]
    product = torch.einsum("...op,...qi->...oipq", G, A)
    return product.reshape(*product.shape[:-4], size, size)


def join(
    weight: Shaped[Tensor, "..."],
    bias: Shaped[Tensor, "..."] | None = None,
    *,
    groups: int = 1,
    transposed: bool = False,
    outputs: int | None = None,
    batch_dims: int = 0,
) -> Shaped[Tensor, "..."]:
    """V = [W b] from a layer's weight and bias.

    Args:
        weight: [*batch, out, in/groups, ...], or [*batch, in, out/groups, ...] if transposed.
        bias: [*batch, out], or None if the layer has none.
        groups: of a grouped convolution.
        transposed: the weight's input axis comes first.
        outputs: of one group, if the weight is flat.
        batch_dims: how many leading axes count several vectors of one parameter space.

    Returns:
        [*batch, out, in (+ 1)]; with more than one group [*batch, groups, out/groups, in (+ 1)].
    """
    batch, shape = weight.shape[:batch_dims], weight.shape[batch_dims:]
    rows, columns, taps = map_sizes(shape, groups, transposed, outputs)
    if transposed:
        V = weight.reshape(*batch, groups, columns // taps, rows, taps).transpose(-3, -2).flatten(-2)
    else:
        V = weight.reshape(*batch, groups, rows, columns)
    if bias is not None:
        V = torch.cat((V, bias.reshape(*batch, groups, rows, 1)), dim=-1)
    return V if groups > 1 else V.squeeze(-3)


def split(
    V: Shaped[Tensor, "..."],
    weight_shape: Sequence[int],
    *,
    bias: bool,
    groups: int = 1,
    transposed: bool = False,
    outputs: int | None = None,
) -> tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."] | None]:
    """Weight and bias from V = [W b]; undoes `join`.

    Args:
        V: [*batch, out, in (+ 1)]; with more than one group [*batch, groups, out/groups, in (+ 1)].
        weight_shape: the weight's shape without batch axes.
        bias: V has the bias as its last column.
        groups: of a grouped convolution.
        transposed: the weight's input axis comes first.
        outputs: of one group, if the weight is flat.

    Returns:
        weight [*batch, *weight_shape], and bias [*batch, out] or None. Views of V where that is possible.
    """
    grouped = V if groups > 1 else V.unsqueeze(-3)
    batch, (_, rows, _) = grouped.shape[:-3], grouped.shape[-3:]
    weight = grouped[..., :-1] if bias else grouped
    if transposed:
        _, columns, taps = map_sizes(weight_shape, groups, transposed, outputs)
        weight = weight.reshape(*batch, groups, rows, columns // taps, taps).transpose(-3, -2)
    shaped = weight.reshape(*batch, *weight_shape)
    return shaped, grouped[..., -1].reshape(*batch, groups * rows) if bias else None


def map_sizes(
    shape: Sequence[int], groups: int, transposed: bool, outputs: int | None
) -> tuple[int, int, int]:
    """Outputs and inputs of one group, and how many of the inputs belong to one entry of a transposed weight's axis.

    Args:
        shape: the weight's.
        groups: of a grouped convolution.
        transposed: the weight's input axis comes first.
        outputs: of one group, if the weight is flat.
    """
    if outputs is not None:
        return outputs, math.prod(shape) // (groups * outputs), 1
    if transposed:
        taps = math.prod(shape[2:])
        return shape[1], shape[0] // groups * taps, taps
    return shape[0] // groups, math.prod(shape[1:]), 1
