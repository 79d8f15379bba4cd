"""Products with the model's Jacobian J = ∂z/∂θ on a batch, without touching the model.

Forward mode: one pass carries z and J v together (Wengert's tangent). Nothing of the model changes: buffers are
copies, so that a BatchNorm's running averages stay; random draws come from a forked generator.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from natgrad.errors import OutputError
from natgrad.tape.adjoint import images_by_reverse
from natgrad.tape.decompose import Unfused
from natgrad.tape.substitute import call_with

Outputs = tuple[Tensor, ...]
Function = Callable[[Mapping[str, Tensor]], Outputs]


@dataclass(frozen=True)
class Batch:
    """What the model and the loss were called with in one forward pass.

    Attributes:
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        targets: what the loss compared the outputs with, or None.
        examples: how many examples there are.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: Any
    examples: int

    def slice(self, start: int, stop: int) -> Batch:
        """The examples from start to stop: every tensor whose first dimension counts examples is cut."""

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() and value.shape[0] == self.examples:
                return value[start:stop]
            return value

        def cut_rows(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() and value.shape[0] % self.examples == 0:
                rows = value.shape[0] // self.examples  # tokens flattened into the first dimension
                return value[start * rows : stop * rows]
            return value

        return replace(
            self,
            args=tree_map(cut, self.args),
            kwargs=tree_map(cut, dict(self.kwargs)),
            targets=tree_map(cut_rows, self.targets),
            examples=stop - start,
        )


@contextmanager
def _undisturbed(rng_state: Tensor | None) -> Iterator[None]:
    """Random draws inside neither see nor move the user's stream (the CPU's; other devices keep theirs)."""
    outer = torch.get_rng_state()
    try:
        if rng_state is not None:
            torch.set_rng_state(rng_state)
        yield
    finally:
        torch.set_rng_state(outer)


def evaluate(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    batch: Batch,
    find_outputs: Callable[[Any], Outputs],
    rng_state: Tensor | None = None,
) -> Outputs:
    """The model's outputs on a batch at other parameters, in the model's present mode.

    Args:
        parameters: name → value, for those that differ from the model's own.
        find_outputs: what the likelihood reads of what the model returns.
        rng_state: the state that dropout starts from; the present one by default.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with _undisturbed(rng_state):
        returned = call_with(model, {**buffers, **parameters}, batch.args, batch.kwargs)
    return find_outputs(returned)


@functools.cache
def _load_forward_mode() -> None:
    """torch compiles its forward-mode rules at first use, with a deprecation warning that no user can act on."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def jacobian_products(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    batch: Batch,
    tangents: Sequence[Mapping[str, Tensor]],
    find_outputs: Callable[[Any], Outputs],
) -> tuple[Outputs, list[Outputs]]:
    """z and J v for several vectors v: by forward-mode differentiation, or in reverse where an operation has none.

    Args:
        parameters: name → value of the trainable parameters.
        tangents: each a name → tangent; a parameter that is not named has tangent zero and costs nothing.

    Returns:
        The outputs, and for each tangent its image, shaped like the outputs; in float32 or more.

    Raises:
        OutputError: an operation of the model has neither a forward-mode derivative nor a second one.
    """
    state = torch.get_rng_state()
    values = {name: value.detach() for name, value in parameters.items()}

    def function(point: Mapping[str, Tensor]) -> Outputs:
        return evaluate(model, point, batch, find_outputs, state)

    try:
        return _in_forward_mode(function, values, tangents)
    except NotImplementedError as lacking:
        try:
            return _in_reverse(function, values, tangents)
        except RuntimeError as error:
            raise OutputError(
                "the adaptive step needs forward-mode derivatives, or second ones, and an operation of the model has "
                f"neither ({lacking}; {error}); give lr= to do without them"
            ) from error


def _in_forward_mode(
    function: Function, values: Mapping[str, Tensor], tangents: Sequence[Mapping[str, Tensor]]
) -> tuple[Outputs, list[Outputs]]:
    outputs: Outputs = ()
    images: list[Outputs] = []
    _load_forward_mode()
    for tangent in tangents:
        # Of attention's kernels only the plain one has a forward-mode derivative; of recurrent networks' none.
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), Unfused():
            duals = {
                name: forward_ad.make_dual(value, tangent[name]) if name in tangent else value
                for name, value in values.items()
            }
            unpacked = [forward_ad.unpack_dual(z) for z in function(duals)]
            outputs = tuple(_full(u.primal) for u in unpacked)
            images.append(
                tuple(_full(torch.zeros_like(u.primal) if u.tangent is None else u.tangent) for u in unpacked)
            )
    return outputs, images


def _in_reverse(
    function: Function, values: Mapping[str, Tensor], tangents: Sequence[Mapping[str, Tensor]]
) -> tuple[Outputs, list[Outputs]]:
    moving = {name: v for name, v in values.items() if any(name in tangent for tangent in tangents)}
    leaves = {name: v.clone().requires_grad_() for name, v in moving.items()}
    rows = {
        name: torch.stack([tangent.get(name, torch.zeros_like(v)) for tangent in tangents])
        for name, v in moving.items()
    }
    outputs, images = images_by_reverse(lambda point: function({**values, **point}), leaves, rows)
    each = [tuple(_full(image[k]) for image in images) for k in range(len(tangents))]
    return tuple(map(_full, outputs)), each


def _full(value: Tensor) -> Tensor:
    """At least in float32: a model may have autocast of its own."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))
