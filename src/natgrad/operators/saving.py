"""Operators in safetensors files: tensors by name, and beside them, as JSON, what they are.

The file's metadata are `natgrad` (the version of this format) and `operator`, a description {"class", "space", "meta"}.
Operators made of others describe these in their own meta, and number their tensors: "0.A", "1.matrix".
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from natgrad.errors import ConfigError, StateError
from natgrad.operators.base import LinearOperator
from natgrad.operators.space import ParameterSpace

FORMAT = "1"

Description = dict[str, Any]


def save_operator(operator: LinearOperator, path: str | os.PathLike[str]) -> None:
    """As `LinearOperator.save`."""
    tensors, description = describe(operator)
    layouts = {name: "columns" for name, t in tensors.items() if _by_columns(t)}
    # A file holds each tensor by rows and once: one that lies by columns is noted and turned, so that its products
    # are the same to the last bit when it is back.
    kept = {
        name: (t.detach().mT if name in layouts else t.detach()).clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    metadata = {"natgrad": FORMAT, "operator": json.dumps(description), "layouts": json.dumps(layouts)}
    _safetensors("safetensors.torch").save_file(kept, os.fspath(path), metadata=metadata)


def load_operator(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> LinearOperator:
    """The operator that `LinearOperator.save` wrote.

    Nothing in the file is run, whoever it is from: it holds numbers, names and shapes.

    Args:
        path: the file.
        device: where its tensors are to be.

    Raises:
        StateError: the file holds no operator, one of an unknown class, or another version of the format.
        ConfigError: safetensors is not installed.
        OSError: the file can't be read.
    """
    module, where = _safetensors("safetensors"), os.fspath(path)
    try:
        with module.safe_open(where, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except module.SafetensorError as error:
        raise StateError(f"{where} is no safetensors file: {error}") from error
    if "operator" not in metadata:
        raise StateError(f"{where} holds no operator: it was not written by LinearOperator.save()")
    if metadata.get("natgrad") != FORMAT:
        raise StateError(
            f"{where} is in version {metadata.get('natgrad')!r} of the format, and this natgrad reads {FORMAT!r}; "
            "load it with the natgrad that wrote it"
        )
    try:
        for name in json.loads(metadata["layouts"]):
            tensors[name] = tensors[name].mT
        operator = rebuild(tensors, json.loads(metadata["operator"]))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise StateError(f"{where} describes an operator that can't be made: {error!r}") from error
    return operator.to(device)


def describe(operator: LinearOperator) -> tuple[dict[str, Tensor], Description]:
    """The tensors of an operator, and all else as JSON can hold it."""
    tensors, meta = operator._state()
    space = [[name, list(shape)] for name, shape in operator.space.entries]
    return tensors, {"class": type(operator).__name__, "space": space, "meta": meta}


def rebuild(tensors: dict[str, Tensor], description: Description) -> LinearOperator:
    """The operator that was described.

    Raises:
        StateError: it is of an unknown class.
    """
    importlib.import_module("natgrad.operators")  # so that every class is there
    known = {kind.__name__: kind for kind in _kinds(LinearOperator)}
    name = description["class"]
    if name not in known:
        raise StateError(
            f"{name!r} is no operator that this natgrad knows; it has {', '.join(sorted(known))}"
        )
    space = ParameterSpace(dict(description["space"]))
    return known[name]._from_state(space, tensors, description["meta"])


def _kinds(kind: type[Any]) -> Iterator[type[LinearOperator]]:
    """The classes below one that are not abstract."""
    for below in kind.__subclasses__():
        if not inspect.isabstract(below):
            yield below
        yield from _kinds(below)


def describe_parts(operators: Sequence[LinearOperator]) -> tuple[dict[str, Tensor], list[Description]]:
    """What an operator made of others has for its `_state`."""
    tensors: dict[str, Tensor] = {}
    descriptions = []
    for index, operator in enumerate(operators):
        own, description = describe(operator)
        tensors.update({f"{index}.{name}": tensor for name, tensor in own.items()})
        descriptions.append(description)
    return tensors, descriptions


def rebuild_parts(tensors: dict[str, Tensor], descriptions: list[Description]) -> list[LinearOperator]:
    """The operators of `describe_parts`."""
    parts = []
    for index, description in enumerate(descriptions):
        start = f"{index}."
        own = {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}
        parts.append(rebuild(own, description))
    return parts


def _by_columns(tensor: Tensor) -> bool:
    return tensor.ndim >= 2 and not tensor.is_contiguous() and tensor.mT.is_contiguous()


def _safetensors(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f'safetensors is needed for saving operators: pip install "natgrad[lab]" ({error})'
        ) from error
