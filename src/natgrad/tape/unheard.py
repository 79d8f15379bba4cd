"""Derivatives of a model's own calls: there parameters act in backward or tangent nodes that no torch function makes.

`torch.autograd.grad(..., create_graph=True)`, `torch.func` and forward mode do so. The rows of such parameters can't
be put together from what the tape hears; here is what says which parameters they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge

functorch: Any = torch._C._functorch

# Functions that take a tensor out of the graph, so that nothing of it acts.
PASSIVE = frozenset((torch.detach, Tensor.detach, vars(torch._C.TensorBase)["data"].__get__))


def transforms() -> str | None:
    """The transform that calls are under just now, as ``"torch.func.grad"``; None where there is none."""
    interpreter = functorch.peek_interpreter_stack()
    if interpreter is not None:
        return f"torch.func.{str(interpreter.key()).rpartition('.')[2].lower()}"
    return "torch.autograd.forward_ad" if forward_ad._current_level >= 0 else None


def unwrapped(tensor: Tensor) -> Tensor:
    """What a transform made its own tensor of."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def differentiated(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The outputs whose derivatives a call keeps in the graph; None for any other call."""
    if func is torch.autograd.grad:
        created = args[4] if len(args) > 4 else kwargs.get("create_graph")
        return (args[0] if args else kwargs["outputs"]) if created else None
    if func is Tensor.backward:
        created = args[3] if len(args) > 3 else kwargs.get("create_graph")
        return args[0] if created else None
    return None


def leaves_of(outputs: Any) -> Iterator[Tensor]:
    """The leaves of the graph of some outputs: parameters, and inputs that need gradients."""
    given = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    waiting = [one.node if isinstance(one, GradientEdge) else one.grad_fn for one in given]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf
        waiting.extend(following for following, _ in node.next_functions)
