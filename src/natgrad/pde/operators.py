"""Differential operators of a network: what residuals are made of.

Each takes a model that maps points [N, d] to [N, C] and returns a row for each point, so that a residual is an
expression of them. A residual is what should be zero: heat(model, x) − f solves u_t = κ Δu + f.
"""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError
from natgrad.pde.derivatives import Derivatives, Model, derivatives, require_points

Coefficient: TypeAlias = float | Tensor


def value_and_gradient(model: Model, x: Tensor) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n d c"]]:
    """The values u and ∂u/∂x_k, in one pass.

    Args:
        model: [N, d] → [N, C].
        x: the points [N, d].

    Raises:
        NatgradError: as `derivatives`.
    """
    found = derivatives(model, x)
    return found.value, found.gradient


def gradient(model: Model, x: Tensor) -> Float[Tensor, "n d c"]:
    """The gradient ∂u/∂x_k: row k is of coordinate k.

    Args:
        model: [N, d] → [N, C].
        x: the points [N, d].

    Raises:
        NatgradError: as `derivatives`.
    """
    return derivatives(model, x).gradient


def laplacian(model: Model, x: Tensor) -> Float[Tensor, "n c"]:
    """The Laplacian Δu = Σ_k ∂²u/∂x_k², of each output. Poisson's equation −Δu = f has the residual Δu + f.

    Args:
        model: [N, d] → [N, C].
        x: the points [N, d].

    Raises:
        NatgradError: as `derivatives`.
    """
    return _second(derivatives(model, x, second="laplacian"))[:, 0]


def divergence(model: Model, x: Tensor) -> Float[Tensor, "n 1"]:
    """The divergence Σ_k ∂u_k/∂x_k of a vector field.

    Args:
        model: [N, d] → [N, d].
        x: the points [N, d].

    Raises:
        ConfigError: the model has not as many outputs as inputs.
        NatgradError: as `derivatives`.
    """
    slopes = derivatives(model, x).gradient
    if slopes.shape[1] != slopes.shape[2]:
        raise ConfigError(
            f"divergence needs as many outputs as inputs, but the model maps {slopes.shape[1]} to {slopes.shape[2]}"
        )
    return slopes.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)


def helmholtz(model: Model, x: Tensor, wavenumber: Coefficient) -> Float[Tensor, "n c"]:
    """Δu + k² u.

    Args:
        model: [N, d] → [N, C].
        x: the points [N, d].
        wavenumber: k; a number, or a tensor that broadcasts with [N, C].

    Raises:
        NatgradError: as `derivatives`.
    """
    _require_rows("wavenumber", wavenumber, x)
    found = derivatives(model, x, second="laplacian")
    return _second(found)[:, 0] + wavenumber**2 * found.value


def heat(model: Model, x: Tensor, diffusivity: Coefficient = 1.0, time: int = -1) -> Float[Tensor, "n c"]:
    """u_t − κ Δu, with Δ over all coordinates but time.

    Args:
        model: [N, d] → [N, C].
        x: the points [N, d] in space and time; d ≥ 2.
        diffusivity: κ; a number, or a tensor that broadcasts with [N, C].
        time: which coordinate is t; the last by default.

    Raises:
        ConfigError: there is no such coordinate, or no other.
        NatgradError: as `derivatives`.
    """
    time = _time(x, time)
    _require_rows("diffusivity", diffusivity, x)
    found = derivatives(model, x, second=[_space(x, time)])
    return found.gradient[:, time] - diffusivity * _second(found)[:, 0]


def wave(model: Model, x: Tensor, speed: Coefficient = 1.0, time: int = -1) -> Float[Tensor, "n c"]:
    """u_tt − c² Δu, with Δ over all coordinates but time.

    Args:
        model: [N, d] → [N, C].
        x: the points [N, d] in space and time; d ≥ 2.
        speed: c; a number, or a tensor that broadcasts with [N, C].
        time: which coordinate is t; the last by default.

    Raises:
        ConfigError: there is no such coordinate, or no other.
        NatgradError: as `derivatives`.
    """
    time = _time(x, time)
    _require_rows("speed", speed, x)
    space = _space(x, time)
    second = _second(derivatives(model, x, second=[space, [1 - w for w in space]]))
    return second[:, 1] - speed**2 * second[:, 0]


def advection(model: Model, x: Tensor, velocity: Tensor, time: int = -1) -> Float[Tensor, "n c"]:
    """u_t + v·∇u, with ∇ over all coordinates but time.

    Args:
        model: [N, d] → [N, C].
        x: the points [N, d] in space and time; d ≥ 2.
        velocity: v, a number for each coordinate of space, in their order: [d − 1], or [N, d − 1].
        time: which coordinate is t; the last by default.

    Raises:
        ConfigError: there is no such coordinate, or no other; or a velocity of another shape.
        NatgradError: as `derivatives`.
    """
    time = _time(x, time)
    N, d = x.shape
    if velocity.shape not in ((d - 1,), (N, d - 1)):
        raise ConfigError(f"velocity must be [{d - 1}] or [{N}, {d - 1}], but is {list(velocity.shape)}")
    slopes = gradient(model, x)
    space = [k for k in range(d) if k != time]
    return slopes[:, time] + (velocity.unsqueeze(-1) * slopes[:, space]).sum(1)


def burgers(model: Model, x: Tensor, viscosity: Coefficient, time: int = -1) -> Float[Tensor, "n 1"]:
    """u_t + u u_x − ν u_xx, in one dimension of space.

    Args:
        model: [N, 2] → [N, 1].
        x: the points (x, t), [N, 2].
        viscosity: ν ≥ 0; a number, or a tensor that broadcasts with [N, 1].
        time: which coordinate is t; the last by default.

    Raises:
        ConfigError: not two coordinates, or not one output.
        NatgradError: as `derivatives`.
    """
    time = _time(x, time)
    if x.shape[1] != 2:
        raise ConfigError(
            f"burgers is for one dimension of space and time: points [N, 2], not {list(x.shape)}"
        )
    _require_rows("viscosity", viscosity, x)
    found = derivatives(model, x, second=[_space(x, time)])
    u = found.value
    if u.shape[1] != 1:
        raise ConfigError(f"burgers is for one function: a model with one output, not {u.shape[1]}")
    return found.gradient[:, time] + u * found.gradient[:, 1 - time] - viscosity * _second(found)[:, 0]


def _second(found: Derivatives) -> Tensor:
    assert found.second is not None
    return found.second


def _space(x: Tensor, time: int) -> list[float]:
    """The weights of the Laplacian in space."""
    return [float(k != time) for k in range(x.shape[1])]


def _time(x: Tensor, time: int) -> int:
    require_points(x)
    d = x.shape[1]
    if d < 2:
        raise ConfigError(f"points in space and time have at least two coordinates, but are {list(x.shape)}")
    if not -d <= time < d:
        raise ConfigError(f"time={time} is no coordinate of points {list(x.shape)}")
    return time % d


def _require_rows(name: str, coefficient: Coefficient, x: Tensor) -> None:
    """A tensor [N] would broadcast to [N, N]."""
    if isinstance(coefficient, Tensor) and coefficient.dim() not in (0, 2):
        raise ConfigError(
            f"{name} must be a number or a tensor [N, 1], but is {list(coefficient.shape)} for {len(x)} points"
        )
