"""What a race is run on: a problem is a value that says what is trained, on what, and how its progress is told.

There are two kinds. A `Problem` has inputs and targets and a `torch.nn` loss; it is measured by

    excess  =  scale · loss  −  floor

where `floor` is the least value that the loss can take (the entropy of the data, or a known optimum), so that an
excess of zero is perfection and a logarithmic axis means something. A `ResidualProblem` has residuals and a known
solution; it is measured by the relative error of what was found. Two more draw a step's examples from the model
itself: `natgrad.lab.ising` and `natgrad.lab.cartpole`.
"""

from __future__ import annotations

import abc
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from natgrad.errors import ConfigError, EmptyError
from natgrad.likelihoods import Likelihood
from natgrad.optim import Policy

Score = Callable[[Tensor, Tensor], Tensor]
Residuals = dict[str, Tensor]
LossFn = nn.Module | Likelihood | None
Stepped = (
    Callable[[], Any] | Policy
)  # what `NaturalGradient.step` takes: gives residuals or scores, or is a policy
_AT_ONCE = 1000  # examples of a pass that measures
_OF_NORMS = 2000  # examples that BatchNorm's averages are taken over


@dataclass(frozen=True, eq=False, kw_only=True)
class Task(abc.ABC):
    """What all kinds of problem have.

    Attributes:
        name: short name, used for folders.
        title: one line that says what is trained on what.
        make_model: builds the model for a seed. Equal seeds must give equal weights; torch's global generator is
            seeded too before the call, so a factory may ignore its argument.
        measure: what progress is measured by.
        unit: unit of the measure, such as ``"nats per image"``; "" for a pure number.
        yardstick: what a measure other than the excess is taken against.
        things: what a step takes some of.
        sampled: whether these are drawn from the model as it stands, so that each learner has its own.
        logarithmic: whether the measure is drawn so; not where it may well become zero.
        floor: what was subtracted from the loss.
        target: the measure that the race is timed to; None means that nobody is timed.
        steps: how long a race lasts, unless the user says otherwise.
        seconds: the same in seconds, and instead of steps, for optimisers whose steps differ much in length.
        evaluate_every: steps between two evaluations (the first ones lie closer).
        rates: peer → the learning rate that it gets without ``--tune``, found by a search on this problem.
        settings: what natgrad is given besides its metric: nothing, but where its step needs a rate or a strategy.
        schedule: whether the peers' rates rise over the first twentieth of the run and fall to zero along a cosine,
            as they are used in practice; constant otherwise.
    """

    name: str
    title: str
    make_model: Callable[[int], nn.Module]
    measure: str = "excess"
    unit: str = "nats"
    yardstick: str = "the known solution"
    things: str = "examples"
    sampled: bool = False
    logarithmic: bool = True
    floor: float = 0.0
    target: float | None = None
    steps: int = 200
    seconds: float | None = None
    evaluate_every: int = 10
    rates: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    schedule: bool = False

    def __post_init__(self) -> None:
        if not self.name or any(c in self.name for c in "/\\:"):
            raise ConfigError(f"a problem's name becomes a folder's: {self.name!r} won't do")

    def build(self, seed: int) -> nn.Module:
        """The model of a seed; torch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make_model(seed)

    @property
    @abc.abstractmethod
    def examples(self) -> int:
        """How many examples, or residuals, there are."""

    @property
    @abc.abstractmethod
    def examples_a_step(self) -> int:
        """How many of them a step takes, unless the user says otherwise."""

    @property
    @abc.abstractmethod
    def likelihood(self) -> LossFn:
        """The loss, as `natgrad.NaturalGradient` takes it: None for residuals. Each run needs its own copy."""

    @property
    def scored(self) -> tuple[str, ...]:
        """What is measured on a test set."""
        return ()

    @abc.abstractmethod
    def batches(self, size: int, seed: int, start: int = 0) -> Iterator[Any]:
        """What steps `start`, `start` + 1, … take: a function of the seed alone, so a run can resume anywhere."""

    @abc.abstractmethod
    def loss(self, model: nn.Module, loss_fn: LossFn, batch: Any) -> Tensor:
        """The scalar that is trained, with its graph."""

    def residuals_of(self, model: nn.Module, batch: Any) -> Stepped | None:
        """What natgrad steps on, residuals or a policy; None where it takes part in the ordinary loop."""
        return None

    @abc.abstractmethod
    def judge(self, twin: nn.Module) -> dict[str, float]:
        """Measures a model that is not trained: ``"loss"``, ``"excess"`` (the measure), and what `scored` names.

        An optimiser that listens to forward passes, as natgrad does, must see the training batches only: so it is
        given a twin.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem(Task):
    """Inputs and targets. Your own is a function that returns one: ``natgrad race my_module:my_problem``.

    Attributes:
        loss_fn: a `torch.nn` loss called as ``loss_fn(outputs, targets)``, with a batch mean (or sum) inside.
        train: inputs and targets, first dimension the examples.
        test: the same, held out; None where the problem is about optimisation alone.
        scale: what turns the loss into `unit`.
        batch_size: examples per step, unless the user says otherwise.
        judged: how many of the training examples an evaluation takes, the first ones; None for all.
        scores: name → function (outputs, targets) → one number per example, averaged over the test set.
    """

    loss_fn: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None = None
    scale: float = 1.0
    batch_size: int = 128
    judged: int | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        inputs, targets = self.train
        if len(inputs) == 0:
            raise EmptyError(f"problem {self.name!r} has no training data")
        if len(inputs) != len(targets):
            raise ConfigError(f"problem {self.name!r} has {len(inputs)} inputs but {len(targets)} targets")

    @property
    def examples(self) -> int:
        """Of the training set."""
        return len(self.train[0])

    @property
    def examples_a_step(self) -> int:
        """The batch size."""
        return self.batch_size

    @property
    def likelihood(self) -> nn.Module:
        """The loss."""
        return self.loss_fn

    @property
    def scored(self) -> tuple[str, ...]:
        """The scores, where there is a test set."""
        return tuple(self.scores) if self.test is not None else ()

    def batches(self, size: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of epochs of permutations."""
        inputs, targets = self.train
        for rows in epochs(self.examples, size, seed, start):
            yield inputs[rows], targets[rows]

    def loss(self, model: nn.Module, loss_fn: LossFn, batch: Any) -> Tensor:
        """The loss of a batch."""
        inputs, targets = batch
        assert isinstance(loss_fn, nn.Module)
        return loss_fn(model(inputs), targets)

    @torch.no_grad()
    def judge(self, twin: nn.Module) -> dict[str, float]:
        """Loss and excess on the training set (or the first `judged` of it), loss and scores on the test set."""
        inputs, targets = (part[: self.judged] for part in self.train)
        # BatchNorm's averages lag behind weights that move fast: they are taken anew, for everybody
        update_bn(inputs[:_OF_NORMS].split(self.batch_size), twin.eval())
        loss = self.scale * self._means(twin, inputs, targets, {})["loss"]
        measured = {"loss": loss, "excess": loss - self.floor}
        if self.test is not None:
            tested = self._means(twin, *self.test, self.scores)
            measured["test_loss"] = self.scale * tested.pop("loss")
            measured |= {f"test_{name}": value for name, value in tested.items()}
        return measured

    def _means(
        self, twin: nn.Module, inputs: Tensor, targets: Tensor, scores: Mapping[str, Score]
    ) -> dict[str, float]:
        """Means over the examples. A summed loss is scaled to what one batch would give."""
        loss_fn, count = copy.deepcopy(self.loss_fn), len(inputs)
        summed = getattr(loss_fn, "reduction", "mean") == "sum"
        totals = dict.fromkeys(["loss", *scores], 0.0)
        for x, y in zip(inputs.split(_AT_ONCE), targets.split(_AT_ONCE), strict=True):
            outputs = twin(x)
            share = (self.batch_size if summed else len(x)) / count
            totals["loss"] += float(loss_fn(outputs, y)) * share
            for name, score in scores.items():
                totals[name] += float(score(outputs, y).sum()) / count
        return totals


def no_points(generator: torch.Generator) -> None:
    """For residuals that need none."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ResidualProblem(Task):
    """Residuals whose solution is known: ½ Σ_b mean r_b² is trained, the relative error is measured.

    Attributes:
        residuals: (model, points) → blocks of residuals by name.
        points: a generator → whatever `residuals` takes besides the model.
        error: the relative error of a model.
        fresh: whether points are drawn anew in each step; else each seed keeps its own.
    """

    residuals: Callable[[nn.Module, Any], Residuals]
    error: Callable[[nn.Module], float]
    points: Callable[[torch.Generator], Any] = no_points
    fresh: bool = False
    measure: str = "relative error"
    unit: str = ""
    things: str = "residuals"
    schedule: bool = True

    @property
    def examples(self) -> int:
        """Residuals of a step."""
        found = self.residuals(self.build(0), self.points(torch.Generator().manual_seed(0)))
        return sum(r.numel() for r in found.values())

    @property
    def examples_a_step(self) -> int:
        """All of them."""
        return self.examples

    @property
    def likelihood(self) -> None:
        """Residuals have none."""
        return None

    def batches(self, size: int, seed: int, start: int = 0) -> Iterator[Any]:
        """The points; they are not divided."""
        step = start
        while True:
            draw = seed * 1_000_003 + (step if self.fresh else 0)
            points = self.points(torch.Generator().manual_seed(draw))
            yield points
            step += 1

    def loss(self, model: nn.Module, loss_fn: LossFn, batch: Any) -> Tensor:
        """½ Σ_b mean r_b², which is natgrad's, too."""
        return sum_of_squares(self.residuals(model, batch))

    def residuals_of(self, model: nn.Module, batch: Any) -> Stepped:
        """The residuals."""
        return functools.partial(self.residuals, model, batch)

    def judge(self, twin: nn.Module) -> dict[str, float]:
        """The relative error; the loss on points of one more draw."""
        points = self.points(torch.Generator().manual_seed(0))
        loss = float(sum_of_squares(self.residuals(twin, points)).detach())
        return {"loss": loss, "excess": self.error(twin)}


def sum_of_squares(residuals: Residuals) -> Tensor:
    """½ Σ_b mean r_b²."""
    return torch.stack([0.5 * r.square().mean() for r in residuals.values()]).sum()


def epochs(count: int, size: int, seed: int, start: int = 0) -> Iterator[Tensor | slice]:
    """The rows of batch `start`, `start` + 1, …

    Every epoch is its own permutation; what is left over at its end is not used. A batch of everything keeps the
    data's order.
    """
    if size == count:
        while True:
            yield slice(None)
    per_epoch = count // size
    step = start
    while True:
        epoch, first = divmod(step, per_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for index in range(first, per_epoch):
            yield order[index * size : (index + 1) * size]
            step += 1


def correct(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the most probable class (dimension 1) is the target, else 0; the mean over an example's places."""
    hits = (outputs.argmax(1) == targets).double()
    return hits.view(len(hits), -1).mean(1)
