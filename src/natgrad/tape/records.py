"""What one call did with its parameters: the frozen facts that every metric reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.tape.geometry import Geometry


@dataclass(frozen=True)
class Block:
    """The parameters that acted together as one (grouped) linear map W̃ = [W b].

    Attributes:
        weight: the weight's name; it is the block's name too.
        bias: the bias' name, or None.
        rule: the kind of call: ``"linear"``, ``"matmul"``, ``"conv2d"``, ...
        groups: the number of groups; each has its own pair of factors.
        inputs: features each output reads, within a group, without the homogeneous coordinate.
        outputs: features that each group writes.
        transposed: the weight is stored with its input axis first (see `linalg.kronecker`).
        flat: the weight has several axes of groups, inputs or outputs, which are one each in the map.
    """

    weight: str
    bias: str | None
    rule: str
    groups: int
    inputs: int
    outputs: int
    transposed: bool = False
    flat: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names: the weight's, and the bias' if there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def columns(self) -> int:
        """The side of the input factor A: inputs, and one for the bias."""
        return self.inputs + (self.bias is not None)


@dataclass(frozen=True)
class LayerRecord:
    """One call of one block, with the signals of one backward pass.

    Per example n the block's score is Σ_s signals[n, s] ⊗ [inputs[n, s], 1].
    """

    block: Block
    geometry: Geometry
    raw_inputs: Tensor
    raw_signals: Tensor
    examples: int
    has_bias: bool

    @cached_property
    def inputs(self) -> Float[Tensor, "batch shared f"]:
        """Rows that the weight multiplied, without the homogeneous coordinate."""
        return self.geometry.inputs(self.raw_inputs, self.examples)

    @cached_property
    def signals(self) -> Float[Tensor, "batch shared f"]:
        """The signals at the same rows; the loss's constants are inside them."""
        return self.geometry.signals(self.raw_signals, self.examples)

    def homogeneous(self) -> Float[Tensor, "batch shared groups columns"]:
        """Inputs by group, with the homogeneous coordinate when the block has a bias (0 where this call had none)."""
        x = self.inputs
        x = x.reshape(*x.shape[:2], self.block.groups, -1)
        if self.block.bias is None:
            return x
        fill = torch.full((*x.shape[:3], 1), float(self.has_bias), dtype=x.dtype, device=x.device)
        return torch.cat([x, fill], dim=-1)

    def grouped_signals(self) -> Float[Tensor, "batch shared groups outputs"]:
        """Signals by group."""
        g = self.signals
        return g.reshape(*g.shape[:2], self.block.groups, -1)
