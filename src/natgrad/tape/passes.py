"""One backward pass of signals, read block by block or example by example."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.tape.adjoint import batched_grad
from natgrad.tape.loudness import unscaled
from natgrad.tape.records import Block, LayerRecord
from natgrad.tape.tape import Tape

Rows = tuple[Float[Tensor, "batch shared groups columns"], Float[Tensor, "batch shared groups outputs"]]


@dataclass(frozen=True)
class SignalPass:
    """Signals at the outputs of a recorded forward pass, and what they become at the parameters.

    Attributes:
        tape: the recorded forward pass.
        outputs: the model's outputs.
        signals: a tensor for each output; the loss's constants are inside.
        examples: how many examples the batch holds.
    """

    tape: Tape
    outputs: tuple[Tensor, ...]
    signals: tuple[Tensor, ...]
    examples: int

    def records(self, names: Iterable[str] | None = None) -> dict[Block, list[LayerRecord]]:
        """The records by block; a weight that was used twice has two."""
        by_block: dict[Block, list[LayerRecord]] = {}
        for record in self.tape.records(self.outputs, self.signals, self.examples, names):
            by_block.setdefault(record.block, []).append(record)
        return by_block

    def scores(
        self, parameters: Mapping[str, nn.Parameter], chunk: int = 64
    ) -> Iterator[tuple[slice, dict[str, Float[Tensor, "batch ..."]]]]:
        """Per-example gradients Σ_outputs Jₙᵀ Sₙ of any parameters, a chunk of examples at a time.

        It needs no rule: one batched backward pass with the signals of one example in each. Dear, so it is for
        parameters that no rule covers, in models that are small. Zero for what needs no gradient any more.
        """
        named = [(name, p) for name, p in parameters.items() if p.requires_grad]
        scale = self.tape.loudness([self.signals])
        for start in range(0, self.examples, chunk):
            rows = slice(start, min(start + chunk, self.examples))
            masked = [
                _one_example_each(s * scale, rows, self.examples)
                for s, z in zip(self.signals, self.outputs, strict=True)
                if z.requires_grad
            ]
            outputs = [z for z in self.outputs if z.requires_grad]
            values = [p for _, p in named]
            gradients = batched_grad(outputs, values, masked, rows.stop - rows.start) if named else []
            found = {
                name: unscaled(g, scale)
                for (name, _), g in zip(named, gradients, strict=True)
                if g is not None
            }
            yield (
                rows,
                {
                    name: found[name] if name in found else p.new_zeros(rows.stop - rows.start, *p.shape)
                    for name, p in parameters.items()
                },
            )

    def squares(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Σ of squared per-example gradients of any parameters, each in its shape."""
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for _, scores in self.scores(parameters):
            for name, score in scores.items():
                total[name] += score.square_().sum(0)
        return total


def _one_example_each(signal: Tensor, rows: slice, examples: int) -> Tensor:
    """Row k keeps the signal of example rows.start + k and is zero elsewhere."""
    count = rows.stop - rows.start
    by_example = signal.reshape(examples, -1)
    masked = by_example.new_zeros(count, *by_example.shape)
    index = torch.arange(count, device=signal.device)
    masked[index, index + rows.start] = by_example[rows]
    return masked.reshape(count, *signal.shape)


def merged(records: list[LayerRecord]) -> Rows:
    """Inputs (with the homogeneous coordinate) and signals of one block, its several uses side by side as positions."""
    inputs = [record.homogeneous() for record in records]
    signals = [record.grouped_signals() for record in records]
    if len(records) == 1:
        return inputs[0], signals[0]
    if len({len(x) for x in inputs}) > 1:  # one use was not on the batch: then each row stands for itself
        inputs = [x.reshape(1, -1, *x.shape[2:]) for x in inputs]
        signals = [g.reshape(1, -1, *g.shape[2:]) for g in signals]
    return torch.cat(inputs, dim=1), torch.cat(signals, dim=1)
