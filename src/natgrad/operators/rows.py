"""The rows J of a Fisher information matrix F = JᵀJ, in factored form.

J has a row for each signal column c and example n of a batch. What linear maps explain of it is kept in factors, see
`operators.layerrows`; what they don't is kept as explicit rows. Rows are ordered by batch, then column, then example.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.errors import ConfigError, EmptyError
from natgrad.linalg import accumulate_gram
from natgrad.operators.layerrows import PORTION, BatchRows, LayerRows, Rows, Use, positions_first
from natgrad.operators.readings import reading_from
from natgrad.operators.rowgram import row_gram
from natgrad.operators.space import ParameterSpace


@dataclasses.dataclass(frozen=True, eq=False)
class FactoredRows:
    """J [M, P] on a parameter space, as its rows by batch: F = JᵀJ.

    Attributes:
        space: the parameter space.
        batches: one or more, of one dtype and device.
        removed: orthonormal columns U; J is then (I − UUᵀ) times what the batches say. With U = 1/√M rows are centred.

    Raises:
        EmptyError: there is no batch.
    """

    space: ParameterSpace
    batches: tuple[BatchRows, ...]
    removed: Float[Tensor, "M k"] | None = None

    def __post_init__(self) -> None:
        if not self.batches:
            raise EmptyError("there are no rows: no batch was observed")

    def __len__(self) -> int:
        """M."""
        return sum(map(len, self.batches))

    @property
    def _like(self) -> Tensor:
        return next(t for batch in self.batches for t in batch.tensors())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all that is kept."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """The device of all that is kept."""
        return self._like.device

    @property
    def itemsize(self) -> int:
        """The bytes of one number."""
        return self._like.element_size()

    @property
    def nbytes(self) -> int:
        """What the factors take in memory."""
        return sum(batch.nbytes for batch in self.batches)

    def __add__(self, other: FactoredRows) -> FactoredRows:
        """The rows of both, one below the other: their matrices JᵀJ add up."""
        if self.removed is not None or other.removed is not None:
            raise ConfigError("rows that were centred apart can't be joined: join them first")
        return FactoredRows(self.space, self.batches + other.batches)

    @property
    def whole(self) -> FactoredRows:
        """The rows from which nothing is removed."""
        return dataclasses.replace(self, removed=None)

    @functools.cached_property
    def _taken(self) -> Rows:
        """UᵀJ, of the whole rows."""
        assert self.removed is not None
        return self.whole.rmatmul(self.removed.mT.contiguous())

    def without(self, columns: Float[Tensor, "M k"]) -> FactoredRows:
        """(I − UUᵀ) J for orthonormal columns U, which isn't checked."""
        return dataclasses.replace(self, removed=columns.contiguous())

    def projected(self, images: Tensor) -> Tensor:
        """(I − UUᵀ) of each of K vectors [K, M]."""
        return images if self.removed is None else images - (images @ self.removed) @ self.removed.mT

    def scaled(self, factor: float) -> FactoredRows:
        """Every row times a factor."""
        batches = tuple(dataclasses.replace(b, scale=b.scale * factor) for b in self.batches)
        return dataclasses.replace(self, batches=batches)

    @torch.no_grad()
    def matmul(self, rows: Rows) -> Float[Tensor, "K M"]:
        """J v for K vectors."""
        if not len(rows[self.space.names[0]]):  # sizes of nothing can't be told from one another
            return self._like.new_zeros(0, len(self))
        return self.projected(torch.cat([batch.matmul(rows) for batch in self.batches], dim=1))

    @torch.no_grad()
    def rmatmul(self, weights: Float[Tensor, "K M"]) -> Rows:
        """Jᵀ w for K vectors."""
        if not len(weights):
            return {name: weights.new_zeros(0, *shape) for name, shape in self.space.entries}
        weights = self.projected(weights)
        total: Rows = {}
        for batch, own in zip(
            self.batches, weights.split([len(b) for b in self.batches], dim=1), strict=True
        ):
            for name, part in batch.rmatmul(own).items():
                total[name] = (
                    total[name].add_(part.reshape(len(part), -1))
                    if name in total
                    else part.reshape(len(part), -1)
                )
        return {
            name: total[name].view(-1, *shape) if name in total else weights.new_zeros(len(weights), *shape)
            for name, shape in self.space.entries
        }

    @torch.no_grad()
    def product(self, rows: Rows) -> Rows:
        """JᵀJ v for K vectors, one batch after the other."""
        if self.removed is not None:
            return self.rmatmul(self.matmul(rows))
        total: Rows = {}
        for batch in self.batches:
            one = FactoredRows(self.space, (batch,))
            for name, part in one.rmatmul(one.matmul(rows)).items():
                total[name] = total[name].add_(part) if name in total else part
        return total

    @torch.no_grad()
    def gram(self) -> Float[Tensor, "M M"]:
        """K = JJᵀ, layer by layer; J is never formed."""
        kernel = row_gram(self.batches)
        if self.removed is None:
            return kernel
        half = kernel - (kernel @ self.removed) @ self.removed.mT
        return half - self.removed @ (self.removed.mT @ half)

    @torch.no_grad()
    def squares(self) -> dict[str, Tensor]:
        """The diagonal of JᵀJ, each parameter's part in its shape."""
        total: dict[str, Tensor] = {}
        for batch in self.batches:
            for name, own in batch.squares().items():
                total[name] = total[name] + own if name in total else own
        found = {
            name: total[name].reshape(shape) if name in total else self._like.new_zeros(shape)
            for name, shape in self.space.entries
        }
        if self.removed is None:
            return found
        return {name: d - self._taken[name].square().sum(0) for name, d in found.items()}

    @torch.no_grad()
    def dense(self) -> Float[Tensor, "M P"]:
        """J itself, in the order of flat vectors: for small models, and as a yardstick."""
        return self.projected(torch.cat([self._explicit(batch, slice(None)) for batch in self.batches]).mT).mT

    @torch.no_grad()
    def covariance(self) -> Float[Tensor, "P P"]:
        """JᵀJ, from a portion of the rows at a time."""
        size = self.space.numel
        total = self._like.new_zeros(size, size)
        if self.removed is not None:
            taken = self.space.flatten_rows(self._taken)
            total -= taken.mT @ taken
        for batch in self.batches:
            step = max(1, 16 * PORTION // (size * batch.columns))
            for start in range(0, batch.examples, step):
                accumulate_gram(total, self._explicit(batch, slice(start, start + step)))
        return total

    def _explicit(self, batch: BatchRows, part: slice) -> Tensor:
        found = batch.explicit(part)
        count = len(range(*part.indices(batch.examples)))
        parts = [
            found[name] if name in found else self._like.new_zeros(batch.columns, count, math.prod(shape))
            for name, shape in self.space.entries
        ]
        return torch.cat(parts, dim=2).flatten(0, 1)

    def restrict(self, names: Sequence[str]) -> FactoredRows:
        """The columns of J for some of the parameters, in the order of `names`."""
        batches = tuple(batch.restrict(names) for batch in self.batches)
        return FactoredRows(self.space.restrict(names), batches, self.removed)

    def to(self, dtype: torch.dtype, device: torch.device) -> FactoredRows:
        """The same in another dtype, or on another device."""
        removed = None if self.removed is None else self.removed.to(device, dtype)
        return FactoredRows(self.space, tuple(batch.to(dtype, device) for batch in self.batches), removed)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and what else makes this object."""
        tensors: dict[str, Tensor] = {}
        batches = []
        for i, batch in enumerate(self.batches):
            layers = []
            for j, layer in enumerate(batch.layers):
                uses = []
                for k, use in enumerate(layer.uses):
                    key = f"{i}.{j}.{k}"
                    tensors[f"{key}.inputs"], meta = use.reading.state()
                    signals = use.part(slice(None))
                    last = positions_first(signals)
                    tensors[f"{key}.signals"] = signals.movedim(4, 1) if last else signals
                    uses.append({"reading": meta, "positions_first": last, "biased": use.biased})
                names = {"weight": layer.weight, "bias": layer.bias, "transposed": layer.transposed}
                layers.append(names | {"uses": uses})
            tensors |= {f"{i}.rest.{name}": own for name, own in batch.rest.items()}
            sizes = {"columns": batch.columns, "examples": batch.examples, "scale": batch.scale}
            batches.append(sizes | {"layers": layers, "rest": list(batch.rest)})
        if self.removed is not None:
            tensors["removed"] = self.removed
        return {name: t.contiguous() for name, t in tensors.items()}, {"batches": batches}

    @classmethod
    def from_state(
        cls, space: ParameterSpace, tensors: dict[str, Tensor], meta: dict[str, Any]
    ) -> FactoredRows:
        """The object that `state` described."""
        # A file's numbers need not begin where a vector register likes it, and then round otherwise than here.
        tensors = {name: t.clone() for name, t in tensors.items()}
        batches = []
        for i, batch in enumerate(meta["batches"]):
            layers = []
            for j, layer in enumerate(batch["layers"]):
                uses = []
                for k, use in enumerate(layer["uses"]):
                    signals = tensors[f"{i}.{j}.{k}.signals"]
                    signals = signals.movedim(1, 4) if use["positions_first"] else signals
                    reading = reading_from(tensors[f"{i}.{j}.{k}.inputs"], use["reading"])
                    uses.append(Use(reading, signals, use["biased"]))
                transposed = layer.get("transposed", False)
                layers.append(LayerRows(layer["weight"], layer["bias"], tuple(uses), transposed))
            rest = {name: tensors[f"{i}.rest.{name}"] for name in batch["rest"]}
            batches.append(
                BatchRows(batch["columns"], batch["examples"], tuple(layers), rest, batch["scale"])
            )
        return cls(space, tuple(batches), tensors.get("removed"))
