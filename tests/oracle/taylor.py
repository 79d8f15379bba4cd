"""Derivatives of a network by its inputs from nested torch.func, point by point; nothing shared with natgrad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

Model = Callable[[Any], Any]


def of_one(model: Model) -> Callable[[Tensor], Tensor]:
    """The function of one point [d] → [C]."""
    return lambda point: model(point[None])[0]


def gradient(model: Model, x: Tensor) -> Tensor:
    """∂u/∂x, [N, d, C]."""
    return torch.stack([jacrev(of_one(model))(point) for point in x]).transpose(1, 2)


def second(model: Model, x: Tensor) -> Tensor:
    """The Hessians, [N, d, d, C]."""
    return torch.stack([jacrev(jacrev(of_one(model)))(point) for point in x]).movedim(1, -1)


def laplacian(model: Model, x: Tensor) -> Tensor:
    """Δu, [N, C]."""
    return second(model, x).diagonal(dim1=1, dim2=2).sum(-1)


def residual_jacobian(model: nn.Module, residual: Callable[[Model, Tensor], Tensor], x: Tensor) -> Tensor:
    """∂r/∂θ of a residual [N, C] that is a function of model and points: [C·N, P], columns of outputs first."""
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def residuals(parameters: dict[str, Tensor]) -> Tensor:
        return residual(lambda points: functional_call(model, parameters, (points,)), x)

    by_name = jacrev(residuals)(values)
    return torch.cat([by_name[name].transpose(0, 1).flatten(0, 1).flatten(1) for name in values], 1)


def mapped_laplacian(model: Model, x: Tensor) -> Tensor:
    """Δu by batched transforms, which torch can differentiate by parameters again: [N, C]."""
    return vmap(jacrev(jacrev(of_one(model))))(x).diagonal(dim1=2, dim2=3).sum(-1)
