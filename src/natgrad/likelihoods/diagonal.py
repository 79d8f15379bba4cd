"""Likelihoods whose Fisher information in z is diagonal: every output coordinate is its own matter."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from natgrad.likelihoods.base import Likelihood, Outputs, Targets, leaves
from natgrad.likelihoods.signs import with_random_signs


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DiagonalLikelihood(Likelihood):
    """A likelihood that says its H by the diagonal; products and square roots follow."""

    @abc.abstractmethod
    def _information(self, outputs: Any, targets: Any) -> Any:
        """The diagonal of H, c and wₙ within, in the outputs' structure and shape, in at least float32."""

    def _product(self, outputs: Outputs, vector: Outputs, targets: Targets | None) -> Outputs:
        diagonal = leaves(self._information(outputs, targets))
        return _restore(outputs, [(h * v).to(v.dtype) for h, v in zip(diagonal, leaves(vector), strict=True)])

    def _projected_signal(
        self, outputs: Outputs, targets: Targets | None, generator: torch.Generator | None
    ) -> Outputs:
        diagonal = leaves(self._information(outputs, targets))
        signals = [with_random_signs(h.sqrt(), generator) for h in diagonal]
        return _restore(outputs, [s.to(z.dtype) for s, z in zip(signals, leaves(outputs), strict=True)])

    def _exact_signals(self, outputs: Outputs, targets: Targets | None, examples: int) -> Iterator[Outputs]:
        diagonal = leaves(self._information(outputs, targets))
        if not examples:
            return
        for i, z in enumerate(leaves(outputs)):
            root = diagonal[i].sqrt().to(z.dtype).reshape(examples, -1)
            for j in range(root.shape[1]):
                if not root[:, j].any():
                    continue
                signals = [
                    torch.zeros(part.shape, dtype=part.dtype, device=part.device) for part in leaves(outputs)
                ]
                signals[i].view(examples, -1)[:, j] = root[:, j]
                yield _restore(outputs, signals)


def _restore(outputs: Outputs, parts: list[Tensor]) -> Outputs:
    """The parts in the outputs' structure."""
    return tuple(parts) if isinstance(outputs, tuple) else parts[0]
