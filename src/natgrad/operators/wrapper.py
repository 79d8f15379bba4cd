"""What operators have in common that answer by another one: where it lives, and how it is saved."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from natgrad.operators.base import LinearOperator
from natgrad.operators.saving import describe_parts, rebuild_parts
from natgrad.operators.space import ParameterSpace


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Wrapper(LinearOperator):
    """An operator made of another one and of options that JSON can hold, which are the other arguments.

    Attributes:
        operator: the other one, A.
    """

    operator: LinearOperator

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of A."""
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        """The device of A."""
        return self.operator.device

    def _to(self, dtype: torch.dtype, device: torch.device) -> LinearOperator:
        return dataclasses.replace(self, operator=self.operator._to(dtype, device))

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, parts = describe_parts([self.operator])
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return tensors, {"parts": parts} | {k: v for k, v in options.items() if k != "operator"}

    @classmethod
    def _from_state(
        cls, space: ParameterSpace, tensors: dict[str, Tensor], meta: dict[str, Any]
    ) -> LinearOperator:
        (operator,) = rebuild_parts(tensors, meta["parts"])
        # JSON has no tuples.
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in meta.items() if k != "parts"}
        return cls(operator, **options)
