"""Several backward passes through one forward pass: the same inputs, and a column of signals from each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from natgrad.operators.layerrows import Use
from natgrad.operators.readings import Positions
from natgrad.tape.adjoint import batched_grad
from natgrad.tape.geometry import ConvolutionGeometry, Geometry, LinearGeometry
from natgrad.tape.records import Block

# Passes whose signals together take fewer bytes than this are batched: such small operations cost more to call than
# to compute. Above it one pass after the other is as fast or faster, as its tensors stay in the cache (measured on two
# cores: ten passes of a 784-128-10 MLP, 512 examples, take half the time batched; of a LeNet 1.2 times the time).
BATCHED_BYTES = 2**22


@dataclass(frozen=True)
class LayerColumns:
    """One call of one block, with the signals of several backward passes; otherwise as `LayerRecord`."""

    block: Block
    geometry: Geometry
    raw_inputs: Tensor
    raw_signals: tuple[Tensor, ...]
    examples: int
    has_bias: bool

    def use(self, dtype: torch.dtype) -> Use | None:
        """The call in the form of factored rows; None if what it acted on was not the batch.

        Args:
            dtype: the parameters'; under autocast inputs and signals have another.
        """
        geometry, examples = self.geometry, self.examples
        raw, signals = self.raw_inputs.to(dtype), [g.to(dtype) for g in self.raw_signals]
        if isinstance(geometry, ConvolutionGeometry):
            reading = geometry.reading(raw)
            if len(reading) != examples:
                return None
            columns = tuple(
                geometry.signals(g, examples).transpose(1, 2).unflatten(1, (geometry.groups, -1))
                for g in signals
            )
            return Use(reading, columns, self.has_bias)
        inputs = geometry.inputs(raw, examples)
        if len(inputs) != examples or (raw.dim() == 1 and not isinstance(geometry, LinearGeometry)):
            return None
        groups = geometry.groups
        columns = tuple(
            geometry.signals(g, examples).unflatten(2, (groups, -1)).permute(0, 2, 3, 1) for g in signals
        )
        return Use(Positions(inputs, groups), columns, self.has_bias)


def send_back(
    outputs: Sequence[Tensor],
    edges: Sequence[GradientEdge],
    signals: Sequence[Sequence[Tensor]],
    nbytes: int,
) -> list[tuple[Tensor | None, ...]]:
    """What becomes of several sets of signals at some edges of the graph, which is kept.

    Args:
        outputs: where signals start; each needs a gradient.
        edges: where they are read.
        signals: for each pass, a tensor for each output.
        nbytes: what one pass brings to the edges.

    Returns:
        For each pass, a tensor for each edge; None where it depends on no output.
    """
    if len(signals) > 1 and nbytes * len(signals) <= BATCHED_BYTES:
        stacked = [torch.stack(parts) for parts in zip(*signals, strict=True)]
        batched = batched_grad(outputs, edges, stacked, len(signals))
        columns = [[None] * len(signals) if g is None else g.unbind() for g in batched]
        return list(zip(*columns, strict=True))
    return [torch.autograd.grad(outputs, edges, one, retain_graph=True, allow_unused=True) for one in signals]
