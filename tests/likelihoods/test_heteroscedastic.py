"""The Gaussian whose variance is predicted, or given with the targets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from natgrad.errors import OutputError, TargetError
from natgrad.likelihoods import HeteroscedasticGaussian, likelihood_from
from oracle import likelihoods as oracle

SHAPES = [
    pytest.param((4, 3), (4, 3), id="one-each"),
    pytest.param((4, 3), (4,), id="no-last"),
    pytest.param((4, 3), (4, 1), id="last-1"),
    pytest.param((2, 3, 2), (2, 1, 2), id="middle-1"),
    pytest.param((4,), (4,), id="flat"),
    pytest.param((3, 3), (3,), id="square"),
]
OPTIONS = [
    pytest.param({"reduction": r, "full": f, "eps": e}, id=f"{r}-full={f}-eps={e}")
    for r, f, e in itertools.product(("mean", "sum"), (False, True), (1e-6, 0.5))
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outputs_of(mean_shape: tuple[int, ...], variance_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Some of the variances are below eps=0.5."""
    return normal(*mean_shape), normal(*variance_shape, seed=1).square() + 0.05


def full_shape(mean: Tensor, variance: Tensor) -> Tensor:
    """The variance of each element of the mean, in loops of torch's rule."""
    return (variance.unsqueeze(-1) if variance.ndim < mean.ndim else variance).expand(mean.shape)


def owners(mean: Tensor, variance: Tensor) -> list[int]:
    """Which entry of the variance each element of the mean has."""
    index = torch.arange(variance.numel()).view(variance.shape)
    return full_shape(mean, index).flatten().tolist()


def naive_fisher(mean: Tensor, variance: Tensor, loss: nn.GaussianNLLLoss) -> Tensor:
    """H over (mean, variance), both flattened and joined."""
    c = 1.0 if loss.reduction == "sum" else 1 / mean.numel()
    v = full_shape(mean, variance).flatten().clamp_min(loss.eps)
    H = torch.zeros(mean.numel() + variance.numel(), mean.numel() + variance.numel(), dtype=torch.float64)
    for i, owner in enumerate(owners(mean, variance)):
        _, square = oracle.score_moments(oracle.heteroscedastic, torch.stack([mean.flatten()[i], v[i]]))
        index = torch.tensor([i, mean.numel() + owner])
        H[index[:, None], index] += c * square
    return H


def joined(parts: tuple[Tensor, Tensor], lead: int = 0) -> Tensor:
    return torch.cat([p.flatten(lead) for p in parts], -1)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("mean_shape", "variance_shape"), SHAPES)
def test_loss_is_torchs(mean_shape: tuple, variance_shape: tuple, options: dict) -> None:
    loss, y = nn.GaussianNLLLoss(**options), normal(*mean_shape, seed=2)
    z = tuple(a.requires_grad_() for a in outputs_of(mean_shape, variance_shape))
    ours, torchs = likelihood_from(loss).loss(z, y), loss(z[0], y, z[1])
    assert torch.equal(ours, torchs)
    for a, b in zip(torch.autograd.grad(ours, z), torch.autograd.grad(torchs, z), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(likelihood_from(loss).loss(z[0], (y, z[1])), torchs)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("mean_shape", "variance_shape"), SHAPES)
def test_fisher_and_exact_signals(mean_shape: tuple, variance_shape: tuple, options: dict) -> None:
    loss, z = nn.GaussianNLLLoss(**options), outputs_of(mean_shape, variance_shape)
    likelihood, total = likelihood_from(loss), z[0].numel() + z[1].numel()
    expected = naive_fisher(*z, loss)

    identity = torch.eye(total, dtype=torch.float64).split([z[0].numel(), z[1].numel()], 1)
    vectors = tuple(v.reshape(total, *part.shape) for v, part in zip(identity, z, strict=True))
    H = joined(likelihood.fisher_product(z, vectors), 1)
    torch.testing.assert_close(H, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(H, joined(likelihood.fisher_product(z, vectors, normal(*mean_shape)), 1))

    signals = list(likelihood.signals(z, kind="exact"))
    assert len(signals) == total // z[0].shape[0]
    assert all(s[0].shape == z[0].shape and s[1].shape == z[1].shape for s in signals)
    for s in signals:
        assert sum((part != 0).reshape(len(z[0]), -1).sum(1).max().item() for part in s) == 1
    diagonal = sum(joined(s).square() for s in signals)
    torch.testing.assert_close(diagonal, expected.diagonal(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("mean_shape", "variance_shape"), SHAPES)
def test_empirical_signal_is_the_scaled_gradient(
    mean_shape: tuple, variance_shape: tuple, options: dict
) -> None:
    loss, y = nn.GaussianNLLLoss(**options), normal(*mean_shape, seed=2)
    z = tuple(a.requires_grad_() for a in outputs_of(mean_shape, variance_shape))
    gradient = torch.autograd.grad(loss(z[0], y, z[1]), z)
    (signal,) = likelihood_from(loss).signals(z, y, "empirical")
    c = 1.0 if loss.reduction == "sum" else 1 / y.numel()
    torch.testing.assert_close(math.sqrt(c) * joined(signal), joined(gradient))


@pytest.mark.parametrize("kind", ["mc", "rademacher"])
@pytest.mark.parametrize("variance_shape", [(3,), (1,)])
def test_random_signals_converge(variance_shape: tuple, kind: str) -> None:
    loss, draws = nn.GaussianNLLLoss(reduction="sum"), 20_000
    mean, variance = normal(3), normal(*variance_shape, seed=1).square() + 0.5
    many = mean.expand(draws, 3), variance.expand(draws, *variance_shape)
    likelihood = likelihood_from(loss)
    (signal,) = likelihood.signals(many, kind=kind, generator=torch.Generator().manual_seed(0))
    rows = torch.cat(signal, 1)
    expected = naive_fisher(mean[None], variance[None], loss)
    squares = rows[:, :, None] * rows[:, None, :]
    for sample, mean_of in ((squares, expected), (rows, torch.zeros(()))):
        error = sample.std(0) / math.sqrt(draws)
        assert torch.all((sample.mean(0) - mean_of).abs() <= 4 * error + 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "fixed",
    [
        0.25,
        2,
        torch.tensor([[0.5], [2.0]], dtype=torch.float64),
        torch.tensor([[0.5, 1.0, 0.1], [2.0, 0.25, 3.0]]).double(),
    ],
)
def test_a_variance_that_comes_with_the_targets(fixed: float | Tensor, reduction: str) -> None:
    """The loss is then a weighted squared error, H = diag(c/v) is its Hessian, and signals are those of the mean."""
    likelihood = HeteroscedasticGaussian(reduction=reduction)
    z, y = normal(2, 3), normal(2, 3, seed=2)
    variance = fixed.double() if isinstance(fixed, Tensor) else torch.full((2, 3), float(fixed)).double()
    loss = nn.GaussianNLLLoss(reduction=reduction)
    assert torch.equal(likelihood.loss(z, (y, fixed)), loss(z, y, variance))
    H = oracle.hessian(lambda a: loss(a, y, variance), z)
    identity = torch.eye(6, dtype=torch.float64).view(6, 2, 3)
    torch.testing.assert_close(likelihood.fisher_product(z, identity, (y, fixed)).view(6, 6), H)
    signals = list(likelihood.signals(z, (y, fixed), "exact"))
    assert len(signals) == 3
    torch.testing.assert_close(sum(s.square() for s in signals).flatten(), H.diagonal())
    for kind in ("mc", "rademacher", "empirical"):
        (signal,) = likelihood.signals(z, (y, fixed), kind)
        assert signal.shape == z.shape
    a = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(a, y, variance), a)
    torch.testing.assert_close(signal * (1 if reduction == "sum" else math.sqrt(1 / 6)), gradient)
    normal_density = torch.distributions.Normal(z, full_shape(z, variance).sqrt())
    torch.testing.assert_close(likelihood.log_prob(z, (y, fixed)), normal_density.log_prob(y))


@pytest.mark.parametrize(("mean_shape", "variance_shape"), SHAPES)
def test_the_mc_signal_is_the_score_of_what_sample_draws(mean_shape: tuple, variance_shape: tuple) -> None:
    z, likelihood = outputs_of(mean_shape, variance_shape), HeteroscedasticGaussian()
    (drawn,) = likelihood.signals(z, kind="mc", generator=torch.Generator().manual_seed(5))
    y = likelihood.sample(z, torch.Generator().manual_seed(5))
    (score,) = likelihood.signals(z, y, "empirical")
    torch.testing.assert_close(drawn, score)


def test_samples() -> None:
    mean, variance = torch.tensor([1.0, -2.0]), torch.tensor([4.0, 0.25])
    many = mean.expand(20_000, 2), variance.expand(20_000, 2)
    y = HeteroscedasticGaussian().sample(many, torch.Generator().manual_seed(0))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.mean(0), mean, rtol=0, atol=4 * 2 / math.sqrt(20_000))
    torch.testing.assert_close(y.var(0), variance, rtol=4 * math.sqrt(2 / 20_000), atol=0)


def test_a_pair_of_lower_precision_keeps_its_types() -> None:
    z = torch.zeros(3, 2, dtype=torch.bfloat16), torch.ones(3, 2, dtype=torch.float32)
    (signal,) = HeteroscedasticGaussian().signals(z)
    assert [s.dtype for s in signal] == [torch.bfloat16, torch.float32]


ONES = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("outputs", "targets", "error", "match"),
    [
        ((ONES, ONES, ONES), None, OutputError, r"\(mean, variance\), or a mean alone, got a tuple of 3"),
        ([ONES, ONES], None, OutputError, "got list"),
        ((ONES, 1.0), None, OutputError, "a tensor as variance, got float"),
        ((ONES, ONES.long()), None, OutputError, "a floating-point type, got torch.int64"),
        ((ONES, -ONES), None, OutputError, "must not be negative, its least entry is -1; exp or softplus"),
        ((ONES, ONES * math.nan), None, OutputError, "its least entry is nan"),
        ((ONES, ONES[0]), None, OutputError, r"must be the mean's, \(3, 2\), or .* got \(2,\)"),
        ((ONES, ONES[:1, :1]), None, OutputError, r"got \(1, 1\)"),
        ((ONES, ONES), ONES[0], TargetError, r"the outputs' shape \(3, 2\), got \(2,\)"),
        ((ONES, ONES), (ONES, ONES), TargetError, "have a variance already"),
        (ONES, ONES, TargetError, r"pass targets=\(target, variance\), or outputs=\(mean, variance\)"),
        (ONES, (ONES, ONES, ONES), TargetError, r"pass targets=\(target, variance\)"),
        (ONES, (ONES, -ONES), TargetError, "must not be negative"),
        (ONES, (ONES, -1.0), TargetError, "a tensor or a number that is not negative, got -1.0"),
        (ONES, (ONES, "1"), TargetError, "got '1'"),
        (ONES, (ONES[0], ONES), TargetError, r"got \(2,\)"),
        (ONES.long(), None, OutputError, "got torch.int64"),
    ],
)
def test_errors(outputs: object, targets: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        HeteroscedasticGaussian().check(outputs, targets)


def test_a_mean_alone_has_no_fisher_and_no_samples() -> None:
    likelihood = HeteroscedasticGaussian()
    likelihood.check(ONES)
    with pytest.raises(TargetError, match="the outputs are a mean alone"):
        likelihood.fisher_product(ONES, ONES)
    with pytest.raises(TargetError, match="the outputs are a mean alone"):
        likelihood.signals(ONES)
    with pytest.raises(OutputError, match=r"pass outputs=\(mean, variance\)"):
        likelihood.sample(ONES)
