"""Σ of outer products of per-example scores, the dense blocks of F, without a score where one position allows.

For two linear maps l and m with one position each, a score is g ⊗ ã, and the block of F that couples them is

    F_lm[(o,i), (p,j)] = Σₙ (Σ_c g_l[c,n,o] g_m[c,n,p]) · ã_l[n,i] ã_m[n,j],

so that the sum over the signal columns c comes first, at the price of the outputs alone, and one product over the
examples follows: with C columns it takes a C-th of the work of the product of scores. Other parameters (shared
positions, or no rule) have explicit scores; they are the case ã = 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.linalg import accumulate_gram, split
from natgrad.operators import ParameterSpace
from natgrad.tape.passes import SignalPass, merged

# Signals of so many bytes wait to be contracted together; products of examples are formed so many numbers at a time.
WAITING_BYTES = 2**27
CHUNK = 2**21


@dataclass(frozen=True)
class Part:
    """Parameters whose scores are g ⊗ ã, laid out [outputs, columns]; or explicit ones, with one column of ones.

    Attributes:
        space: the parameters.
        outputs: the length of g; of an explicit score all of it.
        columns: the length of ã.
        factored: whether scores are outer products.
    """

    space: ParameterSpace
    outputs: int
    columns: int
    factored: bool

    def places(self) -> Iterator[tuple[str, slice, slice]]:
        """Each parameter's place in [outputs, columns]."""
        if not self.factored:
            for name in self.space.names:
                yield name, self.space.slices[name], slice(0, 1)
            return
        weight, *bias = self.space.names
        inputs = self.columns - len(bias)
        yield weight, slice(0, self.outputs), slice(0, inputs)
        for name in bias:
            yield name, slice(0, self.outputs), slice(inputs, self.columns)


@dataclass
class _Waiting:
    """A part's inputs, and its signals column by column."""

    inputs: Float[Tensor, "batch columns"] | None
    signals: list[Float[Tensor, "batch outputs"]] = field(default_factory=list)


class Moments:
    """Σ s sᵀ of per-example scores, for groups of parameters that are coupled among themselves.

    Args:
        groups: the spaces of the groups.
        parameters: name → parameter, of all groups.
    """

    def __init__(self, groups: Sequence[ParameterSpace], parameters: Mapping[str, nn.Parameter]) -> None:
        self.groups = list(groups)
        self._parameters = {name: parameters[name] for space in groups for name in space.names}
        self._parts: list[list[Part]] = [[] for _ in groups]
        self._sums: list[dict[tuple[int, int], Tensor]] = [{} for _ in groups]
        self._bases: list[Tensor | None] = [None for _ in groups]  # what was summed in another partition

    def decay(self, factor: float) -> None:
        """Multiplies what is there."""
        if factor == 0.0:
            self._bases = [None for _ in self.groups]
        for tensor in (*(t for sums in self._sums for t in sums.values()), *self._bases):
            if tensor is not None:
                tensor.mul_(factor)

    def add(self, passes: Iterable[SignalPass], weight: float) -> None:
        """Adds weight · Σ s sᵀ of a micro-batch's passes."""
        waiting: dict[ParameterSpace, _Waiting] = {}
        for signal_pass in passes:
            factored, scores = self._read(signal_pass)
            parts = self._partition(list(factored), scores)
            if parts != self._parts:
                self._contract(waiting, weight)
                waiting.clear()
                self._repartition(parts)
            for part in (part for group in parts for part in group):
                if part.factored:
                    inputs, signals = factored[part]
                else:
                    inputs, signals = None, torch.cat([scores[name] for name in part.space.names], dim=1)
                waiting.setdefault(part.space, _Waiting(inputs)).signals.append(signals)
            if sum(_bytes(entry) for entry in waiting.values()) > WAITING_BYTES:
                self._contract(waiting, weight)
        self._contract(waiting, weight)

    def _read(
        self, signal_pass: SignalPass
    ) -> tuple[dict[Part, tuple[Tensor, Tensor]], dict[str, Float[Tensor, "batch numel"]]]:
        """Inputs and signals of the maps with one position, and explicit scores of all other parameters."""
        factored: dict[Part, tuple[Tensor, Tensor]] = {}
        scores: dict[str, Tensor] = {}
        for block, records in signal_pass.records(self._parameters).items():
            if not all(signal_pass.tape.is_map(name) and name in self._parameters for name in block.names):
                continue
            like = self._parameters[block.weight]
            inputs, signals = (rows.to(like.dtype) for rows in merged(records))
            if len(inputs) != signal_pass.examples:  # it acted on something that is not the batch
                continue
            if inputs.shape[1] == block.groups == 1 and not block.transposed and not block.flat:
                space = ParameterSpace.of({name: self._parameters[name] for name in block.names})
                part = Part(space, block.outputs, block.columns, True)
                factored[part] = inputs[:, 0, 0], signals[:, 0, 0]
                continue
            score = torch.einsum("nsgo,nsgi->ngoi", signals, inputs)
            weight, bias = split(
                score if block.groups > 1 else score[:, 0],
                like.shape,
                bias=block.bias is not None,
                groups=block.groups,
                transposed=block.transposed,
                outputs=block.outputs if block.flat else None,
            )
            scores[block.weight] = weight.flatten(1)
            if block.bias is not None and bias is not None:
                scores[block.bias] = bias
        known = {*scores, *(name for part in factored for name in part.space.names)}
        return factored, scores | _explicit(
            signal_pass, {name: p for name, p in self._parameters.items() if name not in known}
        )

    def _partition(self, factored: list[Part], scores: Mapping[str, Tensor]) -> list[list[Part]]:
        """The parts of each group: its outer products, and the rest as one explicit part."""
        parts = []
        for space in self.groups:
            own = [part for part in factored if part.space.names[0] in space.shapes]
            rest = [name for name in space.names if name in scores]
            if rest:
                restricted = space.restrict(rest)
                own.append(Part(restricted, restricted.numel, 1, False))
            parts.append(own)
        return parts

    def _repartition(self, parts: list[list[Part]]) -> None:
        """Another partition of the parameters, as where one batch used them otherwise than the last."""
        self._bases = [
            self.matrix(k) if sums else base
            for k, (sums, base) in enumerate(zip(self._sums, self._bases, strict=True))
        ]
        self._sums, self._parts = [{} for _ in self.groups], parts

    def _contract(self, waiting: dict[ParameterSpace, _Waiting], weight: float) -> None:
        """Adds what waits to the sums."""
        stacked = {space: torch.stack(w.signals) for space, w in waiting.items() if w.signals}
        for parts, sums in zip(self._parts, self._sums, strict=True):
            for l, left in enumerate(parts):
                for m, right in enumerate(parts[: l + 1]):
                    if left.space not in stacked or right.space not in stacked:
                        continue
                    g = stacked[left.space], stacked[right.space]
                    a = waiting[left.space].inputs, waiting[right.space].inputs
                    if (l, m) not in sums:
                        sums[l, m] = g[0].new_zeros(*_shape(left, right, l == m))
                    if a[0] is None and a[1] is None:
                        _add_explicit(sums[l, m], *g, weight, l == m)
                    else:
                        _add_products(sums[l, m], g, a, weight, l == m)
        for entry in waiting.values():
            entry.signals.clear()

    def matrix(self, group: int) -> Float[Tensor, "P P"]:
        """Σ s sᵀ of a group, in the order of its flat vectors."""
        space, base = self.groups[group], self._bases[group]
        first = self._parameters[space.names[0]]
        total = (
            torch.zeros(space.numel, space.numel, dtype=first.dtype, device=first.device)
            if base is None
            else base.clone()
        )
        for (l, m), value in self._sums[group].items():
            left, right = self._parts[group][l], self._parts[group][m]
            whole = _unpacked(value, left, right, l == m)
            for name, rows, inner in left.places():
                for other, columns, outer in right.places():
                    piece = whole[rows, inner, columns, outer]
                    shape = piece.shape
                    target = total[space.slices[name], space.slices[other]]
                    target.unflatten(1, shape[2:]).unflatten(0, shape[:2]).add_(piece)
                    if l != m:
                        mirror = total[space.slices[other], space.slices[name]]
                        mirror.unflatten(1, shape[:2]).unflatten(0, shape[2:]).add_(piece.permute(2, 3, 0, 1))
        return total

    def state_dict(self) -> dict[str, Any]:
        """The sums, and how they are laid out."""
        return {
            "parts": [
                [(p.space.names, p.outputs, p.columns, p.factored) for p in parts] for parts in self._parts
            ],
            "sums": [dict(sums) for sums in self._sums],
            "bases": list(self._bases),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._parts = [
            [Part(space.restrict(names), *rest) for names, *rest in parts]
            for space, parts in zip(self.groups, state["parts"], strict=False)
        ]
        self._sums = [{pair: t.clone() for pair, t in sums.items()} for sums in state["sums"]]
        self._bases = [None if base is None else base.clone() for base in state["bases"]]


def _explicit(
    signal_pass: SignalPass, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Float[Tensor, "batch numel"]]:
    """Scores of parameters that no rule covers, [batch, numel] each."""
    if not parameters:
        return {}
    chunks = [scores for _, scores in signal_pass.scores(parameters)]
    return {name: torch.cat([scores[name].flatten(1) for scores in chunks]) for name in parameters}


def _bytes(waiting: _Waiting) -> int:
    return sum(s.numel() * s.element_size() for s in waiting.signals)


def _shape(left: Part, right: Part, same: bool) -> tuple[int, int]:
    pairs = left.outputs * (left.outputs + 1) // 2 if same and left.factored else left.outputs * right.outputs
    if not left.factored and not right.factored:
        return left.outputs, right.outputs
    return pairs, left.columns * right.columns


def _add_explicit(total: Tensor, left: Tensor, right: Tensor, weight: float, same: bool) -> None:
    if same:
        accumulate_gram(total, left.flatten(0, 1), 1.0, weight)
    else:
        total.addmm_(left.flatten(0, 1).mT, right.flatten(0, 1), alpha=weight)


def _add_products(
    total: Tensor,
    signals: tuple[Float[Tensor, "passes batch o"], Float[Tensor, "passes batch p"]],
    inputs: tuple[Tensor | None, Tensor | None],
    weight: float,
    same: bool,
) -> None:
    """Total[(o,p), (i,j)] += Σₙ (Σ_c g_l g_m) ã_l ã_m; of a pair (o,p) and its mirror image only one is kept."""
    left, right = signals
    step = max(1, CHUNK // max(left.shape[2] * right.shape[2], total.shape[1]))
    triangle = torch.tril_indices(left.shape[2], left.shape[2], device=total.device) if same else None
    for start in range(0, left.shape[1], step):
        part = slice(start, start + step)
        outputs = torch.bmm(left[:, part].permute(1, 2, 0), right[:, part].transpose(0, 1))
        flat = outputs.flatten(1) if triangle is None else outputs[:, triangle[0], triangle[1]]
        total.addmm_(flat.mT, _products([x[part] for x in inputs if x is not None]), alpha=weight)


def _products(inputs: Sequence[Float[Tensor, "batch _"]]) -> Float[Tensor, "batch _"]:
    """ã_l[n,i] ã_m[n,j], or one of them where the other is 1."""
    if len(inputs) == 1:
        return inputs[0]
    left, right = inputs
    return (left[:, :, None] * right[:, None, :]).flatten(1)


def _unpacked(value: Tensor, left: Part, right: Part, same: bool) -> Float[Tensor, "o i p j"]:
    """A pair's sums as [outputs, columns, outputs, columns]."""
    sizes = left.outputs, right.outputs, left.columns, right.columns
    if not (same and left.factored):
        return value.reshape(sizes).permute(0, 2, 1, 3)
    rows, columns = torch.tril_indices(left.outputs, left.outputs, device=value.device)
    packed = value.view(-1, left.columns, left.columns)
    whole = value.new_empty(sizes)
    whole[rows, columns] = packed
    whole[columns, rows] = packed.mT
    return whole.permute(0, 2, 1, 3)
