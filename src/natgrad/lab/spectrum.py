"""`natgrad fisher`: the spectrum of a model's Fisher information, and which layers are the hardest to train."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.errors import ConfigError
from natgrad.information import fisher
from natgrad.information.data import Batches
from natgrad.lab.extras import require
from natgrad.lab.problems import REGISTRY, call_factory, load_problem
from natgrad.linalg import stochastic
from natgrad.metrics import metric_from
from natgrad.metrics.base import check_kind
from natgrad.operators import LinearOperator, MatrixFree
from natgrad.tape import Batch

# The exact Fisher takes one backward pass for each output; beyond this many, sampled signals are the default.
MOST_OUTPUTS = 100
# A matrix that is known by its products alone gives no more than its largest eigenvalues.
LARGEST = 32


@dataclass(frozen=True)
class Layer:
    """The principal block of F that belongs to one module.

    Attributes:
        name: the module's; the parameter's where it belongs to the model itself.
        parameters: how many numbers.
        trace: of the block, in nats per parameter².
        largest: its largest eigenvalue.
    """

    name: str
    parameters: int
    trace: float
    largest: float


@dataclass(frozen=True)
class Spectrum:
    """What `natgrad fisher` tells of an operator.

    Attributes:
        title, metric, kind: what was asked for.
        examples: how many the data has.
        operator: F.
        values: eigenvalues, the largest first; all of them, or as many as were computed.
        trace: Σ λᵢ, in nats per parameter².
        trace_error: its standard error; 0 where it is exact.
        damping: λ.
        effective: Σ λᵢ / (λᵢ + λ), the effective dimension.
        effective_error: its standard error; 0 where it is exact.
        layers: the hardest (of the largest eigenvalue) first.
        notes: what a reader should know.
    """

    title: str
    metric: str
    kind: str
    examples: int
    operator: LinearOperator
    values: Float[Tensor, "k"]
    trace: float
    trace_error: float
    damping: float
    effective: float
    effective_error: float
    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """P."""
        return self.operator.space.numel

    @property
    def complete(self) -> bool:
        """Whether `values` are all eigenvalues."""
        return len(self.values) == self.parameters

    @property
    def rank(self) -> int:
        """How many of `values` are not zero to rounding."""
        values = self.values
        floor = float(values.max()) * self.parameters * torch.finfo(self.operator.dtype).eps
        return int((values > floor).sum())

    @property
    def condition(self) -> float | None:
        """λ_max / λ_min: infinite where F is singular, None where λ_min is not known."""
        if not self.complete:
            return None
        return float(self.values[0] / self.values[-1]) if self.rank == self.parameters else math.inf

    @property
    def damped_condition(self) -> float:
        """(λ_max + λ) / (λ_min + λ), with λ_min = 0 where it is not known: then an upper bound."""
        least = max(float(self.values[-1]), 0.0) if self.complete else 0.0
        return (float(self.values[0]) + self.damping) / (least + self.damping)


@dataclass(frozen=True)
class _Subject:
    model: nn.Module
    loss: Any
    data: Any
    examples: int
    batch: Batch


def fisher_of(
    path: str,
    metric: str = "kfac",
    kind: str | None = None,
    *,
    damping: float | None = None,
    examples: int | None = None,
    stream: Any = None,
) -> Spectrum:
    """The Fisher information of ``module:factory``, or of a registered problem at its start, and its spectrum.

    Args:
        path: a factory gives (model, loss_fn, data), with data as `natgrad.fisher` takes it; or a
            `natgrad.lab.Problem`.
        metric: the representation, by name.
        kind: of signals; "exact" by default, "mc" for a model of more than 100 outputs.
        damping: λ; 1/N by default (1 for a summed loss): the pull of a prior of precision 1 on each parameter.
        examples: the first so many of the data; all by default.
        stream: where a progress bar is drawn if it is a terminal; stderr if None.

    Raises:
        ConfigError: the factory can't be used or gives something else; or as `natgrad.fisher`.
        UnknownNameError: no such problem, module attribute or metric.
        EmptyError, OutputError, TargetError, NonFiniteError, UnsupportedLossError: as `natgrad.fisher`.
    """
    chosen = metric_from(metric)
    asked = None if kind is None else check_kind(kind)
    subject = _subject(path, examples)
    notes = []
    if asked is None:
        outputs = _outputs(subject.model, subject.batch)
        asked = "exact" if outputs <= MOST_OUTPUTS else "mc"
        if asked == "mc":
            notes.append(
                f"{outputs:,} outputs an example: signals are sampled; --kind exact sums over all of them."
            )
    with _bar(stream or sys.stderr) as tell:
        operator = fisher(subject.model, subject.loss, subject.data, chosen, asked, progress=tell)
    summed = getattr(subject.loss, "reduction", "mean") == "sum"
    given = damping if damping is not None else 1.0 if summed else 1.0 / subject.examples
    return spectrum_of(
        operator, given, title=path, metric=metric, kind=asked, examples=subject.examples, notes=tuple(notes)
    )


def spectrum_of(
    operator: LinearOperator,
    damping: float,
    *,
    title: str = "model",
    metric: str = "",
    kind: str = "",
    examples: int = 0,
    notes: tuple[str, ...] = (),
) -> Spectrum:
    """The spectrum of an operator, its layers and its effective dimension.

    Args:
        operator: F.
        damping: λ > 0.
        title, metric, kind, examples, notes: for the report.

    Raises:
        ConfigError: λ is not positive, or a matrix would not fit in memory.
    """
    if not 0 < damping < math.inf:
        raise ConfigError(f"damping={damping} must be above 0: the effective dimension is Σ λᵢ / (λᵢ + λ)")
    size = operator.space.numel
    if isinstance(operator, MatrixFree) and size > LARGEST:
        values = operator.eigenvalues(LARGEST).double()
        dimension = stochastic.trace_of_function(
            lambda rows: (operator @ rows.mT.contiguous()).mT,
            lambda s: s.clamp_min(0) / (s.clamp_min(0) + damping),
            size, 32, 32, dtype=operator.dtype, device=operator.device,
            generator=torch.Generator(device=operator.device).manual_seed(0),
        )  # fmt: skip
        effective, doubt = float(dimension.value), float(dimension.standard_error)
    else:
        values = operator.eigenvalues().double().clamp_min(0)
        effective, doubt = float((values / (values + damping)).sum()), 0.0
    trace = operator.trace_estimate(generator=torch.Generator(device=operator.device).manual_seed(0))
    layers = tuple(sorted(_layers(operator), key=lambda layer: -layer.largest))
    return Spectrum(
        title, metric, kind, examples, operator, values.cpu(), float(trace.value), float(trace.standard_error),
        damping, effective, doubt, layers, notes,
    )  # fmt: skip


def _layers(operator: LinearOperator) -> Iterator[Layer]:
    modules: dict[str, list[str]] = {}
    for name in operator.space.names:
        modules.setdefault(name.rpartition(".")[0] or name, []).append(name)
    for module, names in modules.items():
        block = operator.restrict(names)
        trace = block.trace_estimate(generator=torch.Generator(device=block.device).manual_seed(0)).value
        yield Layer(module, block.space.numel, float(trace), max(float(block.eigenvalues(1)), 0.0))


# ------------------------------------------------------------------------------------------ what is asked about


def _subject(path: str, examples: int | None) -> _Subject:
    found = load_problem(path) if ":" not in path or path in REGISTRY else call_factory(path)
    if hasattr(found, "make_model") and hasattr(found, "train"):
        problem: Any = found
        model, loss, data = problem.build(0), problem.loss_fn, tuple(problem.train)
    elif isinstance(found, (tuple, list)) and len(found) == 3 and isinstance(found[0], nn.Module):
        model, loss, data = found
        data = tuple(data) if isinstance(data, list) and len(data) == 2 and _tensors(data) else data
    else:
        raise ConfigError(
            f"{path} gave a {_kind_of(found)}; it must give (model, loss_fn, data), where data is "
            "(inputs, targets) or a DataLoader, or a natgrad.lab.Problem"
        )
    if isinstance(data, Iterator):
        raise ConfigError(f"the data of {path} is an iterator; give a list of its batches, or a DataLoader")
    kept, count, first = [], 0, None
    for batch in Batches(data):
        first = first or batch
        room = batch.examples if examples is None else min(batch.examples, examples - count)
        if examples is not None:
            part = batch if room == batch.examples else batch.slice(0, room)
            kept.append((_inputs(part), part.targets))
        count += room
        if count == examples:
            break
    assert first is not None  # Batches raises where there is none
    if examples is not None and count < examples:
        raise ConfigError(f"--examples {examples:,}, but the data of {path} has {count:,}")
    return _Subject(model, loss, data if examples is None else kept, count, first)


def _inputs(batch: Batch) -> Any:
    return dict(batch.kwargs) if batch.kwargs else batch.args


def _tensors(values: list[Any]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def _kind_of(found: object) -> str:
    if isinstance(found, (tuple, list)):
        return f"{type(found).__name__} of {len(found)}"
    return type(found).__name__


def _outputs(model: nn.Module, batch: Batch) -> int:
    """How many numbers the model puts out for an example; 0 where one can't tell, and `fisher` has to say why."""
    few = batch.slice(0, min(batch.examples, 2))
    training = {name: module.training for name, module in model.named_modules()}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model.eval()  # batch norm must not take these into its averages
            returned = model(*few.args, **dict(few.kwargs))
    except Exception:
        return 0
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
    return returned.numel() // few.examples if isinstance(returned, Tensor) else 0


@contextlib.contextmanager
def _bar(stream: Any) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar of batches where the stream is a terminal."""
    progress = require("rich.progress", "the progress bar")
    console = require("rich.console", "the progress bar").Console(file=stream)
    bars = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24, complete_style="cyan", finished_style="dim cyan"),
        progress.MofNCompleteColumn(),
        progress.TextColumn("batches"),
        progress.TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    tasks: list[Any] = []

    def tell(done: int, total: int | None) -> None:
        if done == 1:
            sweep = f", sweep {len(tasks) + 1}" if tasks else ""
            tasks.append(bars.add_task(f"Fisher information{sweep}", total=total))
        bars.update(tasks[-1], completed=done, total=total)

    with bars:
        yield tell
