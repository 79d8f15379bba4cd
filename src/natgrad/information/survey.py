"""A model, its likelihood and data, gone through batch by batch; the model is left as it was found."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from natgrad.errors import ConfigError, EmptyError, NonFiniteError, OutputError, TargetError
from natgrad.information.data import Batches, Weights
from natgrad.likelihoods import Likelihood, likelihood_from
from natgrad.likelihoods.base import bare
from natgrad.tape import Batch
from natgrad.tape.outputs import Outputs, count_examples, find_outputs
from natgrad.tape.substitute import call_with

Progress = Callable[[int, "int | None"], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Sight:
    """One batch, and what the model made of it; to be done with when the next one comes.

    Attributes:
        index: which batch it is, from 0.
        batch: what the model was called with, and the targets.
        outputs: what the likelihood reads, on the graph if gradients are on.
        mass: Σ of the weights of its events (see `Likelihood.mass`).
        weights: per-example weights, or None.
        rng_state: where its random draws (dropout) started from.
    """

    index: int
    batch: Batch
    outputs: Outputs
    mass: float
    weights: Tensor | None
    rng_state: Tensor


@dataclass(frozen=True)
class Survey:
    """What F is the information of: a model's predictions on data.

    Attributes:
        model: evaluated in its present mode. Its buffers, gradients and random state are left as they are.
        likelihood: p(y | z).
        data: the batches.
        outputs: what the likelihood reads of what the model returns; the model's return value if None.
        weights: per-example weights.
        seed: of the model's own random draws, such as dropout; each sweep has the same.
        asker: the function that errors name.
    """

    model: nn.Module
    likelihood: Likelihood
    data: Batches
    outputs: Callable[[Any], Any] | None = None
    weights: Weights = field(default_factory=lambda: Weights(None))
    seed: int = 0
    asker: str = "natgrad.fisher"
    _autocast: Callable[[], AbstractContextManager[Any]] = field(init=False)

    def __post_init__(self) -> None:
        device = next((p.device.type for p in self.model.parameters()), "cpu")
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        user = functools.partial(torch.autocast, device, dtype, enabled=enabled)
        object.__setattr__(self, "_autocast", user if enabled else contextlib.nullcontext)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        likelihood: nn.Module | Likelihood,
        data: Any,
        outputs: Callable[[Any], Any] | None,
        weights: Tensor | None,
        batch_size: int,
        seed: int,
        asker: str,
    ) -> Survey:
        """A survey of what the asker was given; arguments are those of `natgrad.fisher`.

        Raises:
            UnsupportedLossError: the loss has no likelihood.
            ConfigError: data or weights that can't be read.
        """
        batches = Batches(data, batch_size)
        return cls(model, likelihood_from(likelihood), batches, outputs, Weights(weights), seed, asker)

    def find_outputs(self, returned: Any) -> Outputs:
        """The likelihood's outputs among what the model returned.

        Raises:
            OutputError: they are not tensors.
        """
        return find_outputs(returned, self.outputs, self.asker)

    def sweep(
        self,
        see: Callable[[Sight], None],
        listening: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        parameters: Mapping[str, Tensor] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Goes through the data once.

        Args:
            see: told of each batch; its graph is dropped when this returns.
            listening: a context that each forward pass runs in, such as a tape's `recording`.
            parameters: name → value, for those that differ from the model's own.
            progress: told after each batch how many are done, of how many (None where the data does not say).

        Raises:
            EmptyError: there is no data, or all of its events are ignored.
            OutputError, TargetError, ConfigError, NonFiniteError: a batch can't be read; says which.
        """
        total = _length(self.data) if progress is not None else None
        mass = 0.0
        with _random_numbers(self.model, self.seed):
            for index, batch in enumerate(self.data):
                with _naming(index):
                    mass += self._look(index, batch, see, listening, dict(parameters or {}))
                if progress is not None:
                    progress(index + 1, total)
        self.weights.finish()
        if not mass:
            raise EmptyError(
                "every event of the data is ignored, or has weight zero: there is no information"
            )

    def gather(
        self, look: Callable[[Sight], T], parameters: Mapping[str, Tensor] | None = None
    ) -> tuple[list[T], list[float]]:
        """What a function makes of each batch, without gradients, and what each counts in the loss over all of them.

        Args:
            look: the function.
            parameters: as in `sweep`.

        Raises:
            As `sweep`.
        """
        found: list[T] = []
        masses: list[float] = []

        def see(sight: Sight) -> None:
            found.append(look(sight))
            masses.append(sight.mass)

        with torch.no_grad():
            self.sweep(see, parameters=parameters)
        total = sum(masses)
        return found, [1.0 if self.likelihood.reduction == "sum" else mass / total for mass in masses]

    def require_targets(self, sight: Sight) -> None:
        """Sees that a batch has targets, for what depends on them.

        Raises:
            TargetError: it has none.
        """
        if sight.batch.targets is None:
            raise TargetError(f"{self.asker} depends on the targets: give (inputs, targets)")

    def _look(
        self,
        index: int,
        batch: Batch,
        see: Callable[[Sight], None],
        listening: Callable[[], AbstractContextManager[Any]],
        parameters: dict[str, Tensor],
    ) -> float:
        state = torch.get_rng_state()
        with listening(), self._autocast():
            returned = self._call(batch, parameters)
        outputs = self.find_outputs(returned)
        examples = count_examples(batch.args, batch.kwargs, outputs)
        batch = replace(batch, examples=examples)
        self._require_usable(batch, outputs)
        mass = self.likelihood.mass(bare(outputs), batch.targets)
        see(Sight(index, batch, outputs, mass, self.weights.take(examples, outputs[0]), state))
        return mass

    def _call(self, batch: Batch, parameters: dict[str, Tensor]) -> Any:
        values = {name: buffer.clone() for name, buffer in self.model.named_buffers()} | parameters
        try:
            return call_with(self.model, values, batch.args, batch.kwargs)
        except RuntimeError as error:
            reason = _mismatch(batch, self.model)
            if reason is None:
                raise
            raise ConfigError(reason) from error

    def _require_usable(self, batch: Batch, outputs: Outputs) -> None:
        targets = [t for t in tree_leaves(batch.targets) if isinstance(t, Tensor)]
        elsewhere = next((t for t in targets if t.device != outputs[0].device), None)
        if elsewhere is not None:
            raise ConfigError(
                f"the targets are on {elsewhere.device}, the model's outputs on {outputs[0].device}; move one of them"
            )
        given = [t for t in tree_leaves((batch.args, dict(batch.kwargs))) if isinstance(t, Tensor)]
        if not all(map(_finite, outputs)):
            whose = "the model's outputs are" if all(map(_finite, given)) else "the inputs are"
            raise NonFiniteError(f"{whose} not finite")
        if not all(map(_finite, targets)):
            raise NonFiniteError("the targets are not finite")


@contextlib.contextmanager
def _naming(index: int) -> Iterator[None]:
    """Errors inside say which batch they are about."""
    try:
        yield
    except (OutputError, TargetError, NonFiniteError, ConfigError) as error:
        raise type(error)(f"batch {index}: {error}") from error


def trainable(model: nn.Module, params: Iterable[Any] | None = None) -> dict[str, nn.Parameter]:
    """Name → parameter of those that F is about, in the model's order.

    Args:
        model: the model.
        params: their names, or the parameters themselves; all that are trained if None.

    Raises:
        EmptyError: there is none.
        ConfigError: one of them is not the model's, or is frozen.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
    named = dict(model.named_parameters())
    if params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
    else:
        names = {id(p): name for name, p in named.items()}
        wanted = {p if isinstance(p, str) else names.get(id(p)) for p in params}
        unknown = [name for name in wanted if name not in named]
        if unknown:
            raise ConfigError(
                f"params={unknown[0]!r} is no parameter of the model; it has {', '.join(named)}"
                if unknown[0] is not None
                else "one of params is no parameter of the model"
            )
        chosen = {name: p for name, p in named.items() if name in wanted}
    frozen = [name for name, p in chosen.items() if not p.requires_grad]
    if frozen:
        raise ConfigError(
            f"{', '.join(frozen)} does not require a gradient; call .requires_grad_() or leave it out"
        )
    if not chosen:
        raise EmptyError("the model has no trainable parameter; is every requires_grad False?")
    return chosen


@contextlib.contextmanager
def _random_numbers(model: nn.Module, seed: int) -> Iterator[None]:
    """The model's random draws start from the seed, and the user's stream goes on afterwards as if nothing was."""
    devices = {t.device.index for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def _mismatch(batch: Batch, model: nn.Module) -> str | None:
    """What of a batch is on another device or of another dtype than the model, for a forward pass that failed."""
    first = next(model.parameters())
    for value in tree_leaves((batch.args, dict(batch.kwargs))):
        if not isinstance(value, Tensor):
            continue
        if value.device != first.device:
            return f"the data is on {value.device}, the model on {first.device}; move one of them with .to()"
        if value.is_floating_point() and value.dtype != first.dtype:
            return f"the data is {value.dtype}, the model {first.dtype}; convert one of them with .to()"
    return None


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value.detach().sum()))


def _length(data: Batches) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None
