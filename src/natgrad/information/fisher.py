"""The Fisher information of a model's predictions on data, as a linear operator.

There is one implementation of each representation: the metric's own `Estimate`, which the optimiser feeds with its
batches, is shown here all of the data as the micro-batches of one step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.errors import ConfigError, ModelChangedError, announce
from natgrad.information.data import BATCH_SIZE
from natgrad.information.rest import Rest, joined
from natgrad.information.survey import Progress, Sight, Survey, trainable
from natgrad.likelihoods import Likelihood
from natgrad.likelihoods.base import bare
from natgrad.metrics import Estimate, Metric, Observation, metric_from
from natgrad.metrics.base import Kind, check_kind
from natgrad.operators import LinearOperator, ParameterSpace
from natgrad.tape import Tape
from natgrad.tape.axes import settle
from natgrad.tape.output_curvature import of_likelihood, of_signals
from natgrad.tape.outputs import signal_passes
from natgrad.tape.passes import SignalPass
from natgrad.tape.replay import Replay, Snapshot


def fisher(
    model: nn.Module,
    likelihood: nn.Module | Likelihood,
    data: Any,
    metric: str | Metric = "kfac",
    kind: Kind | None = None,
    *,
    params: Iterable[str | nn.Parameter] | None = None,
    outputs: Callable[[Any], Any] | None = None,
    weights: Float[Tensor, "N"] | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: bool | Progress = False,
) -> LinearOperator:
    """F(θ) = c Σₙ wₙ Jₙᵀ Hₙ Jₙ of a model on data, in nats per parameter².

    Jₙ is the Jacobian of the model's outputs for example n, Hₙ the Fisher information in the outputs, and c the
    loss's constant: one over the events of all the data for reduction="mean", 1 for "sum" (see `Likelihood`). It does
    not depend on how the data is cut into batches, but for a model in training mode whose examples depend on each
    other (batch normalisation) or are drawn at random (dropout). The model is evaluated in its present mode; its
    buffers, its ``.grad`` and the random state are left as they were.

    Args:
        model: the model at θ.
        likelihood: a torch.nn loss, or a natgrad likelihood.
        data: (inputs, targets) as a tuple; a DataLoader; or any iterable of batches, such as a list. Inputs are a
            tensor, a tuple of the model's arguments or a dict of its keyword arguments. Targets may be left out
            unless kind="empirical"; without them no event is ignored, and class weights count as 1.
        metric: the representation, by name or as an object such as ``natgrad.EKFAC()``.
        kind: "exact" sums over all output columns (the default for a metric by name), "mc" takes one target for each
            example that is sampled from the model, "rademacher" one random signal with less variance, and
            "empirical" the targets given. By default a metric object's own.
        params: the parameters that F is about, or their names; all that are trained by default. F has the model's
            order.
        outputs: what the likelihood reads of what the model returns, such as ``lambda o: o.logits``.
        weights: w, a factor of each example's part of F, in the order of the data. c does not change with it.
        batch_size: how many examples of a single (inputs, targets) are taken at a time.
        seed: of sampled signals, and of the model's own random draws.
        progress: True shows a line on stderr; a function is told how many batches are done, of how many (or None).

    Returns:
        F on the parameters, in the representation asked for. Parameters that no rule of the tape covers have their
        exact diagonal in metrics that work layer by layer, with one CoverageWarning.

    Raises:
        EmptyError: there is no data, no trainable parameter, or all events are ignored.
        ConfigError: an argument is out of range; data that can't be read, is on another device or of another dtype;
            a matrix that would be too large.
        OutputError, TargetError: the likelihood does not fit the outputs or the targets; says of which batch.
        NonFiniteError: data or outputs that are not finite; says of which batch.
        UnsupportedLossError: the loss has no likelihood.
        UnknownNameError: no metric has this name.
    """
    parameters = trainable(model, params)
    chosen = _as_asked(metric, kind)
    survey = Survey.of(model, likelihood, data, outputs, weights, batch_size, seed, "natgrad.fisher")
    if weights is not None and survey.data.shuffled:
        raise ConfigError(
            "weights follow the order of the data, but this DataLoader shuffles; use shuffle=False"
        )
    surveyor = _Surveyor(survey, chosen, parameters)
    # The model may run under autocast, as in training; what is made of its signals keeps the parameters' precision.
    plain = torch.autocast(next(iter(parameters.values())).device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), plain, _shown(progress) as told:
        operator = surveyor.run(told)
    if surveyor.announced:
        announce(surveyor.announced)
    return operator


class _Surveyor:
    """Shows an estimate all of the data."""

    def __init__(self, survey: Survey, metric: Metric, parameters: Mapping[str, nn.Parameter]) -> None:
        self._survey, self._metric, self._parameters = survey, metric, dict(parameters)
        self._tape = Tape(parameters)
        self._estimate: Estimate | None = None
        self._rest: Rest | None = None
        self._kind: Kind = "exact"
        self._sweep = 0
        self._snapshot: Snapshot | None = None
        self._generator = torch.Generator(device=next(iter(parameters.values())).device)
        self.announced = ""

    def run(self, progress: Progress | None) -> LinearOperator:
        """Sweeps as often as the estimate asks for, and returns its operator on all parameters."""
        estimate = self._metric.start(self._parameters)
        if estimate.kind is None:  # it does not look at data
            return estimate.operator()
        self._kind = estimate.kind
        if estimate.whole:
            self._estimate = estimate
        while self._sweep == 0 or (self._estimate is not None and self._sweep < self._estimate.sweeps):
            if self._sweep and self._estimate is not None:
                self._require_again()
                self._estimate.next_sweep()
            self._generator.manual_seed(self._survey.seed)
            self._survey.sweep(self._see, self._tape.recording, progress=progress)
            self._sweep += 1
        self._tape.clear()
        return joined(ParameterSpace.of(self._parameters), self._estimate, self._rest)

    def _require_again(self) -> None:
        if self._survey.data.once:
            raise ConfigError(
                f"{type(self._metric).__name__} has to go through this data again, and an iterator can be read once; "
                "pass the list of its batches, or a DataLoader"
            )

    def _see(self, sight: Sight) -> None:
        survey = self._survey
        settle([self._tape], survey.model, sight.batch, sight.outputs, survey.find_outputs, sight.rng_state)
        self._tape.resolve(sight.batch.examples)
        if self._estimate is None and self._rest is None:
            self._begin()
        self._require_covered()
        likelihood, examples, targets = self._survey.likelihood, sight.batch.examples, sight.batch.targets
        signals = likelihood.signals(bare(sight.outputs), targets, self._kind, self._generator, examples)
        passes = (
            _weighted(one, sight.weights)
            for one in signal_passes(self._tape, sight.outputs, signals, examples)
        )
        drawn = None if self._kind == "exact" else list(passes)  # one, which a replay needs too
        observation = Observation(
            self._passes(sight, passes if drawn is None else iter(drawn)),
            examples,
            step=0,
            first=sight.index == 0 and self._sweep == 0,
            additive=likelihood.reduction == "sum",
            mass=sight.mass,
            weights=sight.weights,
            again=not self._survey.data.once,
            replay=self._replay(sight, drawn),
        )
        with torch.no_grad():
            if self._rest is not None and self._sweep == 0:
                self._rest.begin(observation)
            if self._estimate is None:
                for _ in observation.passes:
                    pass
            else:
                self._estimate.observe(observation)

    def _passes(self, sight: Sight, passes: Iterator[SignalPass]) -> Iterator[SignalPass]:
        """The passes of a batch; one of zeros where there is none, as its events count all the same."""
        some = False
        for one in passes:
            some = True
            if self._rest is not None and self._sweep == 0:
                self._rest.observe(one)
            yield one
        if not some:
            zeros = tuple(torch.zeros_like(z) for z in sight.outputs)
            yield SignalPass(self._tape, sight.outputs, zeros, sight.batch.examples)

    def _replay(self, sight: Sight, drawn: list[SignalPass] | None) -> Replay | None:
        """The batch's F as products that run the model again, for estimates that can use it."""
        if self._estimate is None or not self._estimate.replays:
            return None
        if self._snapshot is None:
            self._snapshot = Snapshot.of(self._survey.model)
        batch = sight.batch
        if drawn is None:
            in_outputs = of_likelihood(self._survey.likelihood, batch.targets, sight.weights)
        else:
            in_outputs = of_signals([one.signals for one in drawn], batch.examples)
        return Replay.gauss_newton(
            self._snapshot,
            tuple(self._estimate.parameters),
            batch,
            self._survey.find_outputs,
            in_outputs,
            sight.rng_state,
        )

    def _begin(self) -> None:
        """After the first forward pass: the metric takes what rules cover, the rest has its diagonal."""
        covered = self._covered()
        left = {name: p for name, p in self._parameters.items() if name not in covered}
        if covered:
            self._estimate = self._metric.start(covered)
        if left:
            self._rest = Rest(left)
            self.announced = (
                f"no rule covers {', '.join(left)}: there F is its exact diagonal, from per-example gradients; "
                'metric="block" keeps whole blocks of it'
            )

    def _covered(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._parameters.items() if self._tape.explains(name)}

    def _require_covered(self) -> None:
        if self._estimate is None or self._estimate.whole:
            return
        lost = [name for name in self._estimate.parameters if name in self._tape.uncovered]
        if lost:
            raise ModelChangedError(
                f"{lost[0]} acted by {self._tape.uncovered[lost[0]]}, which no rule covers, and did not in earlier "
                'batches; use metric="dense", "gram" or "matrixfree" for such a model'
            )


def _as_asked(metric: str | Metric, kind: Kind | None) -> Metric:
    """The metric with the kind of the call, and with every example counted."""
    if kind is not None:
        check_kind(kind)
    chosen = metric_from(metric)
    options = {f.name for f in dataclasses.fields(chosen)}
    if kind is None and isinstance(metric, str):
        kind = "exact"
    changes: dict[str, Any] = {}
    if kind is not None and "kind" in options:
        changes["kind"] = kind
    if "examples" in options:  # a limit for the optimiser's averages
        changes["examples"] = None
    return dataclasses.replace(chosen, **changes)


def _weighted(signal_pass: SignalPass, weights: Tensor | None) -> SignalPass:
    if weights is None:
        return signal_pass
    roots = weights.sqrt()[:, None]
    signals = tuple(
        (s.reshape(signal_pass.examples, -1) * roots.to(s.dtype)).reshape(s.shape)
        for s in signal_pass.signals
    )
    return dataclasses.replace(signal_pass, signals=signals)


@contextlib.contextmanager
def _shown(progress: bool | Progress) -> Iterator[Progress | None]:
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield None
        return

    def tell(done: int, total: int | None) -> None:
        sys.stderr.write(f"\rnatgrad.fisher: batch {done}" + ("" if total is None else f" of {total}"))
        sys.stderr.flush()

    try:
        yield tell
    finally:
        sys.stderr.write("\n")
