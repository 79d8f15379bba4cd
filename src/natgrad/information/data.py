"""What a user gives as data, as batches: a pair of tensors, a DataLoader, any iterable of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, RandomSampler

from natgrad.errors import ConfigError, EmptyError
from natgrad.tape import Batch

# What a pair of tensors is cut into, so that memory does not grow with the data.
BATCH_SIZE = 1024


class Batches:
    """The batches of what a user gave, in order, as often as they are asked for.

    A *tuple* is one batch, (inputs, targets); so is a tensor, or a mapping, of inputs alone: it is cut into batches of
    `batch_size` examples. Anything else is an iterable of batches. Each batch is (inputs, targets), as a tuple or a
    list, or inputs alone: a tensor, a mapping, or one of these as the only item of a tuple. Inputs are a tensor; a
    tuple or list, the model's positional arguments; or a mapping, its keyword arguments.

    Args:
        data: what the user gave.
        batch_size: how many examples of a single batch are taken at a time.

    Raises:
        ConfigError: it can't be read as batches; says what to give.
    """

    def __init__(self, data: Any, batch_size: int = BATCH_SIZE) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        if isinstance(data, Dataset):
            raise ConfigError(
                f"{type(data).__name__} gives one example at a time; wrap it in "
                "torch.utils.data.DataLoader(dataset, batch_size=256)"
            )
        self._single = isinstance(data, (Tensor, Mapping, tuple))
        if not self._single and not isinstance(data, Iterable):
            raise ConfigError(
                "data must be (inputs, targets), a DataLoader, or an iterable of batches, not "
                f"{type(data).__name__}"
            )
        self._data, self._size = data, batch_size
        self.once = isinstance(data, Iterator)
        self.shuffled = isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler)

    def __len__(self) -> int:
        """How many batches there are.

        Raises:
            TypeError: the iterable does not say.
        """
        if not self._single:
            return len(self._data)
        return -(-batch_of(self._data, "the data").examples // self._size)

    def __iter__(self) -> Iterator[Batch]:
        """The batches.

        Raises:
            EmptyError: there are none, or one has no examples.
            ConfigError: one can't be read; says which.
        """
        count = 0
        for batch in self._whole():
            yield batch
            count += 1
        if not count:
            raise EmptyError(
                "the data is an iterator that was used up before; pass the list of its batches, or a DataLoader"
                if self.once
                else "the data has no batches"
            )

    def _whole(self) -> Iterator[Batch]:
        if self._single:
            whole = batch_of(self._data, "the data")
            if whole.examples <= self._size:
                yield whole
                return
            for start in range(0, whole.examples, self._size):
                yield whole.slice(start, min(start + self._size, whole.examples))
            return
        for index, item in enumerate(self._data):
            yield batch_of(item, f"batch {index}")


def batch_of(item: Any, name: str) -> Batch:
    """One batch from (inputs, targets), or from inputs alone.

    Args:
        item: what the user gave.
        name: what an error calls it.

    Raises:
        ConfigError: it is neither.
        EmptyError: it has no examples.
    """
    targets = None
    if isinstance(item, (tuple, list)):
        if len(item) == 2:
            item, targets = item
        elif len(item) == 1:
            (item,) = item
        else:
            raise ConfigError(
                f"{name} is a {type(item).__name__} of {len(item)} items; give (inputs, targets), where inputs may "
                "be a tuple of the model's arguments: (b[0], b[1]), b[2]"
            )
    args, kwargs = _arguments(item, name)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    examples = next((t.shape[0] for t in tensors if t.dim()), 1 if tensors else 0)
    if not examples:
        raise EmptyError(f"{name} has no examples" if tensors else f"{name} holds no tensor of inputs")
    return Batch(args, kwargs, tuple(targets) if isinstance(targets, list) else targets, examples)


def _arguments(inputs: Any, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), {str(key): value for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    raise ConfigError(
        f"the inputs of {name} are a {type(inputs).__name__}; give a tensor, a tuple of the model's arguments, or a "
        "dict of its keyword arguments"
    )


class Weights:
    """Per-example weights, handed out batch by batch in the order of the data.

    Args:
        values: [N], not negative; None where every example counts alike.

    Raises:
        ConfigError: they are not one number an example, or one is negative or not finite.
    """

    def __init__(self, values: Tensor | None) -> None:
        if values is not None:
            if values.ndim != 1:
                raise ConfigError(
                    f"weights must be one number for each example, [N]; got shape {tuple(values.shape)}"
                )
            if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
                raise ConfigError("weights must be finite and not negative")
        self._values, self._next = values, 0

    def take(self, examples: int, like: Tensor) -> Tensor | None:
        """The weights of the next examples, in the dtype and on the device of another tensor.

        Raises:
            ConfigError: there are fewer weights than examples.
        """
        if self._values is None:
            return None
        start, self._next = self._next, self._next + examples
        if self._next > len(self._values):
            raise ConfigError(f"there are {len(self._values)} weights, but more examples")
        return self._values[start : self._next].to(like.device, like.dtype)

    def finish(self) -> None:
        """Sees that every weight found its example, and begins anew.

        Raises:
            ConfigError: there are more weights than examples.
        """
        if self._values is not None and self._next != len(self._values):
            raise ConfigError(f"there are {len(self._values)} weights, but {self._next} examples")
        self._next = 0
