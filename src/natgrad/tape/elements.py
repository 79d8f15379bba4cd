"""Scores of parameters that act entry by entry or are looked up: no outer product, but as many numbers as entries.

Example n's score is Σ g[n] ⊙ ∂y/∂q over all places that share an entry of q, and what lies between q and the
parameter, if anything does, is linearised: a score of q goes back by its derivative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from natgrad.linalg import accumulate_gram
from natgrad.tape.adjoint import batched_grad
from natgrad.tape.tracking import Lookup, Terminal

# Scores of so many numbers are formed at a time.
PORTION = 2**22


@dataclass(frozen=True, eq=False)
class ElementColumns:
    """A parameter that acted so in one forward pass, with the signals of several passes back.

    Attributes:
        name: the parameter's name.
        parameter: the parameter.
        terminals: where it met the batch.
        signals: for each terminal, what each pass brought there.
        examples: how many examples there are.
    """

    name: str
    parameter: nn.Parameter
    terminals: tuple[Terminal, ...]
    signals: tuple[tuple[Tensor, ...], ...]
    examples: int

    @property
    def columns(self) -> int:
        """How many passes there are."""
        return len(self.signals[0])

    def lookups(self) -> Iterator[tuple[Lookup, tuple[Tensor, ...]]]:
        """The lookups in the parameter itself, each with its signals."""
        for terminal, signals in zip(self.terminals, self.signals, strict=True):
            if terminal.looks_up(self.parameter):
                assert terminal.use is not None
                assert terminal.use.lookup is not None
                yield terminal.use.lookup, signals

    @property
    def only_lookups(self) -> bool:
        """Whether it acted in no other way."""
        return sum(1 for _ in self.lookups()) == len(self.terminals)

    def scores(self) -> Float[Tensor, "c n *shape"]:
        """Each pass's score of each example."""
        return torch.stack([torch.cat(list(self._chunks(c))) for c in range(self.columns)])

    def squares(self) -> Float[Tensor, "*shape"]:
        """Σ of squared scores over passes and examples."""
        total = torch.zeros_like(self.parameter)
        if self.only_lookups:
            return self._lookup_squares(total.flatten(1)).view_as(total)
        for column in range(self.columns):
            for chunk in self._chunks(column):
                total += chunk.square_().sum(0)
        return total

    def frequencies(
        self, weights: Float[Tensor, "examples"] | None = None
    ) -> tuple[Float[Tensor, "words"], float]:
        """How often each row of the table was looked up, and how many lookups there were, counted by weights."""
        counts, total = self.parameter.new_zeros(len(self.parameter)), 0.0
        for lookup, _ in self.lookups():
            indices = lookup.indices.reshape(self.examples, -1)
            each = torch.ones_like(indices, dtype=counts.dtype)
            if weights is not None:
                each = each * weights[:, None].to(counts.dtype)
            total += float(each.sum())
            if lookup.padding is not None:
                each = each * (indices != lookup.padding)
            counts.index_add_(0, indices.flatten(), each.flatten())
        return counts, total

    def gram_of_signals(self, diagonal: bool = False) -> Float[Tensor, "..."]:
        """Σ g gᵀ [features, features] over passes and lookups, or its diagonal."""
        features = self.parameter[0].numel()
        total = self.parameter.new_zeros(*(features,) * (1 if diagonal else 2))
        for column in range(self.columns):
            for _, values in self._used(column):
                if diagonal:
                    total += values.square().sum(0)
                else:
                    accumulate_gram(total, values)
        return total

    def with_passes_of(self, other: ElementColumns) -> ElementColumns:
        """The same with the signals of further passes."""
        signals = tuple(a + b for a, b in zip(self.signals, other.signals, strict=True))
        return dataclasses.replace(self, signals=signals)

    def squares_in(self, basis: Float[Tensor, "f k"] | None) -> Float[Tensor, "words k"]:
        """Σ over passes and examples of (scores · basis)², for a table of which rows are looked up."""
        columns = self.parameter[0].numel() if basis is None else basis.shape[1]
        return self._lookup_squares(self.parameter.new_zeros(len(self.parameter), columns), basis)

    def _chunks(self, column: int) -> Iterator[Float[Tensor, "n *shape"]]:
        step = max(1, PORTION // self.parameter.numel())
        for start in range(0, self.examples, step):
            yield self.score(column, slice(start, start + step))

    def score(self, column: int, part: slice) -> Float[Tensor, "n *shape"]:
        """One pass's score of some examples."""
        start, stop, _ = part.indices(self.examples)
        total = self.parameter.new_zeros(stop - start, *self.parameter.shape)
        for terminal, signals in zip(self.terminals, self.signals, strict=True):
            signal = signals[column].to(total.dtype)
            own = _by_example(signal, self.examples)[start:stop]
            if terminal.use is None:
                rows = own.new_zeros(stop - start, *signal.shape)
                rows[torch.arange(stop - start), torch.arange(start, stop)] = own[:, 0]
            elif terminal.use.lookup is not None:
                rows = own.new_zeros(stop - start, *terminal.track.tensor.shape)
                keys, values = _keyed(terminal.use.lookup, own, part, self.examples)
                rows.flatten(0, 1).index_add_(0, keys, values)
            else:
                rows = _entrywise(terminal, own, part, self.examples)
            total += self._carried(terminal, rows)
        return total

    def _carried(self, terminal: Terminal, scores: Tensor) -> Tensor:
        """Scores of the followed tensor, as scores of the parameter."""
        track = terminal.track
        if track.edge is None:
            return scores
        scores = scores.to(track.tensor.dtype)
        (found,) = batched_grad([track.edge], [self.parameter], [scores], len(scores))
        assert found is not None  # the tensor was made of the parameter
        return found.to(self.parameter.dtype)

    def _used(self, column: int) -> list[tuple[Int[Tensor, "k"], Float[Tensor, "k features"]]]:
        """One pass's entries (example, row of the table) and their signals, of every lookup."""
        found = []
        for lookup, signals in self.lookups():
            own = _by_example(signals[column].to(self.parameter.dtype), self.examples)
            keys, values = _keyed(lookup, own, slice(None), self.examples)
            found.append((keys, values.flatten(1)))
        return found

    def _lookup_squares(self, total: Tensor, basis: Tensor | None = None) -> Tensor:
        """Σ over examples of (Σ over an example's uses of a row of g)²; only rows that were used are touched."""
        rows = len(total)
        for column in range(self.columns):
            parts = self._used(column)
            keys, inverse = torch.cat([k for k, _ in parts]).unique(return_inverse=True)
            sums = total.new_zeros(len(keys), self.parameter[0].numel())
            sums.index_add_(0, inverse, torch.cat([values for _, values in parts]))
            if basis is not None:
                sums = sums @ basis
            total.index_add_(0, keys % rows, sums.square_())
        return total


def _by_example(signal: Tensor, examples: int) -> Float[Tensor, "n m ..."]:
    """The first axis apart: examples, and what was flattened with them."""
    return signal.reshape(examples, -1, *signal.shape[1:])


def _keyed(
    lookup: Lookup, signals: Tensor, part: slice, examples: int
) -> tuple[Int[Tensor, "k"], Float[Tensor, "k *row"]]:
    """The entries (example, row of the table) that a lookup used, as one number, and each one's signal."""
    indices = lookup.indices.reshape(examples, -1)[part]
    number = torch.arange(len(indices), device=indices.device)[:, None] * len(lookup.table)
    keys, values = (number + indices).flatten(), signals.reshape(indices.numel(), *lookup.table.shape[1:])
    if lookup.padding is not None:
        kept = indices.flatten() != lookup.padding
        keys, values = keys[kept], values[kept]
    return keys, values


def _entrywise(terminal: Terminal, own: Tensor, part: slice, examples: int) -> Float[Tensor, "n *shape"]:
    """Σ g ⊙ ∂y/∂q for some examples, over all that entries of q are shared by."""
    use = terminal.use
    assert use is not None
    assert use.factor is not None
    factor = use.factor()
    if isinstance(factor, Tensor):
        full = _by_example(factor.expand(use.shape), examples)[part] if factor.dim() else factor
        own = own * full.to(own.dtype)
    elif factor != 1.0:
        own = own * factor
    shape = (1, *use.aligned[1:])
    shared = [k + 1 for k, size in enumerate(shape) if size == 1 and own.shape[k + 1] != 1]
    summed = own.sum(shared, keepdim=True) if shared else own
    return summed.reshape(len(own), *terminal.track.tensor.shape)
