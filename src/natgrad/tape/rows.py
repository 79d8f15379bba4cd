"""The rows of F = JᵀJ that a batch's signal passes make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from natgrad.operators.layerrows import BatchRows, LayerRows
from natgrad.tape.columns import LayerColumns
from natgrad.tape.finite import require_finite
from natgrad.tape.passes import SignalPass


def layer_rows(
    passes: list[SignalPass], parameters: Mapping[str, nn.Parameter], *, partial: bool = False
) -> tuple[list[LayerRows], list[str]]:
    """Each linear map's part of the rows, and the names of the parameters that no linear map explains.

    A parameter that acted outside any rule, or on something that is not the batch, is of the latter, and so is its
    whole block. Signals are not copied: they are to be read at once, or `stored`.

    Args:
        passes: of one forward pass, one column each; at least one.
        parameters: those that the rows are about.
        partial: take a linear map for the whole of a parameter that acted outside any rule, too.
    """
    first = passes[0]
    found: dict[str, list[LayerColumns]] = {}
    columns = first.tape.columns(
        first.outputs, [one.signals for one in passes], first.examples, parameters.keys()
    )
    for call in columns:
        found.setdefault(call.block.weight, []).append(call)
    # A map that no output depends on has no rows, and no call here.
    explained = {
        name
        for block in first.tape.blocks.values()
        if block.weight not in found and all(first.tape.covers(name) for name in block.names)
        for name in block.names
    }
    layers = []
    for calls in found.values():
        block = calls[0].block
        uses = [call.use(parameters[block.weight].dtype) for call in calls]
        whole = [use for use in uses if use is not None]
        covered = partial or all(first.tape.covers(name) for name in block.names)
        if len(whole) < len(uses) or not covered:
            continue
        bias = block.bias if block.bias in parameters else None
        layers.append(LayerRows(block.weight, bias, tuple(whole), block.transposed))
        explained.update(block.names)
    return layers, [name for name in parameters if name not in explained]


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
    layers, rest = layer_rows(passes, parameters)
    stored = []
    for layer in layers:
        # A map's inputs may be the user's own tensor; signals were made here.
        kept = layer.map_tensors(lambda g: g, lambda reading: reading.copied())
        stored.append(kept)
    explicit: dict[str, Tensor] = {}
    if rest:
        unexplained = {name: parameters[name] for name in rest}
        by_column = [_scores(one, unexplained) for one in passes]
        explicit = {name: torch.stack([scores[name] for scores in by_column]) for name in rest}
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
