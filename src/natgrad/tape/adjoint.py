"""J v and Jᵀ u in reverse mode: Jᵀ for several vectors at once, and J as the derivative of u ↦ Jᵀu, which is linear."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.attention import SDPBackend, sdpa_kernel

from natgrad.tape.decompose import Unfused

Rows = Mapping[str, Tensor]
Places = Sequence[Tensor] | Sequence[GradientEdge]


def images_by_reverse(
    function: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]], leaves: Rows, rows: Rows
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """z and J v for K vectors by two reverse passes, for functions that have no forward mode.

    Args:
        function: θ ↦ z.
        leaves: θ, as leaves of a new graph.
        rows: name → [K, *shape] for each of them.

    Raises:
        RuntimeError: some function can be differentiated only once.
    """
    # Of attention's kernels only this one can be differentiated twice; of recurrent networks' none.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), Unfused():
        z = function(leaves)
        count = len(next(iter(rows.values())))
        images = [one.new_zeros(count, *one.shape) for one in z]
        live = [k for k, one in enumerate(z) if one.requires_grad]
        if live:
            u = [_chance(z[k]).requires_grad_() for k in live]
            back = torch.autograd.grad(
                [z[k] for k in live], list(leaves.values()), u, create_graph=True, allow_unused=True
            )
            used = {name: g for name, g in zip(leaves, back, strict=True) if g is not None}
            linear = {name: g for name, g in used.items() if g.requires_grad}
            found = batched_grad(list(linear.values()), u, [rows[name] for name in linear], count)
            for k, one in zip(live, found, strict=True):
                images[k] = images[k] if one is None else one.detach()
            _require_adjoint([images[k][0] for k in live], u, used, rows)
    return tuple(one.detach() for one in z), tuple(images)


def batched_grad(
    outputs: Places, inputs: Places, vectors: Sequence[Tensor], count: int
) -> list[Tensor | None]:
    """The vector-Jacobian products of K vectors; the graph is kept."""

    def grad(given: Sequence[Tensor], batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            outputs, inputs, given, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )

    if count > 1:
        with contextlib.suppress(RuntimeError), loops_allowed():  # an operation may have no batched form
            return list(grad(vectors, True))
    each = [grad([v[k] for v in vectors], False) for k in range(count)]
    return [None if any(g is None for g in gs) else torch.stack(gs) for gs in zip(*each, strict=True)]


@contextlib.contextmanager
def loops_allowed() -> Iterator[None]:
    """Operations that torch can batch by a loop alone are slow, and right: no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield


def _chance(like: Tensor) -> Tensor:
    """Random numbers of a tensor's shape, without a use of the user's generator."""
    generator = torch.Generator(device=like.device).manual_seed(0)
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


@torch.no_grad()
def _require_adjoint(images: Sequence[Tensor], u: Sequence[Tensor], back: Rows, rows: Rows) -> None:
    """Sees that ⟨Jv, u⟩ = ⟨v, Jᵀu⟩: a function that is differentiable once only drops out without a word.

    Raises:
        RuntimeError: it does not hold.
    """
    forward = sum(float((one * w).sum()) for one, w in zip(images, u, strict=True))
    reverse = sum(float((rows[name][0] * g).sum()) for name, g in back.items())
    lengths = [
        sum(float(t.square().sum()) for t in parts) ** 0.5
        for parts in (images, u, [rows[name][0] for name in back], back.values())
    ]
    scale = lengths[0] * lengths[1] + lengths[2] * lengths[3]
    if abs(forward - reverse) > torch.finfo(u[0].dtype).eps ** 0.6 * scale:
        raise RuntimeError("a function can be differentiated only once")
