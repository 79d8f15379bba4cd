"""A jet: a tensor with its derivatives beside it, which torch functions carry forward.

A jet stands for u [N, …] of N points. Its derivatives are *streams* in one tensor [N, S, …]: along K directions, and L
sums of second derivatives behind them. Examples come first in both, so that a linear map sees S more positions of the
same example: that is what keeps the Gram matrix of a residual a sum over layers.

A jet passes for a tensor, but holds no numbers of its own: every torch function that is called on it comes here, and
either has a rule or raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from natgrad.errors import TaylorRuleError
from natgrad.pde.plan import Plan

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


class Jet(Tensor):
    """The value of a function at N points, and derivatives of it.

    Attributes:
        value: [N, …].
        streams: [N, K + L, …], or [N, K, …] while all second derivatives are zero.
        plan: what the streams are; jets of different plans don't meet.
    """

    # The tape listens to what a jet's functions are made of, and not to the functions.
    decomposes_torch_functions = True

    value: Tensor
    streams: Tensor
    plan: Plan

    @staticmethod
    def __new__(cls, value: Tensor, streams: Tensor, plan: Plan) -> Jet:
        """A tensor with the value's shape and no storage: what went past the rules would fail, not go wrong."""
        if value.shape[1:] != streams.shape[2:] or value.shape[:1] != streams.shape[:1]:
            raise TaylorRuleError(
                f"a value of shape {tuple(value.shape)} has derivatives of shape {tuple(streams.shape)}: "
                "the model must keep examples apart, in the first dimension"
            )
        jet = Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=value.device)
        jet.value, jet.streams, jet.plan = value, streams, plan
        return jet

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What a torch function makes of jets."""
        rule = RULES.get(func)
        if rule is None:
            refuse(name_of(func), "has no rule in natgrad.pde")
        given = dict(kwargs or {})
        if "axis" in given:  # as numpy calls it
            given["dim"] = given.pop("axis")
        try:
            return rule(*args, **given)
        except TypeError as error:
            refuse(name_of(func), f"is called as no rule of natgrad.pde knows it ({error})", error)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch takes a class method
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Reached only past `__torch_function__`."""
        refuse(name_of(func), "has no rule in natgrad.pde")

    @property
    def first(self) -> Tensor:
        """[N, K, …]."""
        return self.streams[:, : self.plan.directions] if self.bent else self.streams

    @property
    def bent(self) -> bool:
        """Whether the second derivatives are there; else they are zero."""
        return bool(self.streams.shape[1] > self.plan.directions)

    def with_seconds(self) -> Tensor:
        """The streams, the second derivatives among them even if they are zero."""
        if self.bent or not self.plan.seconds:
            return self.streams
        shape = (self.streams.shape[0], self.plan.seconds, *self.streams.shape[2:])
        return torch.cat([self.streams, self.streams.new_zeros(shape)], 1)

    def become(self, other: Jet) -> Jet:
        """What an in-place function does."""
        if self.value.shape != other.value.shape:
            raise TaylorRuleError("an in-place function can't change a jet's shape")
        self.value, self.streams = other.value, other.streams
        return self


def refuse(name: str, reason: str, cause: Exception | None = None) -> NoReturn:
    """Raises TaylorRuleError.

    Args:
        name: the torch function.
        reason: what is wrong with it.
        cause: what was raised before.

    Raises:
        TaylorRuleError: always.
    """
    raise TaylorRuleError(
        f"{name} {reason}, so derivatives can't be carried through it; write this residual with torch.autograd.grad("
        "..., create_graph=True) or torch.func (slower: its rows come from per-example gradients)"
    ) from cause


def name_of(func: Any) -> str:
    """A torch function's name; a property's where it is one."""
    name = getattr(func, "__name__", str(func))
    return str(getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name)


def key_of(found: Any) -> Any:
    """What torch calls a function by: itself, or a property's getter; None for what is neither."""
    return found if callable(found) else getattr(found, "__get__", None)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for the torch functions and tensor methods of some names, in whichever namespace they are."""

    def register(function: Rule) -> Rule:
        for name in names:
            for home in (torch, Tensor, F, torch._C._nn, torch.special, torch.linalg):
                if key := key_of(getattr(home, name, None)):
                    RULES[key] = function
        return function

    return register


def in_place(function: Rule) -> Rule:
    """The form of a rule that changes its first argument."""

    def changed(target: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(target, Jet):
            refuse(
                "an in-place function",
                "writes derivatives into a plain tensor (torch.stack or cat can do it)",
            )
        result = function(target, *args, **kwargs)
        return target.become(result)

    return changed


def points(name: str, jet: Jet, dim: int, *, inserted: bool = False) -> int:
    """A dimension of the value as one of the streams.

    Args:
        name: of the function, for the error.
        jet: whose dimension it is.
        dim: of the value, from either end.
        inserted: it is one that is made.

    Raises:
        TaylorRuleError: it is the first one, of the examples.
    """
    rank = jet.value.dim() + inserted
    dim = dim + rank if dim < 0 else dim
    if dim == 0:
        refuse(name, "along the first dimension mixes the examples")
    return dim + 1


def plan_of(name: str, jets: list[Jet]) -> Plan:
    """The plan that some jets have in common."""
    plan = jets[0].plan
    if any(jet.plan is not plan for jet in jets):
        refuse(name, "has jets of different evaluations")
    return plan


def together(jets: list[Jet]) -> list[Tensor]:
    """The streams of some jets, as many of each."""
    return [jet.with_seconds() if any(other.bent for other in jets) else jet.streams for jet in jets]
