"""The generalised Gauss–Newton matrix and the Hessian of a loss over data, as operators, for comparison with F."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.information.data import BATCH_SIZE, Batches, Weights
from natgrad.information.survey import Sight, Survey, trainable
from natgrad.likelihoods import HeteroscedasticGaussian, Likelihood, likelihood_from
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
    parameters, likelihood = trainable(model, params), likelihood_from(likelihood)
    definite = not isinstance(likelihood, HeteroscedasticGaussian)
    survey = Survey(
        model, likelihood, Batches(data, batch_size), outputs, Weights(weights), seed, "natgrad.ggn"
    )

    def replay(sight: Sight, snapshot: Snapshot, names: tuple[str, ...]) -> Replay:
        in_outputs = of_loss(likelihood, sight.batch.targets, sight.weights)
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
    parameters, likelihood = trainable(model, params), likelihood_from(likelihood)
    survey = Survey(
        model, likelihood, Batches(data, batch_size), outputs, Weights(weights), seed, "natgrad.hessian"
    )

    def replay(sight: Sight, snapshot: Snapshot, names: tuple[str, ...]) -> Replay:
        return Replay.hessian(
            snapshot, names, sight.batch, survey.find_outputs, likelihood, sight.weights, sight.rng_state
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
    replays: list[Replay] = []
    masses: list[float] = []

    def see(sight: Sight) -> None:
        survey.require_targets(sight)
        replays.append(replay(sight, snapshot, names))
        masses.append(sight.mass)

    with torch.no_grad():
        survey.sweep(see)
    total = sum(masses)
    scales = [1.0 if survey.likelihood.reduction == "sum" else mass / total for mass in masses]
    first = next(iter(parameters.values()))
    return MatrixFree(
        ParameterSpace.of(parameters),
        total_product(replays, scales),
        dtype=first.dtype,
        device=first.device,
        definite=definite,
    )
