"""Products with one batch's part of a curvature matrix, by running the model again: nothing of J is kept.

    F v = Jᵀ (H (J v)),   H in the outputs,

forward-mode through the model, H there, and back in reverse (Schraudolph 2002, "Fast curvature matrix-vector products
for second-order gradient descent"). Several vectors go through together. It costs three passes through the model for
each vector and product, and no memory between them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from natgrad.errors import OutputError
from natgrad.likelihoods import Likelihood
from natgrad.likelihoods.base import bare
from natgrad.tape.adjoint import batched_grad, images_by_reverse, loops_allowed
from natgrad.tape.decompose import Unfused
from natgrad.tape.jacobian import Batch, Outputs, _load_forward_mode, _undisturbed
from natgrad.tape.output_curvature import InOutputs, times
from natgrad.tape.output_curvature import of_likelihood as of_likelihood
from natgrad.tape.output_curvature import of_loss as of_loss
from natgrad.tape.output_curvature import of_signals as of_signals
from natgrad.tape.substitute import call_with

Rows = dict[str, Tensor]
# Vectors that go through the model together.
AT_ONCE = 16


@dataclass(frozen=True)
class Snapshot:
    """A model as it is at one moment, to be evaluated there again whatever becomes of it.

    Attributes:
        model: the model.
        parameters: copies of its parameters.
        buffers: copies of its buffers.
        modes: for each module, whether it is in training.
    """

    model: nn.Module
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    modes: tuple[bool, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """The model as it is now."""
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        return cls(model, parameters, buffers, tuple(module.training for module in model.modules()))

    @contextlib.contextmanager
    def mode(self) -> Iterator[None]:
        """Each module in the mode that it had; afterwards as it was found."""
        modules = list(self.model.modules())
        found = [module.training for module in modules]
        try:
            for module, training in zip(modules, self.modes, strict=True):
                module.training = training
            yield
        finally:
            for module, training in zip(modules, found, strict=True):
                module.training = training


@dataclass(frozen=True)
class Replay:
    """One batch's part of a curvature matrix, as a product.

    The data is kept as it was given, and not copied.

    Attributes:
        product: A v for K vectors, named tensors [K, *shape].
    """

    product: Callable[[Rows], Rows]

    @classmethod
    def gauss_newton(
        cls,
        snapshot: Snapshot,
        names: Sequence[str],
        batch: Batch,
        find_outputs: Callable[[Any], Outputs],
        in_outputs: InOutputs,
        rng_state: Tensor | None = None,
    ) -> Replay:
        """JᵀHJ, with H as in `tape.output_curvature`.

        Args:
            snapshot: the model.
            names: the parameters that the matrix is about.
            batch: what the model is called with.
            find_outputs: what H is about, of what the model returns.
            in_outputs: H.
            rng_state: where the model's random draws start from; the present state by default.
        """
        model = _Function(snapshot, tuple(names), batch, find_outputs, _state(rng_state))

        def product(rows: Rows) -> Rows:
            z, images = model.images(rows)
            with torch.no_grad():
                curved = in_outputs(z, images)
            return model.pulled_back(curved)

        return cls(_portioned(product))

    @classmethod
    def hessian(
        cls,
        snapshot: Snapshot,
        names: Sequence[str],
        batch: Batch,
        find_outputs: Callable[[Any], Outputs],
        likelihood: Likelihood,
        weights: Float[Tensor, "n"] | None = None,
        rng_state: Tensor | None = None,
    ) -> Replay:
        """∇²L of the loss on the batch, by differentiating its gradient (Pearlmutter 1994); it may be indefinite.

        All functions of the model must have second derivatives. (Of one marked `once_differentiable` torch may leave
        out the second in silence.)

        Args:
            snapshot: the model.
            names: the parameters that the matrix is about.
            batch: what the model is called with, and the targets.
            find_outputs: what the likelihood reads of what the model returns.
            likelihood: of the loss.
            weights: a factor of each example's part.
            rng_state: where the model's random draws start from; the present state by default.
        """
        model = _Function(snapshot, tuple(names), batch, find_outputs, _state(rng_state))

        def product(rows: Rows) -> Rows:
            # Of attention's kernels only this one can be differentiated twice; of recurrent networks' none.
            with sdpa_kernel(SDPBackend.MATH), Unfused():
                parameters = model.leaves()
                z = model(parameters)
                loss = likelihood.loss(bare(z), batch.targets)
                slopes = torch.autograd.grad(loss, z, create_graph=True)
                weighted = [times(s, weights) for s in slopes]
                values = list(parameters.values())
                gradient = torch.autograd.grad(z, values, weighted, create_graph=True, allow_unused=True)
                used = [k for k, g in enumerate(gradient) if g is not None and g.requires_grad]
                count = len(next(iter(rows.values())))
                if used:
                    found = batched_grad(
                        [gradient[k] for k in used], values, [rows[model.names[k]] for k in used], count
                    )
                else:
                    found = [None] * len(values)
            return model.named(found, count)

        return cls(_portioned(product))


def total_product(replays: Sequence[Replay], scales: Sequence[float]) -> Callable[[Rows], Rows]:
    """Σ scale · A v over batches."""

    def product(rows: Rows) -> Rows:
        total: Rows = {}
        for replay, scale in zip(replays, scales, strict=True):
            for name, own in replay.product(rows).items():
                total[name] = total[name].add_(own, alpha=scale) if name in total else own * scale
        return total

    return product


@dataclass(frozen=True)
class _Function:
    """θ ↦ z on one batch."""

    snapshot: Snapshot
    names: tuple[str, ...]
    batch: Batch
    find_outputs: Callable[[Any], Outputs]
    rng_state: Tensor

    def __call__(self, parameters: Mapping[str, Tensor]) -> Outputs:
        buffers = {name: value.clone() for name, value in self.snapshot.buffers.items()}
        values = {**self.snapshot.parameters, **buffers, **parameters}
        with self.snapshot.mode(), _undisturbed(self.rng_state):
            returned = call_with(self.snapshot.model, values, self.batch.args, self.batch.kwargs)
        return self.find_outputs(returned)

    def leaves(self) -> Rows:
        """The parameters as leaves of a new graph."""
        return {name: self.snapshot.parameters[name].detach().requires_grad_() for name in self.names}

    def images(self, rows: Rows) -> tuple[Outputs, Outputs]:
        """z, and J v for K vectors."""
        try:
            return self._forward_mode(rows)
        except RuntimeError:  # some operation has no derivative of this mode, or can't be batched
            pass
        try:
            return images_by_reverse(self, self.leaves(), rows)
        except RuntimeError as error:
            raise OutputError(
                "products with the curvature need forward-mode derivatives, or second ones, and an operation of the "
                f"model has neither ({error})"
            ) from error

    def _forward_mode(self, rows: Rows) -> tuple[Outputs, Outputs]:
        _load_forward_mode()
        point = {name: self.snapshot.parameters[name] for name in self.names}

        def one(tangent: Rows) -> tuple[Outputs, Outputs]:
            return cast("tuple[Outputs, Outputs]", torch.func.jvp(self, (point,), (tangent,)))

        # Of attention's kernels only the plain one has a forward-mode derivative; of recurrent networks' none.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Unfused(), loops_allowed():
            z, images = torch.func.vmap(one, randomness="same")(rows)
        return tuple(part[0] for part in z), images

    def pulled_back(self, vectors: Outputs) -> Rows:
        """Jᵀ w for K vectors."""
        with torch.enable_grad():
            parameters = self.leaves()
            z = self(parameters)
            live = [k for k, one in enumerate(z) if one.requires_grad]
            found: list[Tensor | None] = [None] * len(parameters)
            if live:
                found = batched_grad(
                    [z[k] for k in live],
                    list(parameters.values()),
                    [vectors[k] for k in live],
                    len(vectors[0]),
                )
        return self.named(found, len(vectors[0]))

    def named(self, found: Sequence[Tensor | None], count: int) -> Rows:
        """By name, with zeros where a parameter has no part in the outputs."""
        return {
            name: self.snapshot.parameters[name].new_zeros(count, *self.snapshot.parameters[name].shape)
            if g is None
            else g.detach()
            for name, g in zip(self.names, found, strict=True)
        }


def _state(rng_state: Tensor | None) -> Tensor:
    return torch.get_rng_state() if rng_state is None else rng_state


def _portioned(product: Callable[[Rows], Rows]) -> Callable[[Rows], Rows]:
    """A few vectors at a time."""

    def portioned(rows: Rows) -> Rows:
        count = len(next(iter(rows.values())))
        if count == 0:
            return dict(rows)
        parts = [
            product({name: v[start : start + AT_ONCE] for name, v in rows.items()})
            for start in range(0, count, AT_ONCE)
        ]
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return portioned
