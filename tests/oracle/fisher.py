"""The Fisher information of a model's loss from its definition, in flat coordinates, and nothing shared with natgrad.

F = c Σₙ wₙ Jₙᵀ Hₙ Jₙ with J from torch.func and H from `oracle.likelihoods`, which enumerates the targets. A flat
vector is the concatenation of the trainable parameters in the model's order, each by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from oracle import likelihoods

Find = Callable[[Any], Any]


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Name → value of the parameters that are trained."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def flat(named: Mapping[str, Tensor]) -> Tensor:
    """The concatenation of named tensors, [P]."""
    return torch.cat([value.reshape(-1) for value in named.values()])


def gradient(model: nn.Module) -> Tensor:
    """The gradients that stand in the model, [P]."""
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.requires_grad])


def parameters(model: nn.Module) -> Tensor:
    """The trainable parameters, [P]."""
    return flat(trainable(model))


def positions(model: nn.Module, names: Sequence[str]) -> Tensor:
    """Where these parameters lie in a flat vector."""
    places, start = {}, 0
    for name, value in trainable(model).items():
        places[name] = torch.arange(start, start + value.numel())
        start += value.numel()
    return torch.cat([places[name] for name in names])


def jacobian(model: nn.Module, x: Tensor, find: Find = lambda z: z) -> Tensor:
    """∂z/∂θ, [outputs, P]; several outputs one after the other."""

    def outputs(values: Mapping[str, Tensor]) -> Tensor:
        found = find(functional_call(model, dict(values), (x,)))
        return torch.cat([z.reshape(-1) for z in (found if isinstance(found, tuple) else (found,))])

    values = trainable(model)
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):  # no batching rule at all
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        rows = [
            torch.cat(
                [g.reshape(-1) for g in torch.autograd.grad(z, list(leaves.values()), retain_graph=True)]
            )
            for z in outputs(leaves)
        ]
        return torch.stack(rows)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no batching rule
        by_name = jacrev(outputs)(values)
    return torch.cat([by_name[name].reshape(by_name[name].shape[0], -1) for name in values], dim=1)


def output_information(loss: nn.Module, z: Tensor | tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    """H on the outputs laid flat, for a torch loss."""
    if isinstance(loss, nn.GaussianNLLLoss):
        mean, variance = z
        n = mean.numel()
        c = 1.0 if loss.reduction == "sum" else 1.0 / n
        events = [[i, n + i] for i in range(n)]
        both = torch.cat([mean.reshape(-1), variance.reshape(-1)])
        return likelihoods.fisher(likelihoods.heteroscedastic, both, events, [c] * n)
    if isinstance(loss, nn.CrossEntropyLoss):
        events = likelihoods.categorical_events(z.shape)
        t = likelihoods.categorical_coefficients(
            y, z.shape[1], loss.weight, loss.label_smoothing, loss.ignore_index
        )
        c = likelihoods.categorical_constant(y, loss.weight, loss.ignore_index, loss.reduction, len(events))
        weights = [c * sum(row) for row in t]
        return likelihoods.fisher(likelihoods.categorical, z.reshape(-1), events, weights)
    events = likelihoods.element_events(z.shape)
    c = 1.0 if loss.reduction == "sum" else 1.0 / len(events)
    if isinstance(loss, nn.BCEWithLogitsLoss):
        weights = [c * s for s in likelihoods.bernoulli_weights(y, loss.weight, loss.pos_weight)]
        return likelihoods.fisher(likelihoods.bernoulli, z.reshape(-1), events, weights)
    if isinstance(loss, nn.PoissonNLLLoss):
        return likelihoods.fisher(likelihoods.poisson, z.reshape(-1), events, [c] * len(events))
    assert isinstance(loss, nn.MSELoss)  # the squared error is twice a Gaussian nll
    return likelihoods.fisher(likelihoods.gaussian, z.reshape(-1), events, [2 * c] * len(events))


def fisher(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, find: Find = lambda z: z) -> Tensor:
    """F = Jᵀ H J of the loss on one batch, [P, P]."""
    with torch.no_grad():
        z = find(model(x))
    J = jacobian(model, x, find)
    F = J.T @ output_information(loss, z, y) @ J
    return (F + F.T) / 2


def scores(model: nn.Module, x: Tensor, signals: Tensor) -> Tensor:
    """Jₙᵀ Sₙ of every example, [batch, P]: what a signal becomes at the parameters."""
    J = jacobian(model, x).reshape(len(x), -1, parameters(model).numel())
    return torch.einsum("nop,no->np", J, signals.reshape(len(x), -1))


def empirical(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Σₙ sₙ sₙᵀ with sₙ the sum over example n's events of √(c wₑ) ∇nll: here, one loss an event, in a loop."""
    with torch.no_grad():
        z = model(x)
    signal = event_signals(loss, z, y)
    s = scores(model, x, signal)
    return s.T @ s


def event_signals(loss: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    """√(c wₑ) ∇nll(zₑ, yₑ) for unweighted events, at each event's place in the outputs."""
    events = (
        likelihoods.categorical_events(z.shape)
        if isinstance(loss, nn.CrossEntropyLoss)
        else likelihoods.element_events(z.shape)
    )
    family = {
        nn.CrossEntropyLoss: likelihoods.categorical,
        nn.BCEWithLogitsLoss: likelihoods.bernoulli,
        nn.MSELoss: likelihoods.gaussian,
        nn.PoissonNLLLoss: likelihoods.poisson,
    }[type(loss)]
    c = 1.0 if loss.reduction == "sum" else 1.0 / len(events)
    c = 2 * c if isinstance(loss, nn.MSELoss) else c
    signal, flat_z = torch.zeros(z.numel(), dtype=z.dtype), z.reshape(-1)
    for event, target in zip(events, y.reshape(-1), strict=True):
        index = torch.tensor(event)
        z_event = flat_z[index].requires_grad_()
        (score,) = torch.autograd.grad(family(z_event).log_prob(target.to(z.dtype)).sum(), z_event)
        signal[index] = -(c**0.5) * score
    return signal.reshape(z.shape)


def kronecker_factors(model: nn.Module, x: Tensor, H: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, G) of each linear layer of a sequential model in natgrad's convention, by loops over positions and outputs.

    A is the mean over positions of ã ãᵀ; G is the sum over positions of the signals' outer products, where the signals
    are the columns of a square root of H sent back one at a time.
    """
    inputs: dict[str, Tensor] = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    results: dict[str, Tensor] = {}
    handles = [
        m.register_forward_hook(
            lambda _m, args, out, name=name: (
                inputs.update({name: args[0]}),
                results.update({name: out}),
                None,
            )[-1]
        )
        for name, m in layers.items()
    ]
    z = model(x)
    for handle in handles:
        handle.remove()
    values, vectors = torch.linalg.eigh(H)
    root = vectors * values.clamp_min(0).sqrt()
    factors = {}
    for name, layer in layers.items():
        a = inputs[name].detach().reshape(-1, layer.in_features)
        if layer.bias is not None:
            a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], dim=1)
        G = torch.zeros(layer.out_features, layer.out_features, dtype=a.dtype)
        for column in root.T:
            (g,) = torch.autograd.grad(z, results[name], column.reshape(z.shape), retain_graph=True)
            g = g.reshape(-1, layer.out_features)
            G += g.T @ g
        factors[name] = (a.T @ a / len(a), G)
    return factors
