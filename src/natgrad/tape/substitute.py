"""Evaluating a model with other parameters and buffers, so that it is afterwards as it was found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from natgrad.tape.plain import plain_pass


def call_with(
    model: nn.Module, values: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """What the model returns with these tensors in the place of its own.

    torch's `functional_call` with tied weights swaps a module that stands under two names once for each, and puts the
    substitute back in the place of the original. Here each attribute of each module is named once.

    Args:
        model: left as it is.
        values: name → tensor, by the names of `named_parameters` and `named_buffers`; tensors that are not named stay.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
    """
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    substitutes = {id(own): values[name] for name, own in named.items() if name in values}
    chosen = {
        f"{prefix}.{key}" if prefix else key: substitutes[id(own)]
        for prefix, module in model.named_modules()
        for key, own in (*module._parameters.items(), *module._buffers.items())
        if own is not None and id(own) in substitutes
    }
    with plain_pass():
        if not chosen:
            return model(*args, **kwargs)
        return functional_call(model, chosen, args, dict(kwargs), tie_weights=False)
