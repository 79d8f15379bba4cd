"""Elementwise functions: u = f(z) has u_k = f'(z) z_k and Σ w u_kk = f'(z) Σ w z_kk + f''(z) Σ w z_k².

Here are f, f' and f'' of each, as few operations as they need; what they do to streams is in one place, below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad.pde.bend import bend
from natgrad.pde.jet import Jet, in_place, refuse, rule

# f(z), f'(z), and f''(z) if it is asked for; None where it is zero.
Taylor = tuple[Tensor, Tensor, Callable[[], Tensor] | None]


def applied(jet: Jet, taylor: Taylor) -> Jet:
    """The jet of f(z)."""
    value, slope, curvature = taylor
    plan = jet.plan
    if not plan.seconds or curvature is None:
        return Jet(value, slope.unsqueeze(1) * jet.streams, plan)
    return Jet(value, bend(slope, curvature(), jet.streams, plan), plan)


def elementwise(*names: str) -> Callable[[Callable[..., Taylor]], Callable[..., Taylor]]:
    """Registers f under some names, with its in-place forms."""

    def register(function: Callable[..., Taylor]) -> Callable[..., Taylor]:
        def out_of_place(input: Tensor, *args: Any, **kwargs: Any) -> Jet:
            if not isinstance(input, Jet):
                refuse(names[0], "depends on the model's inputs by another argument than the first")
            return applied(input, function(input.value, *args, **kwargs))

        def either(input: Any, *args: Any, inplace: bool = False, **kwargs: Any) -> Any:
            result = out_of_place(input, *args, **kwargs)
            return input.become(result) if inplace else result

        rule(*names)(either)
        rule(*(f"{name}_" for name in names))(in_place(out_of_place))
        return function

    return register


@elementwise("tanh")
def tanh(z: Tensor) -> Taylor:
    """f' = 1 − f², f'' = −2 f f'."""
    f = torch.tanh(z)
    slope = 1 - f * f
    return f, slope, lambda: f * slope * -2


@elementwise("sin")
def sin(z: Tensor) -> Taylor:
    """f'' = −f."""
    f = torch.sin(z)
    return f, torch.cos(z), lambda: -f


@elementwise("cos")
def cos(z: Tensor) -> Taylor:
    """f'' = −f."""
    f = torch.cos(z)
    return f, -torch.sin(z), lambda: -f


@elementwise("tan")
def tan(z: Tensor) -> Taylor:
    """f' = 1 + f², f'' = 2 f f'."""
    f = torch.tan(z)
    slope = 1 + f * f
    return f, slope, lambda: f * slope * 2


@elementwise("sinh")
def sinh(z: Tensor) -> Taylor:
    """f'' = f."""
    f = torch.sinh(z)
    return f, torch.cosh(z), lambda: f


@elementwise("cosh")
def cosh(z: Tensor) -> Taylor:
    """f'' = f."""
    f = torch.cosh(z)
    return f, torch.sinh(z), lambda: f


@elementwise("atan", "arctan")
def atan(z: Tensor) -> Taylor:
    """f' = 1 / (1 + z²), f'' = −2 z f'²."""
    slope = 1 / (1 + z * z)
    return torch.atan(z), slope, lambda: -2 * z * slope * slope


@elementwise("exp")
def exp(z: Tensor) -> Taylor:
    """f' = f'' = f."""
    f = torch.exp(z)
    return f, f, lambda: f


@elementwise("expm1")
def expm1(z: Tensor) -> Taylor:
    """f' = f'' = eᶻ."""
    slope = torch.exp(z)
    return torch.expm1(z), slope, lambda: slope


@elementwise("log")
def log(z: Tensor) -> Taylor:
    """f' = 1/z, f'' = −1/z²."""
    slope = 1 / z
    return torch.log(z), slope, lambda: -slope * slope


@elementwise("log1p")
def log1p(z: Tensor) -> Taylor:
    """f' = 1/(1 + z)."""
    slope = 1 / (1 + z)
    return torch.log1p(z), slope, lambda: -slope * slope


@elementwise("sqrt")
def sqrt(z: Tensor) -> Taylor:
    """f' = 1/(2f), f'' = −f'/(2z)."""
    f = torch.sqrt(z)
    slope = 0.5 / f
    return f, slope, lambda: slope / z * -0.5


@elementwise("rsqrt")
def rsqrt(z: Tensor) -> Taylor:
    """f' = −f³/2, f'' = 3 f⁵/4."""
    f = torch.rsqrt(z)
    return f, f**3 * -0.5, lambda: f**5 * 0.75


@elementwise("reciprocal")
def reciprocal(z: Tensor) -> Taylor:
    """f' = −f², f'' = 2 f³."""
    f = torch.reciprocal(z)
    square = f * f
    return f, -square, lambda: f * square * 2


@elementwise("square")
def square(z: Tensor) -> Taylor:
    """z²."""
    return z * z, 2 * z, lambda: torch.full_like(z, 2.0)


@elementwise("abs", "absolute", "__abs__")
def absolute(z: Tensor) -> Taylor:
    """|z|; derivatives at 0 are 0."""
    return torch.abs(z), torch.sign(z), None


@elementwise("erf")
def erf(z: Tensor) -> Taylor:
    """f' = 2 exp(−z²)/√π."""
    slope = torch.exp(-z * z) * (2 / math.sqrt(math.pi))
    return torch.erf(z), slope, lambda: -2 * z * slope


@elementwise("sigmoid", "expit")
def sigmoid(z: Tensor) -> Taylor:
    """f' = f (1 − f), f'' = f' (1 − 2f)."""
    f = torch.sigmoid(z)
    slope = f * (1 - f)
    return f, slope, lambda: slope * (1 - 2 * f)


@elementwise("logsigmoid")
def logsigmoid(z: Tensor) -> Taylor:
    """f' = σ(−z), f'' = −σ(z) σ(−z)."""
    slope = torch.sigmoid(-z)
    return F.logsigmoid(z), slope, lambda: slope * (slope - 1)


@elementwise("softplus")
def softplus(z: Tensor, beta: float = 1, threshold: float = 20) -> Taylor:
    """f' = σ(βz); where torch takes the identity for f, 2e-9 from it, the derivatives are the exact function's."""
    slope = torch.sigmoid(beta * z)
    return F.softplus(z, beta, threshold), slope, lambda: beta * slope * (1 - slope)


@elementwise("silu")
def silu(z: Tensor) -> Taylor:
    """f = z s with s = σ(z): f' = s (1 + z (1 − s)), f'' = s (1 − s) (2 + z (1 − 2s))."""
    s = torch.sigmoid(z)
    rest = 1 - s
    return z * s, s * (1 + z * rest), lambda: s * rest * (2 + z * (1 - 2 * s))


@elementwise("gelu")
def gelu(z: Tensor, *, approximate: str = "none") -> Taylor:
    """f = z Φ(z), f' = Φ + z φ, f'' = φ (2 − z²); or z (1 + tanh v)/2 with v = √(2/π) (z + 0.044715 z³)."""
    f = F.gelu(z, approximate=approximate)
    if approximate == "none":
        density = torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
        slope = 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * density
        return f, slope, lambda: density * (2 - z * z)
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (z + cubic * z**3))
    dv = scale * (1 + 3 * cubic * z * z)
    dt = 1 - t * t
    slope = 0.5 * (1 + t) + 0.5 * z * dt * dv
    return f, slope, lambda: dt * (dv + z * (3 * scale * cubic * z - t * dv * dv))


@elementwise("elu")
def elu(z: Tensor, alpha: float = 1.0) -> Taylor:
    """Of z ≤ 0: α (eᶻ − 1)."""
    slope = torch.where(z > 0, 1.0, alpha * torch.exp(z.clamp(max=0)))
    return F.elu(z, alpha), slope, lambda: torch.where(z > 0, 0.0, slope)


@elementwise("celu")
def celu(z: Tensor, alpha: float = 1.0) -> Taylor:
    """Of z ≤ 0: α (e^{z/α} − 1)."""
    slope = torch.where(z > 0, 1.0, torch.exp(z.clamp(max=0) / alpha))
    return F.celu(z, alpha), slope, lambda: torch.where(z > 0, 0.0, slope / alpha)


@elementwise("selu")
def selu(z: Tensor) -> Taylor:
    """A scaled elu (Klambauer et al. 2017)."""
    scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
    slope = torch.where(z > 0, scale, scale * alpha * torch.exp(z.clamp(max=0)))
    return F.selu(z), slope, lambda: torch.where(z > 0, 0.0, slope)


@elementwise("relu")
def relu(z: Tensor) -> Taylor:
    """Its second derivative is taken to be 0 everywhere, as autograd does."""
    return torch.relu(z), (z > 0).to(z.dtype), None


@elementwise("leaky_relu")
def leaky_relu(z: Tensor, negative_slope: float = 0.01) -> Taylor:
    """Its second derivative is taken to be 0 everywhere, as autograd does."""
    slope = torch.where(z > 0, 1.0, negative_slope).to(z.dtype)
    return F.leaky_relu(z, negative_slope), slope, None


@elementwise("clamp", "clip")
def clamp(z: Tensor, min: Any = None, max: Any = None) -> Taylor:
    """Derivatives are zero where it acts."""
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        refuse("clamp", "with tensors for bounds has no rule in natgrad.pde")
    f = torch.clamp(z, min, max)
    return f, (f == z).to(z.dtype), None


def power(z: Tensor, exponent: float | Tensor) -> Taylor:
    """f' = p z^{p−1}, f'' = p (p − 1) z^{p−2}; a number p may make these vanish, also at z = 0."""
    p = exponent
    number = not isinstance(p, Tensor)
    slope = torch.zeros_like(z) if number and p == 0 else p * z ** (p - 1)
    return z**p, slope, None if number and p in (0, 1) else lambda: p * (p - 1) * z ** (p - 2)
