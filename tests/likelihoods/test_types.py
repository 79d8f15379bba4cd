"""Half precision, empty batches, torch.func, other layouts, and a likelihood of one's own."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from natgrad.likelihoods import Bernoulli, Categorical, DiagonalLikelihood, Gaussian, Poisson, likelihood_from

KINDS = ["mc", "rademacher", "exact", "empirical"]
LOSSES = [nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss, nn.PoissonNLLLoss]


def targets_for(loss: type[nn.Module], z: Tensor) -> Tensor:
    if loss is nn.CrossEntropyLoss:
        return torch.arange(z.numel() // z.shape[1]).view(z.shape[0], *z.shape[2:]) % z.shape[1]
    return (z > 0).to(z.dtype)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_signals_have_the_outputs_type_and_its_accuracy(
    loss: type[nn.Module], kind: str, dtype: torch.dtype
) -> None:
    """Against float64 on the same rounded outputs: computing in float32, only the last rounding is the type's."""
    z, likelihood = normal(6, 5, dtype=dtype), likelihood_from(loss())
    y = targets_for(loss, z)
    wide = y if loss is nn.CrossEntropyLoss else y.double()
    # Products and empirical or exact signals are the same numbers; random ones are drawn in other types.
    ours = list(likelihood.signals(z, y, kind))
    assert all(s.dtype == dtype for s in ours)
    assert all(s.isfinite().all() for s in ours)
    product = likelihood.fisher_product(z, z, y)
    assert product.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    expected = likelihood.fisher_product(z.double(), z.double(), wide)
    torch.testing.assert_close(product.double(), expected, rtol=tolerance, atol=tolerance)
    if kind in ("exact", "empirical"):
        for a, b in zip(ours, likelihood.signals(z.double(), wide, kind), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    sample = likelihood.sample(z)
    assert sample.dtype == (torch.int64 if loss is nn.CrossEntropyLoss else dtype)


def test_half_precision_does_not_overflow_where_the_result_fits() -> None:
    z = torch.full(
        (1000, 1), 12.0, dtype=torch.float16
    )  # exp(12) = 162,755 is beyond float16, 1/1000 of it is not
    likelihood = Poisson()
    product = likelihood.fisher_product(z, torch.ones_like(z))
    torch.testing.assert_close(
        product.double(), torch.full((1000, 1), math.exp(12) / 1000).double(), rtol=1e-3, atol=0
    )
    assert all(s.isfinite().all() for s in likelihood.signals(z))
    logits = torch.tensor([[6e4, -6e4]], dtype=torch.float16)
    assert not Categorical().fisher_product(logits, logits).isnan().any()
    many = torch.zeros(70_000, 2, dtype=torch.float16)  # the count itself is beyond float16
    (signal,) = Categorical().signals(many, torch.zeros(70_000, dtype=torch.int64))
    torch.testing.assert_close(signal.double().square().sum().item(), 0.5, rtol=1e-3, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_outputs_give_finite_signals(loss: type[nn.Module]) -> None:
    size = 30.0 if loss is nn.PoissonNLLLoss else 1e30
    z = torch.tensor([[size, -size, 0.0], [-size, -size, size]])
    likelihood, y = likelihood_from(loss()), torch.tensor([2, 0])
    y = y if loss is nn.CrossEntropyLoss else torch.zeros(2, 3)
    assert likelihood.fisher_product(z, torch.ones_like(z), y).isfinite().all()
    for kind in ("mc", "rademacher", "exact"):
        assert all(s.isfinite().all() for s in likelihood.signals(z, y, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_outputs_that_are_not_a_number_give_signals_that_are_not(loss: type[nn.Module], kind: str) -> None:
    """Nothing raises here, and nothing is hidden: the optimiser finds the NaN before a parameter moves."""
    z = torch.full((2, 3), math.nan)
    signals = list(likelihood_from(loss()).signals(z, targets_for(loss, torch.zeros(2, 3)), kind))
    assert signals
    if loss is not nn.MSELoss or kind == "empirical":  # H of the squared error does not depend on the outputs
        assert all(s.isnan().any() for s in signals)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_empty_batch(loss: type[nn.Module], kind: str, reduction: str) -> None:
    z, likelihood = torch.zeros(0, 3), likelihood_from(loss(reduction=reduction))
    y = torch.zeros(0, dtype=torch.int64) if loss is nn.CrossEntropyLoss else torch.zeros(0, 3)
    assert likelihood.fisher_product(z, z, y).shape == (0, 3)
    assert all(s.shape == (0, 3) for s in likelihood.signals(z, y, kind))
    assert likelihood.sample(z).shape == y.shape
    if reduction == "sum":
        assert likelihood.loss(z, y) == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_vmap_over_examples(loss: type[nn.Module]) -> None:
    """Losses and products of each example by itself, as per-example gradients need them."""
    z, likelihood = normal(4, 3), likelihood_from(loss(reduction="sum"))
    y = targets_for(loss, z)
    gradients = torch.vmap(torch.func.grad(lambda a, b: likelihood.loss(a[None], b[None])))(z, y)
    torch.testing.assert_close(gradients, torch.func.grad(likelihood.loss)(z, y))
    products = torch.vmap(lambda a, b: likelihood.fisher_product(a[None], a[None], b[None])[0])(z, y)
    torch.testing.assert_close(products, likelihood.fisher_product(z, z, y))
    columns = torch.vmap(lambda v: likelihood.fisher_product(z, v, y))(torch.stack([z, 2 * z]))
    torch.testing.assert_close(columns, likelihood.fisher_product(z, torch.stack([z, 2 * z]), y))


@pytest.mark.parametrize("loss", LOSSES)
def test_products_of_several_vectors_and_their_gradient(loss: type[nn.Module]) -> None:
    z, likelihood = normal(4, 3).requires_grad_(), likelihood_from(loss())
    y = targets_for(loss, z)
    v = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    product = likelihood.fisher_product(z, v, y)
    one_by_one = [[likelihood.fisher_product(z, w, y) for w in row] for row in v]
    torch.testing.assert_close(product, torch.stack([torch.stack(row) for row in one_by_one]))
    u = torch.randn_like(v)
    gradient_v, gradient_z = torch.autograd.grad((u * product).sum(), (v, z), allow_unused=True)
    torch.testing.assert_close(gradient_v, likelihood.fisher_product(z, u, y))  # H is symmetric
    assert gradient_z is None  # and constant


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_outputs_of_any_layout_in_memory(loss: type[nn.Module], kind: str) -> None:
    z = normal(2, 3, 4, 5)
    y = targets_for(loss, z)
    strided = z.contiguous(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    likelihood = likelihood_from(loss())
    pairs = zip(
        likelihood.signals(z, y, kind, torch.Generator().manual_seed(0)),
        likelihood.signals(strided, y, kind, torch.Generator().manual_seed(0)),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        likelihood.fisher_product(strided, strided, y), likelihood.fisher_product(z, z, y)
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integer_and_boolean_targets(dtype: torch.dtype) -> None:
    z, y = normal(4, 3), torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    for likelihood in (
        Bernoulli(),
        Bernoulli(pos_weight=torch.full((3,), 2.0)),
        Gaussian(),
        Poisson(full=True),
    ):
        torch.testing.assert_close(likelihood.loss(z, y.to(dtype)), likelihood.loss(z, y.double()))
        torch.testing.assert_close(likelihood.log_prob(z, y.to(dtype)), likelihood.log_prob(z, y.double()))
        for kind in ("empirical", "exact"):
            pairs = zip(
                likelihood.signals(z, y.to(dtype), kind), likelihood.signals(z, y.double(), kind), strict=True
            )
            for a, b in pairs:
                torch.testing.assert_close(a, b)
    if dtype != torch.bool:
        classes, likelihood = y[:, 0] + y[:, 1], Categorical(weight=torch.tensor([1.0, 2.0, 3.0]).double())
        torch.testing.assert_close(likelihood.loss(z, classes.to(dtype)), likelihood.loss(z, classes))
        torch.testing.assert_close(
            likelihood.fisher_product(z, z, classes.to(dtype)), likelihood.fisher_product(z, z, classes)
        )


def test_log_prob_of_ignored_events_and_of_probabilities() -> None:
    z, likelihood = normal(3, 4), Categorical(weight=torch.ones(4).double() * 7, label_smoothing=0.5)
    log_p = z.log_softmax(1)
    torch.testing.assert_close(
        likelihood.log_prob(z, torch.tensor([1, -100, 2])),
        torch.stack([log_p[0, 1], torch.zeros(()).double(), log_p[2, 2]]),
    )
    q = normal(3, 4).softmax(1)
    torch.testing.assert_close(likelihood.log_prob(z, q), (q * log_p).sum(1))
    masked = torch.tensor([[0.0, -math.inf]])
    assert likelihood_from(nn.CrossEntropyLoss()).log_prob(masked, torch.tensor([-100])) == 0


def test_a_likelihood_survives_copies() -> None:
    likelihood = Categorical(weight=torch.tensor([1.0, 2.0]), reduction="sum")
    for twin in (copy.deepcopy(likelihood), pickle.loads(pickle.dumps(likelihood))):
        assert twin.reduction == "sum"
        assert torch.equal(twin.weight, likelihood.weight)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Exponential(DiagonalLikelihood):
    """y ~ Exponential(rate exp(z)): nll = exp(z) y − z, whose Fisher information is 1."""

    @property
    def _weighted_by_targets(self) -> bool:
        return False

    def _check_outputs(self, outputs: Tensor) -> None:
        pass

    def _check_targets(self, outputs: Tensor, targets: Tensor, values: bool) -> None:
        pass

    def _loss(self, z: Tensor, y: Tensor) -> Tensor:
        return (z.exp() * y - z).sum() * self._constant(z.numel())

    def _log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        return z - z.exp() * y

    def _sample(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.empty_like(z).exponential_(generator=generator) / z.exp()

    def _information(self, z: Tensor, targets: Tensor | None) -> Tensor:
        return torch.full_like(z, self._constant(z.numel()))

    def _sampled_signal(self, z: Tensor, targets: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return self._empirical_signal(z, self._sample(z, generator))

    def _empirical_signal(self, z: Tensor, y: Tensor) -> Tensor:
        return self._constant(z.numel()) ** 0.5 * (z.exp() * y - 1)


def test_a_likelihood_of_ones_own() -> None:
    own, z = Exponential(), normal(20_000, 2)
    assert likelihood_from(own) is own
    torch.testing.assert_close(own.fisher_product(z, z), z / 40_000)
    for kind in ("mc", "rademacher", "exact"):
        trace = sum(s.square().sum() for s in own.signals(z, kind=kind))
        torch.testing.assert_close(trace.item(), 1.0, rtol=0, atol=4 * math.sqrt(8 / 40_000))
