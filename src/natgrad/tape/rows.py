"""The rows of F = JᵀJ that a batch's signal passes make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.operators.layerrows import BatchRows, LayerRows
from natgrad.tape.columns import LayerColumns
from natgrad.tape.elements import ElementColumns
from natgrad.tape.finite import require_finite
from natgrad.tape.passes import SignalPass


@dataclass(frozen=True)
class Explained:
    """What the tape knows of the rows of J: each parameter is in one of the parts, or in the rest.

    Attributes:
        layers: linear maps.
        elements: parameters that acted entry by entry or were looked up.
        tied: weights that were a linear map and looked up too, such as a language model's embedding.
        rest: the names of the parameters that neither explains.
    """

    layers: list[LayerRows]
    elements: list[ElementColumns]
    tied: list[tuple[LayerRows, ElementColumns]]
    rest: list[str]

    def scores(self) -> Iterator[tuple[str, Float[Tensor, "c n *shape"]]]:
        """The rows of what isn't a linear map alone, in full."""
        for element in self.elements:
            yield element.name, element.scores()
        for layer, element in self.tied:
            weight, _ = layer.explicit(slice(None))
            assert weight is not None
            scores = element.scores()
            yield element.name, scores + weight.movedim(2, 0).reshape(scores.shape)

    def squares(self) -> dict[str, Tensor]:
        """The diagonal of JᵀJ of all that is explained, by parameter; flat for linear maps."""
        found: dict[str, Tensor] = {}
        for layer in self.layers:
            found |= layer.squares()
        for element in self.elements:
            found[element.name] = element.squares()
        for layer, element in self.tied:
            found[element.name] = _tied_squares(layer, element)
        return found


def explain(
    passes: list[SignalPass], parameters: Mapping[str, nn.Parameter], *, partial: bool = False
) -> Explained:
    """How the tape explains the rows of some parameters.

    A parameter that acted outside any rule, or on something that is not the batch, is not explained, and neither is
    its whole block. Signals are not copied: they are to be read at once, or `stored`.

    Args:
        passes: of one forward pass, one column each; at least one.
        parameters: those that the rows are about.
        partial: take a linear map for the whole of a parameter that acted outside any rule, too.
    """
    first = passes[0]
    tape = first.tape
    found: dict[str, list[LayerColumns]] = {}
    calls, elements = tape.columns(
        first.outputs, [one.signals for one in passes], first.examples, parameters.keys()
    )
    for call in calls:
        found.setdefault(call.block.weight, []).append(call)
    acted = {element.name: element for element in elements if tape.covers(element.name)}
    # What no output depends on has no rows, and nothing came back to it.
    explained = {name for name in tape.elements if tape.covers(name)} - {
        name for block in tape.blocks.values() for name in block.names
    }
    for block in tape.blocks.values():
        if block.weight not in found and all(tape.covers(name) for name in block.names):
            explained.update(block.names)
    layers, tied = [], []
    for calls in found.values():
        block = calls[0].block
        uses = [call.use(parameters[block.weight].dtype) for call in calls]
        whole = [use for use in uses if use is not None]
        covered = partial or all(tape.covers(name) for name in block.names)
        if len(whole) < len(uses) or not covered:
            acted.pop(block.weight, None)
            continue
        bias = block.bias if block.bias in parameters else None
        explained.update(block.names)
        if block.weight not in acted:
            layers.append(LayerRows(block.weight, bias, tuple(whole), block.transposed))
            continue
        tied.append((LayerRows(block.weight, None, tuple(whole)), acted.pop(block.weight)))
        if bias is not None:
            layers.append(LayerRows(None, bias, tuple(whole)))
    rest = [name for name in parameters if name not in explained]
    return Explained(layers, list(acted.values()), tied, rest)


def _tied_squares(layer: LayerRows, element: ElementColumns) -> Tensor:
    """Σ (s + t)² of the scores s as a linear map and t as a table."""
    total = torch.zeros_like(element.parameter)
    for part in layer.chunks(total.numel()):
        weight, _ = layer.explicit(part)
        assert weight is not None
        for column, own in enumerate(weight.unbind(2)):
            total += element.score(column, part).add_(own.reshape(-1, *total.shape)).square_().sum(0)
    return total


def batch_rows(
    passes: Iterable[SignalPass], parameters: Mapping[str, nn.Parameter], scale: float = 1.0
) -> BatchRows:
    """All rows of one batch, as a value: nothing that happens to the model or the data changes it.

    Args:
        passes: of one forward pass, one column each; at least one.
        parameters: those that the rows are about.
        scale: a factor of all rows.

    Raises:
        NonFiniteError: an input or a signal is not finite; says of which parameter.
    """
    passes = list(passes)
    explained = explain(passes, parameters)
    stored = []
    for layer in explained.layers:
        # A map's inputs may be the user's own tensor; signals were made here.
        kept = layer.map_tensors(lambda g: g, lambda reading: reading.copied())
        stored.append(kept)
    explicit = dict(explained.scores())
    if explained.rest:
        unexplained = {name: parameters[name] for name in explained.rest}
        by_column = [_scores(one, unexplained) for one in passes]
        explicit |= {name: torch.stack([scores[name] for scores in by_column]) for name in unexplained}
    rows = BatchRows(len(passes), passes[0].examples, tuple(stored), explicit, scale)
    require_finite(rows.named_sums().items())
    return rows


def _scores(one: SignalPass, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    chunks = [scores for _, scores in one.scores(parameters)]
    return {name: torch.cat([chunk[name] for chunk in chunks]).detach() for name in parameters}


def portions(passes: Iterable[SignalPass], most_bytes: int) -> Iterator[list[SignalPass]]:
    """The passes, as many at a time as have signals of so many bytes, but at least one."""
    held: list[SignalPass] = []
    for one in passes:
        held.append(one)
        if (len(held) + 1) * one.tape.column_bytes > most_bytes:
            yield held
            held = []
    if held:
        yield held
