"""The generalised Gauss–Newton matrix and the Hessian of a loss over data, as operators, for comparison with F."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from natgrad.information.data import BATCH_SIZE
from natgrad.information.survey import Sight, Survey, trainable
from natgrad.likelihoods import HeteroscedasticGaussian, Likelihood
from natgrad.operators import LinearOperator, MatrixFree, ParameterSpace
from natgrad.tape.output_curvature import of_loss
from natgrad.tape.replay import Replay, Snapshot, total_product


def ggn(
    model: nn.Module,
    likelihood: nn.Module | Likelihood,
    data: Any,
    *,
    params: Iterable[str | nn.Parameter] | None = None,
    outputs: Callable[[Any], Any] | None = None,
    weights: Float[Tensor, "N"] | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
) -> LinearOperator:
    """JᵀHJ with H the Hessian of the loss in the outputs (Schraudolph 2002), by products that run the model.

    For the likelihoods whose outputs are natural parameters (all of natgrad's but `HeteroscedasticGaussian`) it is the
    Fisher information (Martens 2020, §9). The data is kept and gone through in every product.

    Args:
        model, likelihood, data, params, outputs, weights, batch_size, seed: as in `natgrad.fisher`; targets are needed.

    Raises:
        EmptyError, ConfigError, OutputError, TargetError, NonFiniteError, UnsupportedLossError: as `natgrad.fisher`.
    """
    parameters = trainable(model, params)
    survey = Survey.of(model, likelihood, data, outputs, weights, batch_size, seed, "natgrad.ggn")
    definite = not isinstance(survey.likelihood, HeteroscedasticGaussian)

    def replay(sight: Sight, snapshot: Snapshot, names: tuple[str, ...]) -> Replay:
        in_outputs = of_loss(survey.likelihood, sight.batch.targets, sight.weights)
        return Replay.gauss_newton(
            snapshot, names, sight.batch, survey.find_outputs, in_outputs, sight.rng_state
        )

    return _operator(survey, parameters, replay, definite)


def hessian(
    model: nn.Module,
    likelihood: nn.Module | Likelihood,
    data: Any,
    *,
    params: Iterable[str | nn.Parameter] | None = None,
    outputs: Callable[[Any], Any] | None = None,
    weights: Float[Tensor, "N"] | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
) -> LinearOperator:
    """∇²L of the loss over the data (Pearlmutter 1994), by products that run the model.

    It may be indefinite: products, solutions, the trace, the diagonal and eigenvalues make sense; lengths, draws and
    roots don't. Its expectation over targets from the model is F.

    Args:
        model, likelihood, data, params, outputs, weights, batch_size, seed: as in `natgrad.fisher`; targets are needed.

    Raises:
        EmptyError, ConfigError, OutputError, TargetError, NonFiniteError, UnsupportedLossError: as `natgrad.fisher`.
    """
    parameters = trainable(model, params)
    survey = Survey.of(model, likelihood, data, outputs, weights, batch_size, seed, "natgrad.hessian")

    def replay(sight: Sight, snapshot: Snapshot, names: tuple[str, ...]) -> Replay:
        return Replay.hessian(
            snapshot,
            names,
            sight.batch,
            survey.find_outputs,
            survey.likelihood,
            sight.weights,
            sight.rng_state,
        )

    return _operator(survey, parameters, replay, definite=False)


def _operator(
    survey: Survey,
    parameters: dict[str, nn.Parameter],
    replay: Callable[[Sight, Snapshot, tuple[str, ...]], Replay],
    definite: bool,
) -> LinearOperator:
    """The sum of the batches' products, weighted as the loss's reduction says."""
    snapshot, names = Snapshot.of(survey.model), tuple(parameters)

    def look(sight: Sight) -> Replay:
        survey.require_targets(sight)
        return replay(sight, snapshot, names)

    replays, scales = survey.gather(look)
    first = next(iter(parameters.values()))
    return MatrixFree(
        ParameterSpace.of(parameters),
        total_product(replays, scales),
        dtype=first.dtype,
        device=first.device,
        definite=definite,
    )
